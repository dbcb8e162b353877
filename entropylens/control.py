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

    The curve goes through fixed spreads, of which only those around the norms asked for are
    computed: what was asked before never changes a value.

    Args:
        unembedding: E_u with bias and output transform.
        body: which implementation reduces a tile.
        seed: of the directions.
    """

    def __init__(self, unembedding: Unembedding, body: Body, seed: int = 0) -> None:
        self._dtype = compute_dtype(unembedding.weight)
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(
            DIRECTIONS, unembedding.d_model, generator=generator, dtype=torch.float64
        )
        directions = directions / directions.norm(dim=-1, keepdim=True)
        self._directions = directions.to(unembedding.weight.device, self._dtype)
        norm = torch.linalg.vector_norm(unembedding.weight, dtype=self._dtype)
        spread = float(norm) / math.sqrt(unembedding.weight.numel())
        self._unembedding, self._body = unembedding, body
        self._root_width = math.sqrt(unembedding.d_model)
        norms = SPREADS / max(spread, torch.finfo(torch.float32).tiny)
        self._nodes, self._entropies = np.log(norms), np.empty(len(norms))
        self._known = range(0)

    def whole(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Log norms and entropies of all nodes, for who joins them elsewhere."""
        self._compute(0, len(self._nodes))
        return self._nodes, self._entropies

    def entropy(self, rms: Float[Tensor, "layers positions"]) -> NDArray[Any]:
        """Expected entropy (nats) of random vectors with these RMS values.

        Args:
            rms: root mean squares over d_model; the norm is sqrt(d_model) times it.
        """
        nodes = self._nodes
        with np.errstate(divide="ignore"):
            wanted = np.log(rms.double().cpu().numpy() * self._root_width)
        wanted = np.clip(wanted, nodes[0], nodes[-1])
        met = wanted[~np.isnan(wanted)]
        if not met.size:
            return wanted
        # A value between two nodes also depends on the slopes there, so on one node more.
        first = max(int(np.searchsorted(nodes, met.min(), "right")) - 2, 0)
        last = min(int(np.searchsorted(nodes, met.max(), "left")) + 2, len(nodes))
        self._compute(first, last)
        known = slice(self._known.start, self._known.stop)
        curve = PchipInterpolator(nodes[known], self._entropies[known], extrapolate=False)
        return np.asarray(curve(wanted))

    def _compute(self, first: int, last: int) -> None:
        """The nodes from first up to last, and those between them and the known ones."""
        if self._known:
            first, last = min(first, self._known.start), max(last, self._known.stop)
        missing = [it for it in range(first, last) if it not in self._known]
        self._known = range(first, last)
        if not missing:
            return
        statistics = Accumulator(len(missing), DIRECTIONS, self._directions.device)
        for tile in self._unembedding.tiles(self._dtype):
            linear = product(self._directions, tile.weight)
            for site, node in enumerate(missing):
                part = self._body(
                    linear * math.exp(self._nodes[node]),
                    tile.bias,
                    self._unembedding.transform,
                    None,
                )
                statistics.put(site, part)
            statistics.merge()
        self._entropies[missing] = statistics.entropy().mean(-1).cpu().numpy()

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
