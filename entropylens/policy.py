"""H(softmax(h E_u^T)) without the logits: the one numeric kernel, and its float64 oracle.

The vocabulary is walked in tiles; of each tile only three numbers a position are kept:
the largest logit m, sum exp(l - m) and sum exp(l - m) (l - m). Accumulating the shifted
logit, instead of lse - sum(p l), keeps float32 exact under large common shifts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropylens.products import product
from entropylens.transform import IDENTITY, OutputTransform

__all__ = [
    "EAGER",
    "VOCAB_TILE",
    "Accumulator",
    "Body",
    "TileStatistics",
    "Unembedding",
    "entropy",
    "entropy_float64",
    "policy_head",
]

#: Vocabulary entries a tile: with 512 positions a float32 tile is 4 MiB and stays in cache.
VOCAB_TILE = 2048

#: Shifted logits below this count as this: exp(-80) is 2e-35, far under any rounding here, and
#: stays a normal float32; denormal results make exp ten times slower on a CPU.
SHIFT_FLOOR = -80.0


class Tile(NamedTuple):
    """One slice [start, stop) of the vocabulary."""

    start: int
    stop: int
    weight: Float[Tensor, "tile d_model"]
    bias: Float[Tensor, " tile"] | None


@dataclass(frozen=True)
class Unembedding:
    """E_u with its bias and output transform: everything between a state and its policy.

    Args:
        weight: E_u, in any floating dtype.
        bias: lm_head's bias, or None.
        transform: what the model does to the logits after lm_head.
    """

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None = None
    transform: OutputTransform = IDENTITY

    @property
    def vocab_size(self) -> int:
        """V, the rows of E_u."""
        return self.weight.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.weight.shape[1]

    def tiles(self, dtype: torch.dtype, size: int = VOCAB_TILE) -> Iterator[Tile]:
        """Walk E_u in slices of `size` rows, each cast to `dtype` on the fly."""
        for start in range(0, self.vocab_size, size):
            stop = min(start + size, self.vocab_size)
            bias = None if self.bias is None else self.bias[start:stop].to(dtype)
            yield Tile(start, stop, self.weight[start:stop].to(dtype), bias)

    def rows(
        self, tokens: Int[Tensor, " positions"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "positions d_model"], Float[Tensor, " positions"]]:
        """Each token's row of E_u and its bias (0 without one)."""
        weight = self.weight[tokens].to(dtype)
        bias = torch.zeros(len(tokens), dtype=dtype, device=weight.device)
        return weight, bias if self.bias is None else self.bias[tokens].to(dtype)

    def logits(
        self, states: Float[Tensor, "positions d_model"]
    ) -> Float[Tensor, "positions vocab"]:
        """All logits of a few states, in float32 or better (for checks and for users)."""
        dtype = compute_dtype(states)
        states = states.to(dtype)
        columns = [
            torch.nn.functional.linear(states, tile.weight, tile.bias) for tile in self.tiles(dtype)
        ]
        return self.transform(torch.cat(columns, dim=-1))


class TileStatistics(NamedTuple):
    """What one tile says of each position's policy; `dot` only where probs were given."""

    maximum: Float[Tensor, " positions"]
    total: Float[Tensor, " positions"]
    weighted: Float[Tensor, " positions"]
    dot: Float[Tensor, " positions"] | None


@runtime_checkable
class Body(Protocol):
    """One implementation of the pass over a tile of logits. It leaves its arguments alone.

    Args (of a call):
        linear: h W^T of the tile, without bias; reduced in float32 or better.
        bias: the tile's bias or None.
        transform: the model's output transform.
        probs: pi_theta over the tile, or None; then `dot` is sum probs * logits.
    """

    @property
    def name(self) -> str:
        """How logs and results name it."""
        ...

    def __call__(
        self,
        linear: Float[Tensor, "positions tile"],
        bias: Float[Tensor, " tile"] | None,
        transform: OutputTransform,
        probs: Float[Tensor, "positions tile"] | None,
    ) -> TileStatistics:
        """Reduce one tile."""
        ...


class EagerBody:
    """Plain PyTorch ops: runs everywhere."""

    name = "eager"

    def __call__(
        self,
        linear: Float[Tensor, "positions tile"],
        bias: Float[Tensor, " tile"] | None,
        transform: OutputTransform,
        probs: Float[Tensor, "positions tile"] | None,
    ) -> TileStatistics:
        """Reduce one tile."""
        linear = linear.to(compute_dtype(linear))
        logits = transform(linear if bias is None else linear + bias)
        dot = None if probs is None else torch.einsum("pv,pv->p", probs, logits)
        maximum = logits.amax(-1)
        shifted = (logits - maximum.unsqueeze(-1)).clamp_min_(SHIFT_FLOOR)
        exponentials = shifted.exp()
        total = exponentials.sum(-1)
        weighted = exponentials.mul_(shifted).sum(-1)
        return TileStatistics(maximum, total, weighted, dot)


EAGER = EagerBody()


