"""Both ways to make a product round in the dtype of their operands, and no worse."""

import pytest
import torch

from entropylens import products
from entropylens.products import product


@pytest.fixture(params=["onednn", "plain"])
def _way(request, monkeypatch):
    onednn = request.param == "onednn"
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(products, "_prefers_onednn", lambda: onednn)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 36, 97), (130, 100, 65), (512, 576, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_rounded_in_its_dtype(shape, dtype):
    rows, width, tile = shape
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(tile, width, generator=generator, dtype=torch.float64).to(dtype)
    found = product(states, weight)
    assert (found.shape, found.dtype) == ((rows, tile), dtype)
    exact = states.double() @ weight.double().T
    # However the sum is ordered: gamma_d |s| |w| (Higham, Accuracy and Stability, Sec. 3.1).
    unit = width * torch.finfo(dtype).eps / 2
    bound = unit / (1 - unit) * (states.double().abs() @ weight.double().abs().T)
    assert ((found.double() - exact).abs() <= bound + 1e-300).all()


@pytest.mark.usefixtures("_way")
def test_operands_may_be_slices():
    """Tiles are rows of E_u; states may be a part of a larger block, or lie transposed."""
    block = torch.randn(8, 5, 64)
    weight = torch.randn(90, 64)[10:57]
    for states in (block[2], block[:, 3], torch.randn(64, 7).T):
        torch.testing.assert_close(
            product(states, weight), states.clone() @ weight.clone().T, atol=1e-4, rtol=1e-4
        )
