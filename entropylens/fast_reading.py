"""Products in bf16 where they are near enough, in float32 where they are not.

Every site takes a product of its own here. bf16 operands are summed in float32; what rounds are
the operands and the logits that come out, to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropylens.policy import (
    Body,
    PolicyHead,
    Unembedding,
    compute_dtype,
)
from entropylens.products import product
from entropylens.readings import ROWS, PolicyReadings, PolicyWalk, Sites, TopTokens

__all__ = ["FastSites", "read_policies_fast", "why_not_fast"]


@dataclass(frozen=True)
class FastSites:
    """Which sites take bf16 products.

    Args:
        alone: [groups, layers], the plain sites and then the added ones, as `Sites` has them.
        stream: [layers], H^1..H^L; H^0 is exact.
    """

    alone: Bool[Tensor, "groups layers"]
    stream: Bool[Tensor, " layers"]

    @property
    def exact(self) -> int:
        """Sites that take float32 products."""
        return int((~self.alone).sum() + (~self.stream).sum())


def why_not_fast(device: torch.device) -> str | None:
    """Why bf16 products would not be faster here, or None where they are."""
    if device.type != "cpu":
        return None
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return None
    return "this CPU has neither avx512_bf16 nor AMX"


def read_policies_fast(
    sites: Sites,
    final: Float[Tensor, "positions d_model"],
    unembedding: Unembedding,
    head: PolicyHead,
    tokens: Int[Tensor, " positions"],
    body: Body,
    fast: FastSites,
    on_tile: Callable[[], None] = lambda: None,
    top: TopTokens | None = None,
) -> PolicyReadings:
    """As `readings.read_policies`, with bf16 products at the chosen sites.

    Args:
        sites: the states.
        fast: which sites are fast.
        final, unembedding, head, tokens, body, on_tile, top: as there.
    """
    walk = PolicyWalk(sites, final, unembedding, head, tokens, body, top)
    alone = [_Group(states, flags) for states, flags in zip(walk.alone, fast.alone, strict=True)]
    stream = _Group(sites.stream, fast.stream)
    for tile in unembedding.tiles(walk.dtype):
        walk.enter(tile)
        weights = (tile.weight, tile.weight.bfloat16())
        for place, group in enumerate(alone):
            for layer, linear in group.products(weights):
                walk.read_alone(place, layer, linear)
        for layer, linear in stream.products(weights):
            walk.read_stream(layer + 1, linear)
        walk.leave()
        on_tile()
    return walk.readings()


class _Group:
    """One site's states of all layers, in float32 and in bf16 as each layer needs them."""

    def __init__(self, states: Tensor, flags: Tensor) -> None:
        self.positions, self.double = states.shape[1], states.dtype == torch.float64
        self.parts = []
        for half in (False, True):
            chosen = torch.nonzero(flags == half)[:, 0].tolist()
            dtype = torch.bfloat16 if half else compute_dtype(states)
            self.parts.append((chosen, states[chosen].to(dtype)))

    def products(self, weights: tuple[Tensor, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Each layer, from 0, with its logits [positions, tile]."""
        step = max(1, ROWS // self.positions)
        for (chosen, states), weight in zip(self.parts, weights, strict=True):
            for first in range(0, len(chosen), step):
                chunk = slice(first, first + step)
                linear = product(states[chunk].flatten(0, 1), weight)
                linear = linear.double() if self.double else linear
                yield from zip(chosen[chunk], linear.split(self.positions), strict=True)