class Accumulator:
    """Merges tile statistics of many sites, in float64: `put` each site of a tile, then `merge`.

    Attributes:
        maximum, total, weighted: [sites, positions] running statistics.
    """

    def __init__(self, sites: int, positions: int, device: torch.device) -> None:
        shape = (sites, positions)
        self.maximum = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.weighted = torch.zeros(shape, dtype=torch.float64, device=device)
        # Filled in place: small tensors kept between freed tiles would tear the heap to pieces.
        self._tile = torch.zeros((3, *shape), dtype=torch.float64, device=device)

    def put(self, first: int, part: TileStatistics) -> None:
        """Note what one tile says of the sites from `first` on, their positions in a row."""
        shape = (3, -1, self.maximum.shape[1])
        found = torch.stack((part.maximum, part.total, part.weighted)).view(shape)
        self._tile[:, first : first + found.shape[1]] = found

    def merge(self) -> None:
        """Take in the tile whose sites were all put."""
        tile_max, total, weighted = self._tile
        top = torch.maximum(self.maximum, tile_max)
        # Before the first tile the running maximum is -inf and its sums are zero.
        old_shift = torch.where(self.total > 0, self.maximum - top, torch.zeros_like(top))
        new_shift = tile_max - top
        old_scale, new_scale = old_shift.exp(), new_shift.exp()
        self.weighted = old_scale * (self.weighted + self.total * old_shift) + new_scale * (
            weighted + total * new_shift
        )
        self.total = old_scale * self.total + new_scale * total
        self.maximum = top

    def entropy(self) -> Float[Tensor, "sites positions"]:
        """H in nats: log sum exp(l - m) - E[l - m] (Eq. 8)."""
        return self.total.log() - self.weighted / self.total

    def log_normalizer(self) -> Float[Tensor, "sites positions"]:
        """log sum exp(l)."""
        return self.maximum + self.total.log()


class PolicyHead(NamedTuple):
    """pi_theta at each position.

    Args:
        entropy: H(pi_theta) in nats.
        nll: -log pi_theta(token).
        log_normalizer: log sum exp of its logits.
        top: its most probable token.
    """

    entropy: Float[Tensor, " positions"]
    nll: Float[Tensor, " positions"]
    log_normalizer: Float[Tensor, " positions"]
    top: Int[Tensor, " positions"]


def policy_head(
    states: Float[Tensor, "positions d_model"],
    unembedding: Unembedding,
    tokens: Int[Tensor, " positions"],
    body: Body = EAGER,
) -> PolicyHead:
    """The model's own policy, read from the final-normed last states.

    Args:
        states: N(H^L), what lm_head reads.
        unembedding: E_u and its transform.
        tokens: the token produced at each position.
        body: which implementation reduces a tile.
    """
    dtype = compute_dtype(states)
    states = states.to(dtype)
    statistics = Accumulator(1, len(states), states.device)
    best = torch.full((len(states),), -torch.inf, dtype=dtype, device=states.device)
    top = torch.zeros_like(tokens)
    chosen = torch.zeros_like(best)
    for tile in unembedding.tiles(dtype):
        linear = product(states, tile.weight)
        logits = unembedding.transform(linear if tile.bias is None else linear + tile.bias)
        tile_best, tile_top = logits.max(-1)
        top = torch.where(tile_best > best, tile_top + tile.start, top)
        best = torch.maximum(best, tile_best)
        chosen = pick(logits, tokens, tile, chosen)
        part = body(linear, tile.bias, unembedding.transform, None)
        statistics.put(0, part)
        statistics.merge()
    log_normalizer = statistics.log_normalizer()[0]
    return PolicyHead(statistics.entropy()[0], log_normalizer - chosen, log_normalizer, top)


def pick(
    logits: Float[Tensor, "positions tile"],
    tokens: Int[Tensor, " positions"],
    tile: Tile,
    otherwise: Float[Tensor, " positions"],
) -> Float[Tensor, " positions"]:
    """Each position's logit of its token where the tile holds it, else `otherwise`."""
    inside = (tokens >= tile.start) & (tokens < tile.stop)
    column = (tokens - tile.start).clamp(0, tile.stop - tile.start - 1)
    return torch.where(inside, logits.gather(1, column[:, None])[:, 0], otherwise)


def entropy(
    states: Float[Tensor, "positions d_model"],
    unembedding: Unembedding,
    body: Body = EAGER,
    vocab_tile: int = VOCAB_TILE,
) -> Float[Tensor, " positions"]:
    """H(softmax(h E_u^T)) in nats, exact, never holding more than one tile of logits (Eq. 8).

    Args:
        states: states in any floating dtype; products are made in float32 or better.
        unembedding: E_u with bias and output transform.
        body: which implementation reduces a tile.
        vocab_tile: vocabulary entries a tile.
    """
    dtype = compute_dtype(states)
    states = states.to(dtype)
    statistics = Accumulator(1, len(states), states.device)
    for tile in unembedding.tiles(dtype, vocab_tile):
        part = body(product(states, tile.weight), tile.bias, unembedding.transform, None)
        statistics.put(0, part)
        statistics.merge()
    return statistics.entropy()[0]


def entropy_float64(
    states: Float[Tensor, "positions d_model"], unembedding: Unembedding
) -> Float[Tensor, " positions"]:
    """The oracle: the same entropies written plainly, in float64, with all logits at once."""
    logits = states.double() @ unembedding.weight.double().T
    if unembedding.bias is not None:
        logits = logits + unembedding.bias.double()
    log_probs = torch.log_softmax(unembedding.transform(logits), dim=-1)
    return -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)


def compute_dtype(states: Tensor) -> torch.dtype:
    """The dtype of all products: the states' own, but float32 at least."""
    return torch.promote_types(states.dtype, torch.float32)
