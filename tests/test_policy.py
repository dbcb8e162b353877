import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropylens.kernels.compiled import select_body
from entropylens.policy import (
    EAGER,
    Unembedding,
    entropy,
    entropy_float64,
    policy_head,
)
from entropylens.transform import OutputTransform


def make_unembedding(seed, vocab, d_model, bias=False, transform=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, d_model, generator=generator, dtype=torch.float64)
    shift = torch.randn(vocab, generator=generator, dtype=torch.float64) if bias else None
    return Unembedding(
        weight.to(dtype), None if shift is None else shift.to(dtype), transform or OutputTransform()
    )


def make_states(seed, positions, d_model, scale, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 1)
    return (torch.randn(positions, d_model, generator=generator) * scale).to(dtype)


bodies = pytest.mark.parametrize("kernel", ["eager", "compiled"])


@pytest.fixture
def body(kernel):
    found = select_body(kernel, torch.device("cpu"), math.inf)
    assert found.name == kernel
    return found


@bodies
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_entropy_is_the_oracles(body, bias, scale, softcap):
    unembedding = make_unembedding(0, 5003, 24, bias, OutputTransform(scale, softcap))
    for size in (0.01, 1.0, 30.0):
        states = make_states(1, 17, 24, size)
        found = entropy(states, unembedding, body)
        torch.testing.assert_close(
            found, entropy_float64(states, unembedding), atol=2e-5, rtol=0, check_dtype=False
        )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(2, 300),
    d_model=st.integers(1, 20),
    positions=st.integers(1, 9),
    tile=st.integers(1, 301),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_entropy_does_not_depend_on_the_tile(seed, vocab, d_model, positions, tile, scale):
    unembedding = make_unembedding(seed, vocab, d_model, dtype=torch.float64)
    states = make_states(seed, positions, d_model, scale, torch.float64)
    found = entropy(states, unembedding, EAGER, tile)
    torch.testing.assert_close(found, entropy_float64(states, unembedding), atol=1e-9, rtol=1e-9)
    assert (found >= -1e-12).all()
    assert (found <= math.log(vocab) + 1e-9).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(8)))
def test_entropy_follows_the_order_of_positions(seed, order):
    unembedding = make_unembedding(seed, 50, 6)
    states = make_states(seed, 8, 6, 3.0)
    torch.testing.assert_close(
        entropy(states[list(order)], unembedding), entropy(states, unembedding)[list(order)]
    )


@bodies
@pytest.mark.parametrize("shift", [0.0, 1e2, 1e3, 1e4])
def test_a_common_shift_of_all_logits_does_not_cancel(body, shift):
    # lse - sum(p l) would be off by up to 7e-2 here.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6000, 16, generator=generator)
    weight = torch.cat([weight, torch.ones(6000, 1)], dim=1)
    states = torch.cat([torch.randn(5, 16, generator=generator), torch.full((5, 1), shift)], dim=1)
    # The oracle sees the logits as float32 rounds them: their own error is not the kernel's.
    logits = (states @ weight.T).double()
    log_probs = torch.log_softmax(logits, -1)
    expected = -(log_probs.exp() * log_probs).sum(-1)
    found = entropy(states, Unembedding(weight), body)
    torch.testing.assert_close(found, expected, atol=2e-3 if shift == 1e4 else 3e-4, rtol=0)


def test_one_hot_and_uniform_policies_have_the_exact_limits():
    unembedding = Unembedding(torch.eye(7))
    assert entropy(torch.zeros(1, 7), unembedding).item() == pytest.approx(math.log(7), abs=1e-12)
    assert entropy(torch.eye(7)[:1] * 1e5, unembedding).item() == pytest.approx(0.0, abs=1e-12)


def test_half_precision_inputs_are_computed_in_float32():
    unembedding = make_unembedding(4, 3000, 32, dtype=torch.bfloat16)
    states = make_states(4, 6, 32, 0.5, torch.bfloat16)
    torch.testing.assert_close(
        entropy(states, unembedding), entropy_float64(states, unembedding), atol=1e-5, rtol=0
    )


@bodies
def test_the_models_own_policy(body):
    unembedding = make_unembedding(2, 5003, 24, True, OutputTransform(0.5, 20.0))
    states = make_states(2, 11, 24, 2.0)
    tokens = torch.arange(11) * 450
    head = policy_head(states, unembedding, tokens, body)
    logits = states.double() @ unembedding.weight.double().T + unembedding.bias.double()
    log_probs = torch.log_softmax(20.0 * torch.tanh(0.5 * logits / 20.0), -1)
    close = {"atol": 2e-5, "rtol": 0, "check_dtype": False}
    torch.testing.assert_close(head.nll, -log_probs[range(11), tokens], **close)
    torch.testing.assert_close(head.entropy, entropy_float64(states, unembedding), **close)
    assert head.top.tolist() == log_probs.argmax(-1).tolist()
