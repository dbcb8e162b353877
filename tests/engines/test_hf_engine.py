"""Draws against a plain computation, and what never changes a sample."""

import numpy as np
import pytest
import torch
from tiny import CONTEXT, VOCAB, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from entropylens.engines.hf import HFEngine, keyed_draws, left_padded
from entropylens.errors import SettingError
from entropylens.generation import generate
from entropylens.prompts import Prompt
from entropylens.responses import Limits
from entropylens.sampling import Sampling, suggested

PROMPTS = [
    Prompt(ids, "t", None, index)
    for index, ids in enumerate(((5, 6, 7), (8,), (9, 10), (11, 12, 13, 14, 15), (8, 8)))
]


def engine_of(model):
    return HFEngine(model, tiny_tokenizer(), "tiny", Limits(VOCAB, CONTEXT))


@pytest.fixture(scope="module")
def engine():
    return engine_of(tiny_model("llama", torch.float64))


def allowed(logits, ids, sampling):
    """Probabilities after penalty, temperature, top-k and top-p, in numpy."""
    logits = logits.copy()
    for token in set(ids):
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    logits = logits / sampling.temperature
    order = np.argsort(-logits, kind="stable")
    probs = np.exp(logits - logits.max())
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]  # held by the likelier ones
    probs[order[before >= sampling.top_p]] = 0
    return probs / probs.sum()


def assert_drawn(engine, response, sample, sampling):
    """Each token is drawn from what the whole sequence before it gives, read at once."""
    ids = list(response.prompt_ids)
    draws = keyed_draws((sampling.seed, sample), ids, sampling.max_new_tokens)
    for token, draw in zip(response.response_ids, draws, strict=False):
        with torch.no_grad():
            logits = engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1].numpy()
        cumulative = np.cumsum(allowed(logits, ids, sampling))
        assert token == np.searchsorted(cumulative, draw * cumulative[-1], side="right")
        ids.append(token)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 7},
        {"top_p": 0.6},
        {"repetition_penalty": 3.0},
        {"temperature": 0.5, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3},
    ],
)
def test_every_token_is_the_one_that_the_settings_draw(engine, settings):
    sampling = Sampling(num_samples=2, max_new_tokens=8, **settings)
    found = generate(engine, PROMPTS, sampling, progress=False)
    places = [(prompt, sample) for prompt in PROMPTS for sample in range(2)]
    for (_, sample), response in zip(places, found, strict=True):
        assert_drawn(engine, response, sample, sampling)


@pytest.mark.parametrize("penalty", [1.0, 4.0])
def test_batching_never_changes_a_sample(engine, penalty, monkeypatch):
    sampling = Sampling(2, 10, repetition_penalty=penalty)
    whole = generate(engine, PROMPTS, sampling, progress=False)
    monkeypatch.setattr(HFEngine, "cache_tokens", 1)
    assert generate(engine, PROMPTS, sampling, progress=False) == whole


def test_longrope_answers_do_not_depend_on_the_batch():
    """Beyond 140 positions the longest of a batch decides which factors turn all of it, and what
    the short factors turned is read anew."""
    model = tiny_model("phi3-longrope", torch.float64)
    engine, sampling = engine_of(model), Sampling(2, 20)
    generator = np.random.default_rng(0)
    prompts = [
        Prompt(tuple(generator.integers(5, 90, length).tolist()), "t", None, index)
        for index, length in enumerate((3, 110, 125, 125, 130, 150))
    ]
    found = generate(engine, prompts, sampling, progress=False)
    assert [it for prompt in prompts for it in generate(engine, [prompt], sampling, progress=False)
            ] == list(found)  # fmt: skip
    assert any(it.length > 141 and len(it.prompt_ids) < 140 for it in found)
    for place, response in enumerate(found):
        assert_drawn(engine, response, place % 2, sampling)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_near_the_context_have_their_own_room(kind):
    engine = engine_of(tiny_model(kind, torch.float64))
    lengths = (CONTEXT - 2, CONTEXT - 5, 3)
    prompts = [Prompt((5 + i,) * length, "t", None, i) for i, length in enumerate(lengths)]
    found = generate(engine, prompts, Sampling(1, 20), progress=False)
    for response, length in zip(found, lengths, strict=True):
        assert response.num_tokens == min(20, CONTEXT - length) or not response.truncated
    alone = generate(engine, prompts[1:2], Sampling(1, 20), progress=False)
    assert alone[0] == found[1]


def test_padding_holds_no_token_that_the_prompt_has_not():
    ids, mask = left_padded([(4, 5, 6), (7,)])
    assert ids.tolist() == [[4, 5, 6], [7, 7, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_what_a_model_suggests():
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    assert suggested(config) | {"repetition_penalty": 1.0} == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "repetition_penalty": 1.0,
    }
    assert suggested(GenerationConfig(do_sample=False)) == {"temperature": 0.0}
    with pytest.raises(SettingError, match=r"min_p=0\.1"):
        suggested(GenerationConfig(do_sample=True, min_p=0.1))


def test_an_engine_opens_what_analyze_opens(model_directory):
    engine = HFEngine.open(str(model_directory))
    assert engine.limits == Limits(VOCAB, CONTEXT)
    assert engine.settings == {"engine": "hf", "dtype": "float32"}
    assert engine.ends == {1}
    assert engine.fingerprint == HFEngine.open(str(model_directory)).fingerprint


def test_a_failed_allocation_names_the_setting(engine, monkeypatch):
    from entropylens.errors import AllocationError

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(engine.model, "generate", fail)
    with pytest.raises(AllocationError, match="--max-new-tokens"):
        generate(engine, PROMPTS, Sampling(1, 5), progress=False)
