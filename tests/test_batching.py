from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EVERY_FAMILY, tiny_model

import entropylens
from entropylens import batching
from entropylens.batching import FORWARD_FACTOR, WORTH_SHARING, pieces, plan
from entropylens.recognition import anatomy_of
from entropylens.responses import Response


@contextmanager
def worth_sharing(positions):
    """Share a prompt where that saves so many positions."""
    before = batching.WORTH_SHARING
    batching.WORTH_SHARING = positions
    try:
        yield
    finally:
        batching.WORTH_SHARING = before


_models = {}
lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=30)


@given(lengths=lengths, batch_tokens=st.integers(1, 80), worth=st.sampled_from([1, 20, 10**9]))
def test_a_plan_holds_every_response_once_within_the_limit(lengths, batch_tokens, worth):
    responses = [Response((0,) * prompt, (0,) * response) for prompt, response in lengths]
    with worth_sharing(worth):
        groups = plan(responses, batch_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(responses)))
    for group in groups:
        if len(group) > 1:
            assert sum(responses[index].num_tokens for index in group) <= batch_tokens
            width = max(responses[index].length for index in group)
            assert len(group) * width <= FORWARD_FACTOR * batch_tokens


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 3, 7, 30])
def test_batching_padding_and_walking_change_nothing(family, batch_tokens, responses):
    model = tiny_model(family, dtype=torch.float64)
    whole = entropylens.analyze(model, responses, reading="both", progress=False)
    cut = entropylens.analyze(
        model, responses, reading="both", batch_tokens=batch_tokens, progress=False
    )
    for name in whole.responses.columns:
        if name in ("task", "prompt_id", "problem_key", "response_key"):
            assert (cut.responses[name] == whole.responses[name]).all()
        else:
            np.testing.assert_allclose(cut.responses[name], whole.responses[name], atol=1e-9)


def test_order_changes_nothing(responses):
    model = tiny_model("llama", dtype=torch.float64)
    order = [4, 0, 5, 2, 1, 3]
    straight = entropylens.analyze(model, responses, progress=False)
    shuffled = entropylens.analyze(model, [responses[index] for index in order], progress=False)
    left, right = straight.layers, shuffled.layers
    for name in left.columns.drop("mixer"):
        np.testing.assert_allclose(right[name], left[name], atol=1e-9, err_msg=name)
    assert shuffled.recommendation.stability == pytest.approx(straight.recommendation.stability)


def samples(counts, seed=0):
    """Responses of different lengths, so many to each of some prompts."""
    generator = np.random.default_rng(seed)

    def ids(count):
        return tuple(generator.integers(0, 96, count).tolist())

    found = []
    for count in counts:
        prompt = ids(generator.integers(2, 14))
        found += [Response(prompt, ids(generator.integers(1, 12))) for _ in range(count)]
    return found


def seen_by(model):
    """The widths of all that the model's embedding reads, as they come."""
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _output: seen.append(tuple(args[0].shape))
    )
    return seen


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_prompt_that_is_read_once_gives_the_same_states(family):
    """Windows shorter than the prompt, learnt and relative positions, experts: all that continues;
    the others read every prompt."""
    model = tiny_model(family, torch.float64)
    anatomy, items = anatomy_of(model), samples([4])
    with worth_sharing(10**9):
        (whole,) = pieces(anatomy, items, range(4), 512)
    seen = seen_by(model)
    with worth_sharing(1):
        (shared,) = pieces(anatomy, items, range(4), 512)
    assert (len(seen) == 2) == anatomy.continues
    assert shared.tokens.equal(whole.tokens)
    assert shared.owner.equal(whole.owner)
    for name in ("embedding", "attn_in", "attn_out", "ffn_in", "ffn_out", "stream_out", "final"):
        torch.testing.assert_close(
            getattr(shared.states, name), getattr(whole.states, name), rtol=1e-5, atol=1e-6
        )


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    batch_tokens=st.integers(1, 60),
    seed=st.integers(0, 9),
)
def test_sharing_prompts_changes_nothing(counts, batch_tokens, seed):
    model = _models.setdefault("llama", tiny_model("llama", torch.float64))
    items = samples(counts, seed)
    with worth_sharing(10**9):
        whole = entropylens.analyze(model, items, progress=False).responses
    with worth_sharing(1):
        shared = entropylens.analyze(
            model, items, batch_tokens=batch_tokens, progress=False
        ).responses
    pd.testing.assert_frame_equal(shared, whole, atol=1e-9, rtol=1e-9)


def test_a_prompt_is_read_once_for_its_samples():
    model = tiny_model("llama")
    prompt = tuple(range(WORTH_SHARING // 4 + 1))
    items = [Response(prompt, (1, 2, 3)) for _ in range(5)]
    anatomy, seen = anatomy_of(model), seen_by(model)
    (group,) = plan(items, 512)
    (piece,) = pieces(anatomy, items, group, 512)
    assert seen == [(1, len(prompt) - 1), (5, 3)]
    assert len(piece.tokens) == 15


def test_a_prompt_that_saves_too_little_is_read_with_each_answer():
    model = tiny_model("llama")
    items = [Response((1, 2, 3), (4, 5)) for _ in range(4)]
    anatomy, seen = anatomy_of(model), seen_by(model)
    list(pieces(anatomy, items, range(4), 512))
    assert seen == [(4, 4)]
