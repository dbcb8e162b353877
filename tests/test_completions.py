"""A journal is resumed, mixes nothing, and mends what a killed run tore."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONTEXT, VOCAB, tiny_model, tiny_tokenizer

from entropylens.completions import Journal
from entropylens.engines.hf import HFEngine
from entropylens.errors import OutputDirectoryError
from entropylens.generation import fill
from entropylens.prompts import Prompt
from entropylens.responses import Limits, read_responses
from entropylens.sampling import Sampling

PROMPTS = [Prompt((5, 6), "a", "2", 0), Prompt((7,), "a", "4", 1), Prompt((5, 6), "b", "2", 0)]
SAMPLING = Sampling(3, 6)


@pytest.fixture(scope="module")
def engine():
    model = tiny_model("llama", torch.float64)
    return HFEngine(model, tiny_tokenizer(), "tiny", Limits(VOCAB, CONTEXT))


@pytest.fixture(scope="module")
def content(engine, tmp_path_factory):
    """A finished journal's bytes."""
    path = tmp_path_factory.mktemp("journal") / "completions.jsonl"
    fill(Journal(path, engine, PROMPTS, SAMPLING), progress=False)
    return path.read_bytes()


def told(journal):
    return {one.job: one for one in journal.completions()}


def test_a_line_tells_all_that_it_depends_on(engine, content):
    lines = [json.loads(line) for line in content.splitlines()]
    assert {(it["benchmark"], it["problem"], it["sample"]) for it in lines} == {
        (prompt.task, prompt.index, sample) for prompt in PROMPTS for sample in range(3)
    }
    for line in lines:
        assert line["model"] == engine.fingerprint
        assert line["sampling"] == {
            "max_new_tokens": 6, "temperature": 1.0, "seed": 0, "top_p": 1.0, "top_k": 0,
            "repetition_penalty": 1.0, "engine": "hf", "dtype": "float64",
        }  # fmt: skip
        assert line["truncated"] == (line["response_ids"][-1] != 1)
        assert "</s>" not in line["text"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_torn_run_ends_at_the_same_answers(engine, content, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("torn") / "completions.jsonl"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    kept = [line for line in path.read_bytes().split(b"\n")[:-1] if line]
    journal = Journal(path, engine, PROMPTS, SAMPLING)
    fill(journal, progress=False)
    lines = path.read_bytes().splitlines()
    assert lines[: len(kept)] == kept  # finished ones stay, byte by byte
    assert sorted(lines) == sorted(content.splitlines())


def test_finished_answers_are_not_repeated(engine, content, tmp_path, monkeypatch):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(content)
    monkeypatch.setattr(engine.model, "generate", None)
    fill(Journal(path, engine, PROMPTS, SAMPLING), progress=False)
    assert path.read_bytes() == content


def test_more_samples_go_on_from_fewer(engine, content, tmp_path):
    path = tmp_path / "completions.jsonl"
    fill(Journal(path, engine, PROMPTS, Sampling(1, 6)), progress=False)
    assert len(path.read_bytes().splitlines()) == 3
    fill(Journal(path, engine, PROMPTS, SAMPLING), progress=False)
    assert sorted(path.read_bytes().splitlines()) == sorted(content.splitlines())
    fewer = told(Journal(path, engine, PROMPTS, Sampling(2, 6)))
    assert set(fewer) == {(p, s) for p in range(3) for s in range(2)}


@pytest.mark.parametrize(
    "other", [Sampling(3, 7), Sampling(3, 6, 0.5), Sampling(3, 6, seed=1), Sampling(3, 6, top_k=3)]
)
def test_other_settings_never_mix_in(engine, content, tmp_path, other):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(content)
    journal = Journal(path, engine, PROMPTS, other)
    assert told(journal) == {}
    fill(journal, progress=False)
    assert len(told(journal)) == 9
    assert path.read_bytes().startswith(content)
    mine = told(Journal(path, engine, PROMPTS, SAMPLING))
    assert len(mine) == 9


def test_other_prompts_never_mix_in(engine, content, tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(content)
    changed = [Prompt((9, 9), "a", "2", 0), *PROMPTS[1:]]
    assert {job[0] for job in told(Journal(path, engine, changed, SAMPLING))} == {1, 2}


def test_answers_of_another_model_are_refused(content, tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(content)
    other = HFEngine(tiny_model("qwen3"), tiny_tokenizer(), "x", Limits(VOCAB, CONTEXT))
    with pytest.raises(OutputDirectoryError, match=r"of another model \(tiny\).*--force"):
        fill(Journal(path, other, PROMPTS, SAMPLING), progress=False)


@pytest.mark.parametrize("line", ["no JSON", '"model": 3}', '"model": "x"}', "}"])
def test_a_damaged_file_is_told(engine, content, tmp_path, line):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(b'{"benchmark": "a", ' + line.encode() + b"\n" + content)
    with pytest.raises(OutputDirectoryError, match="is damaged"):
        fill(Journal(path, engine, PROMPTS, SAMPLING), progress=False)


def test_analyze_reads_the_same_file(engine, content, tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(content)
    found = read_responses(path, None, engine.limits).items
    assert {(one.task, one.prompt_ids) for one in found} == {(p.task, p.ids) for p in PROMPTS}
