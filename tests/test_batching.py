import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

import entropylens
from entropylens.batching import FORWARD_FACTOR, plan
from entropylens.responses import Response

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=30)


@given(lengths=lengths, batch_tokens=st.integers(1, 80))
def test_a_plan_holds_every_response_once_within_the_limit(lengths, batch_tokens):
    responses = [Response((0,) * prompt, (0,) * response) for prompt, response in lengths]
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
