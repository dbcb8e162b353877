"""The same-norm control: what entropy changes would be if directions said nothing.

A random Gaussian vector of norm r has the policy softmax(r u E_u^T), u a random direction. Its
expected entropy depends on r alone, so one curve a model, averaged over many directions, gives
the control at every position, with less noise than one draw a position and no further product.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from entropylens.policy import Accumulator, Body, Unembedding, compute_dtype
from entropylens.products import product

__all__ = ["NormControl"]

DIRECTIONS = 256
#: Standard deviations of the logits u E_u^T at which the curve is computed: from uniform to
#: one-hot for any vocabulary.
SPREADS = np.geomspace(1e-2, 1e4, 72)


class NormControl:
    """Expected entropy of a random direction as a function of its norm.

    Args:
        unembedding: E_u with bias and output transform.
        body: which implementation reduces a tile.
        seed: of the directions.
    """

    def __init__(self, unembedding: Unembedding, body: Body, seed: int = 0) -> None:
        dtype = compute_dtype(unembedding.weight)
        device = unembedding.weight.device
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(
            DIRECTIONS, unembedding.d_model, generator=generator, dtype=torch.float64
        )
        directions = (directions / directions.norm(dim=-1, keepdim=True)).to(device, dtype)
        norm = torch.linalg.vector_norm(unembedding.weight, dtype=dtype)
        spread = float(norm) / math.sqrt(unembedding.weight.numel())
        norms = SPREADS / max(spread, torch.finfo(torch.float32).tiny)
        statistics = Accumulator(len(norms), DIRECTIONS, device)
        for tile in unembedding.tiles(dtype):
            linear = product(directions, tile.weight)
            for site, norm in enumerate(norms):
                part = body(linear * float(norm), tile.bias, unembedding.transform, None)
                statistics.put(site, part)
            statistics.merge()
        self._root_width = math.sqrt(unembedding.d_model)
        self._log_range = (math.log(norms[0]), math.log(norms[-1]))
        self._curve = PchipInterpolator(
            np.log(norms), statistics.entropy().mean(-1).cpu().numpy(), extrapolate=False
        )

    def entropy(self, rms: Float[Tensor, "layers positions"]) -> NDArray[Any]:
        """Expected entropy (nats) of random vectors with these RMS values.

        Args:
            rms: root mean squares over d_model; the norm is sqrt(d_model) times it.
        """
        norms = rms.double().cpu().numpy() * self._root_width
        with np.errstate(divide="ignore"):
            return self._curve(np.clip(np.log(norms), *self._log_range))

    def deltas(
        self, quantities: dict[str, Float[Tensor, "layers positions"]]
    ) -> dict[str, Float[Tensor, "layers positions"]]:
        """`control_delta_attn` and `control_delta_ffn` from the RMS values of `geometry`."""
        changes = {
            f"control_delta_{module}": self.entropy(quantities[f"rms_{module}"])
            - self.entropy(quantities[f"rms_{module}_in"])
            for module in ("attn", "ffn")
        }
        return {name: torch.from_numpy(change) for name, change in changes.items()}
