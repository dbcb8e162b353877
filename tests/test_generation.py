import json

import numpy as np
import pytest
import torch
from tiny import CONTEXT, tiny_model, tiny_tokenizer

from entropylens.engines.hf import HFEngine
from entropylens.errors import SettingError
from entropylens.generation import generate
from entropylens.prompts import Prompt
from entropylens.sampling import Sampling
from entropylens.sources import hf

PROMPTS = [
    Prompt(ids, "t", None, index)
    for index, ids in enumerate(((5, 6, 7), (8,), (9, 10), (11, 12, 13, 14, 15), (16,)))
]


@pytest.fixture(scope="module")
def subject():
    return hf.wrap(tiny_model("llama", torch.float64), tiny_tokenizer())


def quiet(subject, prompts, sampling, journal=None):
    return generate(HFEngine.of(subject), prompts, sampling, journal, progress=False)


def test_batching_and_order_never_change_a_sample(subject, monkeypatch):
    sampling = Sampling(num_samples=3, max_new_tokens=12)
    whole = quiet(subject, PROMPTS, sampling)
    assert len(whole) == 15
    monkeypatch.setattr(HFEngine, "cache_tokens", 1)
    assert quiet(subject, PROMPTS, sampling) == whole
    backwards = quiet(subject, PROMPTS[::-1], sampling)
    assert sorted(backwards, key=repr) == sorted(whole, key=repr)


def test_samples_differ_and_follow_the_seed(subject):
    first = quiet(subject, PROMPTS, Sampling(2, 12, seed=1))
    assert first == quiet(subject, PROMPTS, Sampling(2, 12, seed=1))
    assert first != quiet(subject, PROMPTS, Sampling(2, 12, seed=2))
    assert first[0].response_ids != first[1].response_ids


def test_tokens_are_drawn_from_the_models_own_distribution(subject):
    draws = 4000
    found = quiet(subject, [PROMPTS[0]], Sampling(draws, 1))
    with torch.no_grad():
        probs = torch.softmax(subject.model(torch.tensor([[5, 6, 7]])).logits[0, -1], -1).numpy()
    counts = np.bincount([response.response_ids[0] for response in found], minlength=97)
    expected = probs * draws
    chi_square = ((counts - expected) ** 2 / np.maximum(expected, 1e-9))[expected > 5].sum()
    assert chi_square < 2.0 * (expected > 5).sum()


def test_temperature_zero_is_greedy(subject):
    (found,) = quiet(subject, [PROMPTS[0]], Sampling(1, 6, temperature=0))
    ids = list(PROMPTS[0].ids)
    for token in found.response_ids:
        with torch.no_grad():
            assert token == subject.model(torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(token)


def test_an_answer_ends_with_the_end_token_or_is_truncated(subject):
    found = quiet(subject, PROMPTS, Sampling(40, 30))
    ended = [response for response in found if not response.truncated]
    assert ended
    assert len(ended) < len(found)
    for response in found:
        assert (response.response_ids[-1] == 1) == (not response.truncated)
        assert 1 not in response.response_ids[:-1]
        assert len(response.response_ids) == 30 or not response.truncated


def test_the_models_generation_config_plays_no_part(subject):
    sampling = Sampling(1, 8)
    plain = quiet(subject, PROMPTS, sampling)
    config = subject.model.generation_config
    before = config.to_dict()
    config.repetition_penalty, config.top_k, config.temperature = 5.0, 1, 9.0
    try:
        assert quiet(subject, PROMPTS, sampling) == plain
        assert subject.model.generation_config is config
    finally:
        config.repetition_penalty, config.top_k = before["repetition_penalty"], before["top_k"]
        config.temperature = before["temperature"]


def test_an_interrupted_run_resumes_from_its_journal(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(HFEngine, "cache_tokens", 40)
    sampling = Sampling(2, 10)
    journal = tmp_path / "completions.jsonl"
    whole = quiet(subject, PROMPTS, sampling, journal)
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 10
    journal.write_text("".join(lines[:3]) + lines[3][: len(lines[3]) // 2])

    calls = []
    answer = HFEngine._answer
    monkeypatch.setattr(HFEngine, "_answer", lambda *args: calls.append(args[2]) or answer(*args))
    assert quiet(subject, PROMPTS, sampling, journal) == whole
    assert 0 < len(calls) < 5
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert sorted((r["problem"], r["sample"]) for r in records) == [
        (p, s) for p in range(5) for s in range(2)
    ]
    calls.clear()
    assert quiet(subject, PROMPTS, sampling, journal) == whole
    assert calls == []


def test_a_prompt_near_the_context_gets_the_room_that_is_left(subject):
    (found,) = quiet(subject, [Prompt((5,) * (CONTEXT - 2), "t", None)], Sampling(1, 50))
    assert found.num_tokens <= 2


@pytest.mark.parametrize(
    "values", [{"num_samples": 0}, {"max_new_tokens": 0}, {"temperature": -1.0},
               {"temperature": float("nan")}]
)  # fmt: skip
def test_senseless_settings_are_refused(values):
    with pytest.raises(SettingError):
        Sampling(**values)
