import numpy as np
import pytest
import torch

from entropylens.control import NormControl
from entropylens.policy import EAGER, Unembedding, entropy_float64


@pytest.fixture(scope="module")
def unembedding():
    generator = torch.Generator().manual_seed(7)
    return Unembedding(
        torch.randn(800, 48, generator=generator), torch.randn(800, generator=generator)
    )


def drawn_entropy(unembedding, rms, draws=4000):
    """The control written out: entropies of Gaussian vectors of this RMS, and their error."""
    vectors = torch.randn(draws, 48, generator=torch.Generator().manual_seed(11))
    vectors = vectors / vectors.norm(dim=-1, keepdim=True) * rms * 48**0.5
    entropies = entropy_float64(vectors, unembedding)
    return float(entropies.mean()), float(entropies.std())


@pytest.mark.parametrize("rms", [1e-4, 0.03, 0.1, 0.3, 1.0, 3.0, 100.0])
def test_the_curve_is_the_mean_over_random_vectors(unembedding, rms):
    control = NormControl(unembedding, EAGER)
    expected, spread = drawn_entropy(unembedding, rms)
    found = control.entropy(torch.full((1, 1), rms, dtype=torch.float64))[0, 0]
    assert found == pytest.approx(expected, abs=5 * spread / np.sqrt(256) + 5e-3)


def test_deltas_are_differences_of_the_curve(unembedding):
    control = NormControl(unembedding, EAGER)
    rms = {
        "rms_attn": torch.tensor([[0.3, 0.1]]),
        "rms_attn_in": torch.tensor([[0.1, 0.1]]),
        "rms_ffn": torch.tensor([[0.0, 1e9]]),
        "rms_ffn_in": torch.tensor([[0.0, 1.0]]),
    }
    deltas = control.deltas(rms)
    assert deltas["control_delta_attn"][0, 0] < -0.1
    assert deltas["control_delta_attn"][0, 1] == 0
    assert deltas["control_delta_ffn"][0, 0] == 0
    assert torch.isfinite(deltas["control_delta_ffn"]).all()


def test_what_was_asked_before_changes_nothing(unembedding):
    asked = torch.tensor([[0.5, 0.7, 2.0]], dtype=torch.float64)
    fresh = NormControl(unembedding, EAGER).entropy(asked)
    used = NormControl(unembedding, EAGER)
    for rms in (1e-7, 0.6, 1e9, 30.0):
        used.entropy(torch.full((1, 1), rms, dtype=torch.float64))
    np.testing.assert_array_equal(used.entropy(asked), fresh)
