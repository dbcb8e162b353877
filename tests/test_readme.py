"""The README's commands and its Python example are run; `make demo` by the fixture demo_run."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_the_two_commands_are_there():
    assert "make demo" in commands()
    assert "make test" in commands()


@pytest.fixture(scope="module")
def training_file(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "data.parquet"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, model_directory):
    """Two evaluations, and the problems."""
    from entropylens.evaluation import evaluate
    from entropylens.sampling import Sampling

    path = tmp_path_factory.mktemp("evaluated")
    (path / "problems.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    for seed, name in enumerate("ab"):
        evaluate(
            model_directory, [str(path / "problems.jsonl")], num_samples=2, output=path / name,
            sampling=Sampling(max_new_tokens=4, seed=seed), progress=False,
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def mine(tmp_path_factory, model_directory):
    """An analysis of another model."""
    import entropylens

    path = tmp_path_factory.mktemp("mine") / "run"
    lines = [{"prompt": "1+1=", "response": "2"}, {"prompt": "2+2=", "response": "4"}]
    entropylens.analyze(model_directory, lines, output=path, progress=False)
    return path


@pytest.mark.real
@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("entropylens")])
def test_commands_run(
    command, demo_run, model_directory, entropylens, tmp_path, training_file, evaluated, mine
):
    """MODEL stands for a user's model, FILE for their responses, runs/demo for the demo's run."""
    responses = tmp_path / "responses.jsonl"
    responses.write_text('{"prompt": "1+1=", "response": "2"}\n')
    replaced = {
        "MODEL": str(model_directory), "FILE.jsonl": str(responses), "runs/demo": str(demo_run[0]),
        "data.parquet": str(training_file), "problems.jsonl": str(evaluated / "problems.jsonl"),
        "runs/a": str(evaluated / "a"), "runs/b": str(evaluated / "b"),
        "runs/figures": str(tmp_path / "figures"), "runs/mine": str(mine),
        "data.train_files=data.parquet": f"data.train_files={training_file}",
    }  # fmt: skip
    words = [replaced.get(word, word) for word in shlex.split(command)[1:]]
    if words[0] in ("analyze", "train"):
        words += ["-o", str(tmp_path / "run")]
    if words[0] == "evaluate":
        words[-1] = str(tmp_path / "run")
    done = entropylens(*words)
    assert done.returncode == 0, done.stderr


@pytest.mark.real
def test_the_example_runs(demo_run, model_directory, tmp_path, monkeypatch):
    (example,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    example = example.replace('"runs/demo"', repr(str(demo_run[0])))
    example = example.replace('"MODEL"', repr(str(model_directory)))
    exec(compile(example, "README.md", "exec"), {})


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
