from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import EVERY_FAMILY, tiny_model

import entropylens
from entropylens import planning
from entropylens.anatomy import Passes
from entropylens.batching import pieces
from entropylens.capture import capture
from entropylens.planning import FORWARD_FACTOR, WORTH_SHARING, plan, reads_once
from entropylens.recognition import anatomy_of
from entropylens.responses import Response


@contextmanager
def worth_sharing(positions):
    """Share a prompt where that saves so many positions."""
    before = planning.WORTH_SHARING
    planning.WORTH_SHARING = positions
    try:
        yield
    finally:
        planning.WORTH_SHARING = before


_models = {}
SITES = ("embedding", "attn_in", "attn_out", "ffn_in", "ffn_out", "stream_out", "final")
#: Few lengths of prompts, so that some are one prompt's samples.
prompt_lengths = st.sampled_from([1, 6, 18, 40])
answer_lengths = st.integers(1, 9) | st.integers(1, 60)
lengths = st.lists(st.tuples(prompt_lengths, answer_lengths), min_size=1, max_size=30)


@given(
    lengths=lengths,
    batch_tokens=st.integers(1, 80),
    worth=st.sampled_from([1, 20, 10**9]),
    passes=st.builds(Passes, st.booleans(), st.none() | st.integers(0, 60)),
)
@example(lengths=[(40, 1)] * 10, batch_tokens=10, worth=10**9, passes=Passes(continues=True))
def test_a_plan_holds_every_response_once_within_the_limit(lengths, batch_tokens, worth, passes):
    """A prompt that is read once counts by its last position alone, in each row."""
    responses = [Response((0,) * prompt, (0,) * response) for prompt, response in lengths]
    with worth_sharing(worth):
        groups = plan(responses, batch_tokens, passes)
        once = [passes.continues and reads_once(responses, group) for group in groups]
    assert sorted(index for group in groups for index in group) == list(range(len(responses)))
    for group, read_once in zip(groups, once, strict=True):
        if len(group) > 1:
            assert all(passes.takes(responses[index].length) for index in group)
            assert sum(responses[index].num_tokens for index in group) <= batch_tokens
            width = max(responses[index].length for index in group)
            if read_once:
                width -= len(responses[group[0]].prompt_ids) - 1
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
    """Beyond every window and chunk, learnt and relative positions, experts; the prompt in one
    pass or several, the answers too. Models that do not continue read every prompt."""
    model = tiny_model(family, torch.float64)
    anatomy = anatomy_of(model)
    generator = np.random.default_rng(3)
    prompt = tuple(generator.integers(0, 96, 70).tolist())
    items = [Response(prompt, tuple(generator.integers(0, 96, n).tolist())) for n in (9, 20, 1)]
    alone = [
        capture(
            anatomy,
            torch.arange(len(prompt) - 1, it.length),
            torch.tensor([(*it.prompt_ids, *it.response_ids)[:-1]]),
            use_cache=False,
        )[0]
        for it in items
    ]
    seen = seen_by(model)
    # All at once; and 48 positions a pass, fewer than one response has.
    at_once, in_parts = [(1, 69), (3, 20)], [*[(1, 12)] * 5, (1, 9), (1, 9), (1, 20), (1, 1)]
    for batch_tokens, passes in ((512, at_once), (12, in_parts)):
        seen.clear()
        found = list(pieces(anatomy, items, range(3), batch_tokens))
        assert seen == (passes if anatomy.passes.continues else [(3, 89)])
        if not anatomy.passes.continues:
            continue
        owner = torch.cat([it.owner for it in found])
        tokens = torch.cat([it.tokens for it in found])
        for index, it in enumerate(items):
            assert tuple(tokens[owner == index].tolist()) == it.response_ids
            for name in SITES:
                states = torch.cat([getattr(it.states, name) for it in found], dim=-2)
                torch.testing.assert_close(
                    states[..., owner == index, :],
                    getattr(alone[index], name),
                    rtol=1e-5,
                    atol=1e-6,
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
    (group,) = plan(items, 512, anatomy.passes)
    (piece,) = pieces(anatomy, items, group, 512)
    assert seen == [(1, len(prompt) - 1), (5, 3)]
    assert len(piece.tokens) == 15


def test_a_prompt_that_saves_too_little_is_read_with_each_answer():
    model = tiny_model("llama")
    items = [Response((1, 2, 3), (4, 5)) for _ in range(4)]
    anatomy, seen = anatomy_of(model), seen_by(model)
    list(pieces(anatomy, items, range(4), 512))
    assert seen == [(4, 4)]


def test_a_prompt_longer_than_a_pass_is_read_once():
    """Neither a pass nor a cache of several rows holds more than FORWARD_FACTOR * batch_tokens."""
    model = tiny_model("llama", torch.float64)
    prompt = tuple(index % 96 for index in range(100))
    items = [Response(prompt, (1, 2, 3, 4 + index)) for index in range(4)]
    anatomy, seen = anatomy_of(model), seen_by(model)
    (group,) = plan(items, 16, anatomy.passes)
    assert len(list(pieces(anatomy, items, group, 16))) == 4
    assert seen == [*[(1, 16)] * 6, (1, 3), *[(1, 4)] * 4]
    seen.clear()
    (group,) = plan(items, 64, anatomy.passes)
    assert len(list(pieces(anatomy, items, group, 64))) == 2
    assert seen == [(1, 99), (2, 4), (2, 4)]


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", [(1, WORTH_SHARING), (2, 3)] * 3),
        ("mamba", [(6, WORTH_SHARING + 3)]),
    ],
)
def test_only_a_model_that_continues_is_given_a_prompt_at_a_time(family, passes):
    model = tiny_model(family)
    items = [
        Response((prompt,) * (WORTH_SHARING + 1), (1, 2, sample))
        for prompt in range(3)
        for sample in range(2)
    ]
    seen = seen_by(model)
    entropylens.analyze(model, items, progress=False)
    assert seen[-len(passes) :] == passes
    assert (2, 3) not in seen[: -len(passes)]  # what is left is the trial of the model


