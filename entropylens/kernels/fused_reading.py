"""readings.read_policies through the fused kernel: no tile of logits of a layer is ever written.

Every site takes products of its own, in the model's dtype with float32 accumulation. Only
pi_theta's probabilities, and logits of the positions whose top tokens are kept, are formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropylens.kernels.fused import Asked, merge, reduce_rows
from entropylens.policy import SHIFT_FLOOR, VOCAB_TILE, PolicyHead, Tile, Unembedding
from entropylens.readings import PolicyReadings, Sites, TopTokens

__all__ = ["read_policies", "takes"]

#: Operands of the kernel.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: pi_theta's probabilities that are held at a time, if one tile of VOCAB_TILE is not more: 32 MiB.
HELD_PROBS = 2**23


def takes(sites: Sites, unembedding: Unembedding) -> bool:
    """Whether the kernel has these dtypes; float64 is left to the torch path."""
    return sites.start.dtype in DTYPES and unembedding.weight.dtype in DTYPES


def read_policies(
    sites: Sites,
    final: Float[Tensor, "positions d_model"],
    unembedding: Unembedding,
    head: PolicyHead,
    tokens: Int[Tensor, " positions"],
    on_tile: Callable[[], None] = lambda: None,
    top: TopTokens | None = None,
) -> PolicyReadings:
    """What `readings.read_policies` gives, with the kernel for a body.

    Args:
        sites: the states, in bf16, fp16 or float32.
        final: N(H^L), for pi_theta's probabilities.
        unembedding: E_u and its transform.
        head: pi_theta's statistics from `policy_head`.
        tokens: the produced token at each position.
        on_tile: called as often as the vocabulary has tiles of VOCAB_TILE.
        top: gets the most probable tokens of pi_1..pi_L.
    """
    transform, positions = unembedding.transform, len(final)
    stream = torch.cat([sites.start.unsqueeze(0), sites.stream])
    rows = stream.flatten(0, 1)
    keeping = None
    if top is not None and top.start(sites, unembedding, tokens, torch.float32):
        keeping = _Keeping(top, stream[1:])
    normalizer = head.log_normalizer.float().unsqueeze(-1)

    parts = []
    tiles_held = max(1, HELD_PROBS // (VOCAB_TILE * positions))
    for tile in _tiles(unembedding, tiles_held * VOCAB_TILE):
        linear = _product(final, tile.weight)
        logits = transform(linear if tile.bias is None else linear + tile.bias.float())
        probs = (logits - normalizer).clamp_min_(SHIFT_FLOOR).exp_()
        asked = Asked(probs, tokens - tile.start, head.top - tile.start)
        parts.append(reduce_rows(rows, tile.weight, tile.bias, transform, asked))
        if keeping is not None:
            keeping.take(tile, unembedding)
        for _ in range(tile.start, tile.stop, VOCAB_TILE):
            on_tile()
    of_stream = merge(torch.cat(parts))
    assert of_stream.dot is not None  # it was asked for
    assert of_stream.at_token is not None
    assert of_stream.at_top is not None

    def layered(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, positions))

    def entropy(states: Tensor) -> Tensor:
        weight, bias = unembedding.weight, unembedding.bias
        found = reduce_rows(states.flatten(0, 1), weight, bias, transform)
        return layered(merge(found).entropy())

    log_normalizer, maximum = layered(of_stream.log_normalizer()), layered(of_stream.maximum)
    if keeping is not None:
        keeping.finish(log_normalizer[1:])
    slack = 1e-6 * maximum.abs()  # as where the logits were written: equal within float error
    dot = layered(of_stream.dot)
    return PolicyReadings(
        plain=tuple(map(entropy, sites.plain)),
        added=tuple(map(entropy, sites.added)),
        stream=layered(of_stream.entropy()),
        nll=log_normalizer - layered(of_stream.at_token),
        agree=(layered(of_stream.at_top) >= maximum - slack).double(),
        kl=(log_normalizer - dot - head.entropy).clamp_min(0.0),
    )


class _Keeping:
    """Logits of the kept positions, which `TopTokens` takes as if there were no others."""

    def __init__(self, top: TopTokens, stream: Float[Tensor, "layers positions d_model"]) -> None:
        self.top, self.kept = top, top.kept
        self.states = stream[:, top.kept]
        top.kept = torch.arange(len(self.kept), device=self.kept.device)

    def take(self, tile: Tile, unembedding: Unembedding) -> None:
        if tile.bias is not None:
            tile = tile._replace(bias=tile.bias.float())
        for place, states in enumerate(self.states):
            self.top.take(place, _product(states, tile.weight), tile, unembedding.transform)

    def finish(self, log_normalizer: Float[Tensor, "layers positions"]) -> None:
        self.top.kept = self.kept
        self.top.finish(log_normalizer)


def _tiles(unembedding: Unembedding, size: int) -> Iterator[Tile]:
    """Slices of E_u as it lies there: no casts."""
    bias = unembedding.bias
    for start in range(0, unembedding.vocab_size, size):
        stop = min(start + size, unembedding.vocab_size)
        part = None if bias is None else bias[start:stop]
        yield Tile(start, stop, unembedding.weight[start:stop], part)


def _product(
    states: Float[Tensor, "rows d_model"], weight: Float[Tensor, "tile d_model"]
) -> Float[Tensor, "rows tile"]:
    """Float32 logits without bias; half-precision operands stay as they are on a GPU."""
    half = states.dtype == weight.dtype and states.dtype != torch.float32
    if half and states.device.type == "cuda":
        return torch.mm(states, weight.T, out_dtype=torch.float32)
    return states.float() @ weight.float().T
