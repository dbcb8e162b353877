"""The real vLLM on a CPU, on the bundled model: `make test-vllm`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import torch  # noqa: E402

from entropylens.completions import Journal  # noqa: E402
from entropylens.engines import open_engine  # noqa: E402
from entropylens.engines.vllm import VLLMEngine  # noqa: E402
from entropylens.generation import fill, generate  # noqa: E402
from entropylens.problems import load_problems  # noqa: E402
from entropylens.prompts import Prompt, encode_problems  # noqa: E402
from entropylens.sampling import Sampling  # noqa: E402

PROBLEMS, SAMPLES, TOKENS = 8, 4, 48


@pytest.fixture(scope="module")
def engine(bundled_model):
    engine = VLLMEngine(str(bundled_model))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts(engine):
    problems = load_problems("bundled").head(PROBLEMS)
    return encode_problems(problems, engine.tokenizer, engine.limits)


#: Few at a time, so that answers end one after the other.
PROGRAM = "import entropylens.engines.vllm as v, entropylens.cli as c; v.IN_FLIGHT = 2; c.app()"


def command(model, output, *more):
    return [
        *(sys.executable, "-c", PROGRAM, "generate", str(model)),
        *("--benchmark", "bundled", "--num-problems", str(PROBLEMS), "-n", str(SAMPLES)),
        *("--max-new-tokens", str(TOKENS), "--engine", "vllm", "-o", str(output), *more),
    ]


def test_auto_takes_vllm(bundled_model, engine):
    found = open_engine(bundled_model)
    assert isinstance(found, VLLMEngine)
    assert found.fingerprint == engine.fingerprint
    assert found.settings == {"engine": "vllm", "dtype": engine.settings["dtype"]}


def test_a_killed_run_keeps_its_answers_and_goes_on(bundled_model, tmp_path):
    file = tmp_path / "run" / "completions.jsonl"
    process = subprocess.Popen(command(bundled_model, tmp_path / "run"), start_new_session=True)
    while process.poll() is None and not (file.is_file() and file.read_bytes().count(b"\n") > 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    with file.open("ab") as torn:
        torn.write(b'{"benchmark": "bund')
    kept = file.read_bytes().rpartition(b"\n")[0] + b"\n"
    assert 0 < kept.count(b"\n") < PROBLEMS * SAMPLES
    subprocess.run(command(bundled_model, tmp_path / "run"), check=True)
    whole = file.read_bytes()
    assert whole.startswith(kept)
    keys = [(it["problem"], it["sample"]) for it in map(json.loads, whole.splitlines())]
    assert sorted(keys) == [(p, s) for p in range(PROBLEMS) for s in range(SAMPLES)]
    done = subprocess.run(
        command(bundled_model, tmp_path / "run"), check=True, capture_output=True, text=True
    )
    assert file.read_bytes() == whole
    assert "answering" not in done.stderr


def test_answers_are_what_the_settings_say(engine, prompts, tmp_path):
    journal = Journal(tmp_path / "c.jsonl", engine, prompts, Sampling(SAMPLES, TOKENS))
    fill(journal, progress=False)
    found = list(journal.completions())
    assert len(found) == PROBLEMS * SAMPLES
    assert len({one.response_ids for one in found}) > PROBLEMS * SAMPLES // 2
    for one in found:
        assert len(one.response_ids) == TOKENS or not one.truncated
        assert one.truncated == (one.response_ids[-1] not in engine.ends)
        assert not engine.ends & set(one.response_ids[:-1])
    line = json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])
    assert line["sampling"]["engine"] == "vllm"


def test_greedy_answers_are_those_of_hugging_face(engine, prompts):
    """In float32 both take the same tokens: the prompt, the end tokens and the model agree."""
    assert engine.settings["dtype"] == "float32"
    hf_engine = open_engine(engine.name, engine="hf")
    assert engine.ends == hf_engine.ends
    assert engine.limits == hf_engine.limits
    greedy = Sampling(1, 24, temperature=0)
    mine, theirs = (generate(it, prompts[:4], greedy, progress=False) for it in (engine, hf_engine))
    agree = sum(a == b for a, b in zip(mine, theirs, strict=True))
    assert agree >= 3  # near ties may fall differently


def test_tokens_are_drawn_from_the_models_own_distribution(engine):
    """The first token of many samples to one prompt, by chi-square."""
    hf_engine = open_engine(engine.name, engine="hf")
    ids = tuple(hf_engine.tokenizer.encode("The answer is"))
    draws = 600
    found = generate(engine, [Prompt(ids, "t", None)], Sampling(draws, 1), progress=False)
    with torch.no_grad():
        probs = torch.softmax(hf_engine.model(torch.tensor([ids])).logits[0, -1], -1).numpy()
    counts = torch.bincount(
        torch.tensor([one.response_ids[0] for one in found]), minlength=len(probs)
    ).numpy()
    likely = probs * draws > 5
    expected = probs[likely] * draws
    assert likely.sum() > 5
    assert ((counts[likely] - expected) ** 2 / expected).sum() < 2.5 * likely.sum()