@pytest.mark.parametrize("batch_tokens", [12, 512])
@pytest.mark.parametrize("prompt_length", [130, 20])
def test_longrope_reads_each_response_at_its_own_frequencies(prompt_length, batch_tokens):
    """Beyond 140 positions all of a pass is turned by the long factors, also its cached part."""
    model = tiny_model("phi3-longrope", torch.float64)
    generator = np.random.default_rng(0)
    prompt = tuple(generator.integers(0, 96, prompt_length).tolist())
    items = [
        Response(prompt, tuple(generator.integers(0, 96, count).tolist()))
        for count in (6, 30, 5, 130, 11, 12)
    ]
    assert len({it.length > 140 for it in items}) == 2
    together = entropylens.analyze(model, items, batch_tokens=batch_tokens, progress=False)
    of_each = together.responses.groupby("response_id")
    for index, item in enumerate(items):
        alone = entropylens.analyze(model, [item], progress=False).responses
        found = of_each.get_group(index).reset_index(drop=True)
        columns = found.columns.drop(["response_id", "task"])
        pd.testing.assert_frame_equal(found[columns], alone[columns], atol=1e-9, rtol=1e-9)


def test_a_hybrid_of_attention_alone_is_read_whole(monkeypatch):
    """Its kind of cache goes on from a recurrent layer, and there is none."""
    family, config = EVERY_FAMILY["jamba"]
    config = config | {"attn_layer_period": 1, "attn_layer_offset": 0}
    monkeypatch.setitem(EVERY_FAMILY, "jamba", (family, config))
    model = tiny_model("jamba", torch.float64)
    items = [Response(tuple(range(90)) + tuple(range(40)), (1, 2, it)) for it in range(5)]
    found = entropylens.analyze(model, items, progress=False)
    assert set(found.layers["mixer"]) == {"attention"}
    assert not anatomy_of(model).passes.continues
