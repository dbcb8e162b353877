"""What must hold for all inputs: how responses are laid out never changes a result."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import EVERY_FAMILY, tiny_model

import entropylens
from entropylens import Analysis
from entropylens.capture import capture
from entropylens.quantities import quantities_of
from entropylens.recognition import anatomy_of
from entropylens.responses import Response

#: Serial and parallel, learnt and rotary positions, post-norms with soft caps, experts.
SOME = ("llama", "gpt2", "gptj", "gemma2", "qwen3_moe")
_MODELS = {}


def a_model(name):
    if name not in _MODELS:
        _MODELS[name] = tiny_model(name, torch.float64)
    return _MODELS[name]


ids = st.integers(0, 95)
response = st.builds(
    lambda prompt, answer: Response(tuple(prompt), tuple(answer)),
    st.lists(ids, min_size=1, max_size=9),
    st.lists(ids, min_size=1, max_size=12),
)


def assert_same_rows(found, expected):
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected, atol=1e-6, rtol=1e-6)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(SOME),
    items=st.lists(response, min_size=1, max_size=6),
    batch_tokens=st.integers(1, 40),
    data=st.data(),
)
def test_batch_size_and_order_change_nothing(name, items, batch_tokens, data):
    model = a_model(name)
    whole = entropylens.analyze(model, items, reading="both", progress=False).responses
    order = data.draw(st.permutations(range(len(items))))
    mixed = entropylens.analyze(
        model, [items[index] for index in order], reading="both", batch_tokens=batch_tokens,
        progress=False,
    ).responses  # fmt: skip
    back = mixed.assign(response_id=mixed["response_id"].map(dict(enumerate(order))))
    assert_same_rows(back.sort_values(["response_id", "layer"]), whole)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(items=st.lists(response, min_size=2, max_size=6), data=st.data())
def test_merging_is_analyzing_all(items, data):
    cut = data.draw(st.integers(1, len(items) - 1))
    options = {"keep_tokens": ["nll_layer"], "progress": False}
    model = a_model("llama")
    whole = entropylens.analyze(model, items, **options)
    parts = [entropylens.analyze(model, part, **options) for part in (items[:cut], items[cut:])]
    merged = Analysis.merge(parts)
    assert_same_rows(merged.responses, whole.responses)
    assert_same_rows(merged.tokens, whole.tokens)
    pd.testing.assert_frame_equal(merged.layers, whole.layers, atol=1e-7)
    assert merged.num_prompts == whole.num_prompts


def test_merging_what_was_merged_keeps_tokens_with_their_responses(responses):
    """Only the first responses have tokens by default, so their numbers have gaps."""
    items = [*responses, *responses[::-1]]
    model = tiny_model("llama", torch.float64)
    parts = [entropylens.analyze(model, items[at : at + 4], progress=False) for at in (0, 4, 8)]
    nested = Analysis.merge([Analysis.merge(parts[:2]), parts[2]])
    flat = Analysis.merge(parts)
    for merged in (nested, flat):
        means = merged.responses.set_index(["response_id", "layer"])
        for (response, layer), rows in merged.tokens.groupby(["response_id", "layer"]):
            own = means.loc[(response, layer)]
            assert len(rows) == own["num_tokens"]
            assert rows["entropy_layer"].mean() == pytest.approx(own["entropy_layer"], abs=1e-6)
        assert sorted(merged.tokens["response_id"].unique()) == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_only_alike_analyses_merge(responses):
    one = entropylens.analyze(a_model("llama"), responses, progress=False)
    other = entropylens.analyze(a_model("llama"), responses, reading="both", progress=False)
    with pytest.raises(entropylens.EntropyLensError, match="different reading"):
        Analysis.merge([one, other])
    with pytest.raises(entropylens.EntropyLensError, match="nothing to merge"):
        Analysis.merge([])


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_padding_changes_nothing(name, side):
    anatomy = anatomy_of(a_model(name))
    sequence = torch.tensor([[5, 17, 3, 60, 22, 9]])
    plain, _ = capture(anatomy, torch.arange(6), sequence, use_cache=False)
    padded = torch.full((2, 10), 7)
    mask = torch.zeros_like(padded)
    padded[1] = torch.arange(10)
    mask[1] = 1
    start = 4 if side == "left" else 0
    padded[0, start : start + 6], mask[0, start : start + 6] = sequence[0], 1
    place = (mask.cumsum(1) - 1).clamp_min(0)
    found, _ = capture(
        anatomy, torch.arange(start, start + 6), padded, attention_mask=mask, position_ids=place,
        use_cache=False,
    )  # fmt: skip
    for site in ("embedding", "attn_in", "attn_out", "ffn_in", "ffn_out", "stream_out", "final"):
        torch.testing.assert_close(getattr(found, site), getattr(plain, site))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "cohere"])
def test_the_attention_implementation_changes_nothing(name, responses):
    model = tiny_model(name, torch.float64)
    found = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        layers = entropylens.analyze(model, responses, progress=False).layers
        found[implementation] = layers[[*quantities_of("raw")]]
    capped = name == "gemma2"  # sdpa leaves the cap on attention scores out
    pd.testing.assert_frame_equal(
        found["sdpa"], found["eager"], atol=5e-2 if capped else 1e-6, rtol=1e-2 if capped else 1e-6
    )


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_long_response_in_pieces_is_the_whole_one(name):
    """Over the key-value cache, or whole where a family has none that continues."""
    model = tiny_model(name, torch.float64)
    generator = torch.Generator().manual_seed(1)
    ids = tuple(torch.randint(0, 95, (45,), generator=generator).tolist())
    long = [Response(ids[:4], ids[4:])]
    whole = entropylens.analyze(model, long, reading="both", progress=False).layers
    pieces = entropylens.analyze(model, long, reading="both", batch_tokens=7, progress=False).layers
    names = [*quantities_of("both")]
    np.testing.assert_allclose(pieces[names], whole[names], atol=1e-4, rtol=1e-5)


#: Largest error (nats) of entropies and changes that each type's states may bring here.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_error_of_half_precision_is_known(name, dtype, bound, responses, record_property):
    names = [it for it in quantities_of("both") if "entropy" in it or "delta" in it]
    rounded = tiny_model(name, dtype)
    exact = tiny_model(name)
    exact.load_state_dict({key: it.float() for key, it in rounded.state_dict().items()})
    half = entropylens.analyze(rounded, responses, reading="both", progress=False).layers[names]
    full = entropylens.analyze(exact, responses, reading="both", progress=False).layers[names]
    error = (half - full).abs().to_numpy().max()
    record_property("largest error in nats", error)
    assert 1e-5 < error < bound
