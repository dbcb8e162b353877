"""The command line in processes of its own: one line and exit code 2 for each bad input."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from tiny import tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

GOOD = json.dumps({"prompt_ids": [1, 2], "response_ids": [3, 4]})


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text(f"{GOOD}\n" * 3)
    return path


def assert_one_line(done, *says):
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for text in says:
        assert text in lines[0]


def test_help_and_import_load_no_torch(entropylens):
    done = entropylens("--help")
    assert done.returncode == 0
    for command in ("analyze", "recommend", "doctor"):
        assert command in done.stdout
    code = "import entropylens.cli, sys; assert not {'torch', 'pandas'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_from_responses(entropylens, model_directory, good, tmp_path):
    run = tmp_path / "run"
    done = entropylens("analyze", model_directory, "--responses", good, "-o", run)
    assert done.returncode == 0, done.stderr
    for text in ("stage", "Train first (raw reading)", "paper's literal rule"):
        assert text in " ".join(done.stdout.split())
    assert "MB above the model" in done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "│" in line)

    again = entropylens("analyze", model_directory, "--responses", good, "-o", run, "--json")
    assert "finished already" in again.stderr
    assert json.loads(again.stdout) == json.loads((run / "analysis.json").read_text())

    said = entropylens("recommend", run, "--json")
    assert json.loads(said.stdout)["layer"] == json.loads(again.stdout)["recommendation"]["layer"]
    paper = entropylens("recommend", run, "--rule", "paper")
    assert paper.returncode == 0
    assert_one_line(entropylens("recommend", run, "--reading", "normed"), "no reading 'normed'")
    assert_one_line(
        entropylens("analyze", model_directory, "--responses", good, "-o", run, "--seed", "7"),
        "other settings", "--force",
    )  # fmt: skip
    forced = entropylens(
        "analyze", model_directory, "--responses", good, "-o", run, "--seed", "7", "--force"
    )
    assert forced.returncode == 0


def test_bad_lines_are_skipped_and_counted(entropylens, model_directory, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\nnot json\n")
    arguments = ("analyze", model_directory, "--responses", path, "-o", tmp_path / "run")
    assert_one_line(entropylens(*arguments), "mixed.jsonl, line 3", "--skip-bad")
    assert not (tmp_path / "run").exists()
    done = entropylens(*arguments, "--skip-bad", "--json")
    assert json.loads(done.stdout)["skipped"] == 1


def test_models_that_cannot_be_read(entropylens, model_directory, good, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model_directory / "config.json", bare)
    torn = shutil.copytree(model_directory, tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    junk = shutil.copytree(model_directory, tmp_path / "junk")
    (junk / "model.safetensors").write_bytes(b"\x00" * 50)
    pickled = shutil.copytree(model_directory, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    half = tmp_path / "half"
    AutoModel.from_config(AutoConfig.from_pretrained(model_directory)).save_pretrained(half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 40)
    broken_config = tmp_path / "broken"
    broken_config.mkdir()
    (broken_config / "config.json").write_text("{")
    shutil.copy(model_directory / "model.safetensors", broken_config)
    bert = tmp_path / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    AutoModel.from_config(
        AutoConfig.for_model("bert", intermediate_size=16, **sizes)
    ).save_pretrained(bert)
    opt = tmp_path / "opt"
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "opt", ffn_dim=16, word_embed_proj_dim=16, do_layer_norm_before=False, **sizes
        )
    ).save_pretrained(opt)
    scaled = shutil.copytree(model_directory, tmp_path / "nan")
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(scaled)

    for model_path, says in [
        (tmp_path / "nowhere", "does not exist"),
        (empty, "config.json is missing"),
        (bare, "model.safetensors is missing"),
        (torn, "truncated or corrupt"),
        (junk, "truncated or corrupt"),
        (pickled, "pickled weights only"),
        (half, "do not fit its configuration"),
        (gguf, "truncated or corrupt"),
        (broken_config, "cannot be loaded"),
        (bert, "no decoder-only language model"),
        (opt, "no additive residual stream"),
        (scaled, "layer 2"),
    ]:
        done = entropylens("analyze", model_path, "--responses", good, "-o", tmp_path / "run")
        assert_one_line(done, says)
        assert not (tmp_path / "run").exists()


def test_a_name_that_is_nowhere(entropylens, tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = entropylens("analyze", "nobody/no-such-model", "-o", tmp_path / "run", env=environment)
    assert_one_line(done, "'nobody/no-such-model'", "Hub cannot be reached")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--device", "warp"), "device 'warp'"),
        (("--dtype", "int3"), "no dtype 'int3'"),
        (("--batch-tokens", "0"), "batch_tokens is 0"),
        (("--dataset", "bundled"), "not both"),
        (("--temperature", "0.5"), "not both"),
    ],
)
def test_settings_that_cannot_be_used(
    entropylens, model_directory, good, tmp_path, arguments, says
):
    done = entropylens(
        "analyze", model_directory, "--responses", good, "-o", tmp_path / "run", *arguments
    )
    assert_one_line(done, says)


def test_a_traceback_only_with_debug(entropylens):
    done = entropylens("analyze", "./nowhere", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_full_disk_leaves_what_was_there(entropylens, model_directory, good, tmp_path):
    """A limit on file sizes stands in for a disk without space."""

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))

    run = tmp_path / "run"
    done = entropylens(
        "analyze", model_directory, "--responses", good, "-o", run,
        preexec_fn=small_files, env={"PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert_one_line(done, "cannot write", "choose another directory")
    assert entropylens("analyze", model_directory, "--responses", good, "-o", run).returncode == 0


def test_generation_with_a_local_dataset(entropylens, model_directory, tmp_path):
    sums = tmp_path / "sums.jsonl"
    sums.write_text('{"problem": "1+1"}\n{"problem": "2+2"}\n')
    done = entropylens(
        "analyze", model_directory, "--dataset", sums, "--dataset", "bundled", "--num-prompts",
        "2", "--samples", "2", "--max-new-tokens", "5", "--template", "plain", "-o",
        tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["num_responses"] == 8
    assert set(content["tasks"]) == {"sums", "bundled"}
    # The answers can be given back as responses.
    again = entropylens(
        "analyze", model_directory, "--responses", tmp_path / "run" / "completions.jsonl",
        "-o", tmp_path / "again", "--json",
    )  # fmt: skip
    assert json.loads(again.stdout)["policy_nll"] == pytest.approx(content["policy_nll"], rel=1e-5)


def test_doctor(entropylens, model_directory, tmp_path):
    done = entropylens("doctor")
    assert done.returncode == 0
    for name in ("torch", "transformers", "C++ compiler", "cache", "nnsight", "bundled model"):
        assert name in done.stdout
    done = entropylens("doctor", model_directory)
    assert done.returncode == 0
    assert "LlamaForCausalLM, 4 layers" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.strip()[:2] in "1 2 3 4 "]) >= 4


@pytest.mark.parametrize(
    ("load", "cores", "usable", "threads"),
    [(0.0, 2, 2, 2), (1.4, 2, 2, 1), (9.0, 2, 2, 1), (3.7, 64, 2, 2), (60.0, 64, 16, 4)],
)
def test_busy_cores_are_left_alone(monkeypatch, load, cores, usable, threads):
    from entropylens import doctor

    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(doctor, "usable_cores", lambda: usable)
    assert doctor.free_cores() == threads
