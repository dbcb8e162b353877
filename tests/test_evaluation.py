"""evaluate() from the command line and from Python, on a tiny model."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from tiny import tiny_model, tiny_tokenizer

from entropylens import engines
from entropylens.engines.hf import HFEngine
from entropylens.errors import DatasetError, EntropyLensError, OutputDirectoryError, SettingError
from entropylens.evaluation import evaluate
from entropylens.problems import Source
from entropylens.sampling import Sampling
from entropylens.scores import Evaluation

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture
def sums(tmp_path):
    """Three problems; the tiny model answers none."""
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"{it}+1", "answer": it + 1} for it in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def saying(monkeypatch):
    """Let decoded answers be what a function makes of (token ids)."""

    def say(text_of):
        tokenizer = tiny_tokenizer()
        monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **_: text_of(tuple(ids)))

    return say


def run(model_directory, benchmarks, output, **options):
    options = {"sampling": SHORT, "num_samples": 4, "progress": False} | options
    return evaluate(str(model_directory), list(map(str, benchmarks)), output=output, **options)


def test_files_and_numbers(model_directory, sums, tmp_path, saying):
    # Right where the first token is even: so the scores can be counted from the completions.
    saying(lambda ids: f"\\boxed{{{1 + ids[0] % 2}}}")
    found = run(model_directory, [sums], tmp_path / "run")
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    assert len(lines) == 12
    right = [
        1 + line["response_ids"][0] % 2 == line["problem"] + 1 for line in map(json.loads, lines)
    ]
    assert 0 < sum(right) < 12
    assert found.score("sums") == pytest.approx(sum(right) / 12)
    again = Evaluation.load(tmp_path / "run")
    pd.testing.assert_frame_equal(again.scores, found.scores)
    assert again.benchmarks[0].grader.startswith("math-verify 0.9")
    assert again.sampling["top_p"] == 1.0
    assert set(found.grades["verdict"]) <= {"correct", "wrong"}
    assert found.scores["truncated"].iloc[0] == found.grades["truncated"].mean()


def test_finished_answers_are_kept_and_more_are_added(model_directory, sums, tmp_path, monkeypatch):
    output = tmp_path / "run"
    run(model_directory, [sums], output, num_samples=2)
    before = (output / "completions.jsonl").read_bytes()
    four = run(model_directory, [sums], output)
    assert (output / "completions.jsonl").read_bytes().startswith(before)
    assert (four.benchmarks[0].num_samples, len(four.grades)) == (4, 12)
    other = tmp_path / "more.jsonl"
    other.write_text('{"problem": "2*2", "answer": "4"}')
    both = run(model_directory, [other], output)
    assert [one.name for one in both.benchmarks] == ["sums", "more"]
    whole = (output / "completions.jsonl").read_bytes()
    monkeypatch.setattr(HFEngine, "_answer", None)
    run(model_directory, [other, sums], output)
    assert (output / "completions.jsonl").read_bytes() == whole


def test_another_model_or_setting_is_refused(model_directory, sums, tmp_path):
    output = tmp_path / "run"
    run(model_directory, [sums], output)
    with pytest.raises(OutputDirectoryError, match=r"other settings \(temperature\)"):
        run(model_directory, [sums], output, sampling=Sampling(max_new_tokens=12, temperature=0.5))
    tiny_model("qwen3").save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(OutputDirectoryError, match=r"other settings \(model\)"):
        run(tmp_path / "other", [sums], output)
    run(tmp_path / "other", [sums], output, force=True)
    assert len((output / "completions.jsonl").read_text().splitlines()) == 12


def test_what_cannot_join_a_directory_is_refused_before_the_model_is_loaded(
    model_directory, sums, tmp_path, monkeypatch
):
    output = tmp_path / "run"
    run(model_directory, [sums], output)
    monkeypatch.setattr("entropylens.evaluation.open_engine", None)
    other = tmp_path / "other" / "sums.jsonl"
    other.parent.mkdir()
    other.write_text('{"problem": "2*2", "answer": "4"}')
    with pytest.raises(SettingError, match="other problems called 'sums'"):
        run(model_directory, [other], output)
    other = other.rename(other.with_name("more.jsonl"))
    with pytest.raises(SettingError, match="sums with n = 4, fewer than --k 8"):
        run(model_directory, [other], output, num_samples=8, ks=(8,))
    (output / "benchmarks.json").write_text("{")
    with pytest.raises(OutputDirectoryError, match="is damaged"):
        run(model_directory, [sums], output)


def test_a_model_may_be_loaded_already(sums, tmp_path):
    loaded = tiny_model("llama")
    with pytest.raises(SettingError, match="without a tokenizer"):
        evaluate(loaded, [str(sums)], output=tmp_path / "run", progress=False)


def test_the_models_own_sampling_is_taken_where_asked(model_directory, sums, tmp_path, monkeypatch):
    monkeypatch.setattr(HFEngine, "suggested", {"temperature": 0.6, "top_k": 20})
    plain = run(model_directory, [sums], tmp_path / "plain")
    assert (plain.sampling["temperature"], plain.sampling["top_k"]) == (1.0, 0)
    own = run(model_directory, [sums], tmp_path / "own", own_sampling=True)
    assert (own.sampling["temperature"], own.sampling["top_k"]) == (0.6, 20)


def test_reasoning_gym_problems_are_scored_by_their_task(model_directory, tmp_path, saying):
    saying(lambda ids: "I guess\n3")
    found = run(model_directory, ["reasoning_gym:gcd"], tmp_path / "run", num_problems=3)
    assert found.benchmarks[0].grader.startswith("reasoning-gym")
    assert set(found.grades["answer"]) == {"3"}


def test_the_hub_commit_is_kept(model_directory, tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    commits, asked = iter(["1" * 40, "2" * 40]), []

    def load_dataset(*_, revision, split):
        asked.append((revision, split))
        return datasets.Dataset.from_dict({"problem": ["1+1"], "answer": ["2"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda *_, **__: SimpleNamespace(sha=next(commits)),
    )
    first = run(model_directory, ["math500"], tmp_path / "run")
    again = run(model_directory, ["math500"], tmp_path / "run")
    assert [one.benchmarks[0].revision for one in (first, again)] == ["1" * 40] * 2
    assert asked == [("1" * 40, "test")] * 2


@pytest.mark.parametrize(
    ("benchmark", "options", "error", "says"),
    [
        ("nowhere", {}, DatasetError, r"no dataset 'nowhere': name .*math500, amc23, aime24"),
        ("deepmath", {}, DatasetError, "for training only"),
        ("sums", {"source": Source("Frage")}, DatasetError, "no column 'Frage'"),
        ("sums", {"ks": (8,)}, SettingError, r"--k 8 is more than the n = 4 answers"),
        ("sums", {"ks": (0,)}, SettingError, "--k is 0"),
        ("sums", {"grading": "loose"}, SettingError, "no grading 'loose'"),
        ("sums", {"num_problems": 0}, SettingError, "--num-problems is 0"),
        ("sums", {"engine": "sglang"}, SettingError, "no engine 'sglang'"),
        ("sums", {"engine": "vllm"}, SettingError, "vLLM is not installed"),
        ("sums", {"tensor_parallel": 2}, SettingError, "needs vLLM"),
        ("sums", {"data_parallel": 0}, SettingError, "--data-parallel is 0"),
        ("bad", {}, DatasetError, r"row 2: the gold answer .* cannot be used .*strict"),
        ("none", {}, DatasetError, "row 1: it has no gold answer"),
        ("reasoning_gym:gcd", {}, SettingError, "say how many"),
    ],
)
def test_bad_input_is_told_before_the_model_is_loaded(
    benchmark, options, error, says, sums, tmp_path, monkeypatch
):
    if "engine" not in options and "parallel" not in str(options):
        monkeypatch.setattr("entropylens.evaluation.open_engine", None)
    monkeypatch.setattr(engines, "demo_model", None)
    (tmp_path / "bad.jsonl").write_text(
        '{"problem": "1+1", "answer": "2"}\n{"problem": "1+2", "answer": "\\\\$ "}'
    )
    (tmp_path / "none.jsonl").write_text('{"problem": "1+1", "answer": null}')
    path = tmp_path / f"{benchmark}.jsonl"
    with pytest.raises(error, match=says):
        run("nowhere", [path if path.exists() else benchmark], tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_benchmark_is_named_once(sums, tmp_path):
    for names in ([], [sums, sums]):
        with pytest.raises(EntropyLensError, match=r"no benchmark|named twice"):
            run("nowhere", names, tmp_path / "run")


def test_the_command_line(entropylens, model_directory, sums, tmp_path):
    common = ("--benchmark", sums, "-n", 2, "--max-new-tokens", 8)
    done = entropylens("generate", model_directory, *common, "-o", tmp_path / "g")
    assert done.returncode == 0, done.stderr
    assert f"6 answers in {tmp_path / 'g' / 'completions.jsonl'}" in done.stdout
    done = entropylens("evaluate", model_directory, *common, "-o", tmp_path / "g", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["scores"][0]["metric"] == "avg@k"
    assert "answering" not in done.stderr  # they were there
    tiny_model("qwen3").save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    done = entropylens(
        "evaluate", model_directory, tmp_path / "other", *common, "-o", tmp_path / "e"
    )
    assert done.returncode == 0, done.stderr
    assert "3 problems, 0 solved" in done.stdout
    assert "fewer than 5 solved" in " ".join(done.stdout.split())
    assert (tmp_path / "e" / "table1.tex").is_file()
    names = [model_directory.name, "other"]
    done = entropylens("compare", *(tmp_path / "e" / it for it in names), "-o", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert "cannot be told apart with this data" in done.stdout
    kept = (tmp_path / "c" / "comparison.json").read_bytes()
    turned = [tmp_path / "e" / it for it in reversed(names)]
    done = entropylens("compare", *turned, "-o", tmp_path / "c")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "comparison.json' exists already" in done.stderr
    assert (tmp_path / "c" / "comparison.json").read_bytes() == kept
    done = entropylens("compare", *turned, "-o", tmp_path / "c", "--force")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c" / "comparison.json").read_bytes() != kept
    done = entropylens("compare", tmp_path / "e" / "other", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds no finished result" in done.stderr
