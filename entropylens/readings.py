"""From captured states to the quantities of every layer, position by position.

`raw` reads softmax(h E_u^T) as training does (Eq. 6); `normed` puts the model's final norm
before it (the logit lens). RMS and cosines belong to neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropylens.anatomy import Anatomy
from entropylens.capture import States
from entropylens.policy import (
    SHIFT_FLOOR,
    Accumulator,
    Body,
    PolicyHead,
    Tile,
    Unembedding,
    compute_dtype,
    pick,
)
from entropylens.products import product
from entropylens.quantities import GEOMETRY
from entropylens.transform import OutputTransform

if TYPE_CHECKING:
    from entropylens.fast_reading import FastSites

__all__ = [
    "ROWS",
    "PolicyReadings",
    "PolicyWalk",
    "Sites",
    "TopTokens",
    "blank_absent",
    "geometry",
    "normed_reading",
    "normed_sites",
    "raw_reading",
    "raw_sites",
]

#: Rows of a matrix product over several layers: enough to use the cores, few enough to cache.
ROWS = 1024

Quantities = dict[str, Float[Tensor, "layers positions"]]


def geometry(states: States) -> Quantities:
    """RMS of every site, and what each module writes against the stream it is added to (B.2).

    Returns:
        `rms_layer, rms_attn, rms_ffn, rms_attn_in, rms_mid, rms_ffn_in, cos_attn, cos_ffn,
        cos_final`, in float64.
    """
    last = states.stream_out[-1].double()
    shape = (states.num_layers, len(last))
    # Filled in place, as in Accumulator: small tensors kept between large ones tear the heap.
    found = {name: torch.zeros(shape, dtype=last.dtype, device=last.device) for name in GEOMETRY}
    for place in range(states.num_layers):
        stream_in = states.stream_in(place).double()
        mid = states.ffn_base(place).double()
        attn, ffn = states.attn_out[place].double(), states.ffn_out[place].double()
        out = states.stream_out[place].double()
        found["rms_layer"][place] = _rms(out)
        found["rms_attn"][place] = _rms(attn)
        found["rms_ffn"][place] = _rms(ffn)
        found["rms_attn_in"][place] = _rms(states.attn_in[place].double())
        found["rms_mid"][place] = _rms(mid)
        found["rms_ffn_in"][place] = _rms(states.ffn_in[place].double())
        found["cos_attn"][place] = torch.cosine_similarity(attn, stream_in, dim=-1)
        found["cos_ffn"][place] = torch.cosine_similarity(ffn, mid, dim=-1)
        found["cos_final"][place] = torch.cosine_similarity(out, last, dim=-1)
    return found


def blank_absent(quantities: Quantities, anatomy: Anatomy) -> None:
    """Set to NaN what a layer does not have: a branch, or a middle where branches are parallel."""
    for name, values in quantities.items():
        for branch, there in (("attn", anatomy.attention), ("ffn", anatomy.ffn)):
            if f"_{branch}" in name:
                values[[found is None for found in there]] = torch.nan
    if anatomy.parallel:
        for name in quantities.keys() & {"rms_mid", "normed_step_attn", "normed_step_ffn"}:
            quantities[name].fill_(torch.nan)


def _rms(states: Float[Tensor, "positions d_model"]) -> Float[Tensor, " positions"]:
    return states.square().mean(-1).sqrt()


def raw_reading(
    states: States,
    unembedding: Unembedding,
    head: PolicyHead,
    tokens: Int[Tensor, " positions"],
    body: Body,
    on_tile: Callable[[], None] = lambda: None,
    top: TopTokens | None = None,
    fast: FastSites | None = None,
) -> Quantities:
    """Entropies and their changes without the final norm (Eq. 6-8, 12-14), and pi_l's fit."""
    sites = raw_sites(states)
    read = read_policies(sites, states.final, unembedding, head, tokens, body, on_tile, top, fast)
    attn_in, ffn_in = read.plain
    attn, ffn = read.added
    return {
        "entropy_layer": read.stream[1:],
        "entropy_attn": attn,
        "entropy_ffn": ffn,
        "delta_layer": read.stream.diff(dim=0),
        "delta_attn": attn - attn_in,
        "delta_ffn": ffn - ffn_in,
        "nll_layer": read.nll[1:],
        "agree_layer": read.agree[1:],
        "kl_layer": read.kl[1:],
    }


def raw_sites(states: States) -> Sites:
    """What the raw reading reads.

    Logits are linear in the state, so in a float32 stream those of H^l are the sum of those of
    H^{l-1}, A^l and F^l and need no product of their own; a bf16 stream rounds after each
    addition and gets its own.
    """
    return Sites(
        start=states.embedding,
        plain=(states.attn_in, states.ffn_in),
        added=(states.attn_out, states.ffn_out),
        stream=states.stream_out,
        sums=states.embedding.dtype in (torch.float32, torch.float64),
    )


def normed_reading(
    states: States,
    final_norm: Callable[[Tensor], Tensor],
    unembedding: Unembedding,
    head: PolicyHead,
    tokens: Int[Tensor, " positions"],
    body: Body,
    on_tile: Callable[[], None] = lambda: None,
    top: TopTokens | None = None,
    fast: FastSites | None = None,
) -> Quantities:
    """The same behind the final norm N, against the un-normed stream each module reads.

    `normed_step_*` is what adding the module did to the policy: H(N(H + A)) - H(N(H)).
    """
    sites = normed_sites(states, final_norm)
    read = read_policies(sites, states.final, unembedding, head, tokens, body, on_tile, top, fast)
    (mid,) = read.plain
    attn, ffn = read.added
    stream_in, stream_out = read.stream[:-1], read.stream[1:]
    return {
        "normed_entropy_layer": stream_out,
        "normed_entropy_attn": attn,
        "normed_entropy_ffn": ffn,
        "normed_delta_layer": stream_out - stream_in,
        "normed_delta_attn": attn - stream_in,
        "normed_delta_ffn": ffn - mid,
        "normed_step_attn": mid - stream_in,
        "normed_step_ffn": stream_out - mid,
        "normed_nll_layer": read.nll[1:],
        "normed_agree_layer": read.agree[1:],
        "normed_kl_layer": read.kl[1:],
    }


def normed_sites(states: States, final_norm: Callable[[Tensor], Tensor]) -> Sites:
    """What the normed reading reads."""
    with torch.inference_mode():
        bases = map(states.ffn_base, range(states.num_layers))
        return Sites(
            start=final_norm(states.embedding),
            plain=(torch.stack([final_norm(base) for base in bases]),),
            added=(final_norm(states.attn_out), final_norm(states.ffn_out)),
            stream=final_norm(states.stream_out),
            sums=False,
        )


class Sites(NamedTuple):
    """The states of all layers whose policies are read.

    Args:
        start: H^0, normed or not.
        plain: states whose entropy alone is wanted.
        added: the same.
        stream: H^1..H^L.
        sums: logits of the stream may be summed from those of `start` and `added`.
    """

    start: Float[Tensor, "positions d_model"]
    plain: tuple[Float[Tensor, "layers positions d_model"], ...]
    added: tuple[Float[Tensor, "layers positions d_model"], ...]
    stream: Float[Tensor, "layers positions d_model"]
    sums: bool


class PolicyReadings(NamedTuple):
    """Entropies [layers, positions] of each plain and added site; of the stream from H^0 on
    [layers + 1, positions] its entropy, NLL, agreement and KL(pi_theta || pi_l)."""

    plain: tuple[Tensor, ...]
    added: tuple[Tensor, ...]
    stream: Tensor
    nll: Tensor
    agree: Tensor
    kl: Tensor


def read_policies(
    sites: Sites,
    final: Float[Tensor, "positions d_model"],
    unembedding: Unembedding,
    head: PolicyHead,
    tokens: Int[Tensor, " positions"],
    body: Body,
    on_tile: Callable[[], None] = lambda: None,
    top: TopTokens | None = None,
    fast: FastSites | None = None,
) -> PolicyReadings:
    """Walk the vocabulary once for all sites of all layers.

    Args:
        sites: the states.
        final: N(H^L), for pi_theta's probabilities.
        unembedding: E_u and its transform.
        head: pi_theta's statistics from `policy_head`.
        tokens: the produced token at each position.
        body: which implementation reduces a tile.
        on_tile: called after each tile of the vocabulary, for a progress bar.
        top: gets the most probable tokens of pi_1..pi_L.
        fast: sites whose products are made in bf16.
    """
    if fast is not None:
        from entropylens.fast_reading import read_policies_fast  # it builds on this module

        return read_policies_fast(sites, final, unembedding, head, tokens, body, fast, on_tile, top)
    if body.name == "triton":
        from entropylens.kernels import fused_reading  # it builds on this module

        if fused_reading.takes(sites, unembedding):
            return fused_reading.read_policies(
                sites, final, unembedding, head, tokens, on_tile, top
            )
    walk = PolicyWalk(sites, final, unembedding, head, tokens, body, top)
    step = max(1, ROWS // walk.positions)
    for tile in unembedding.tiles(walk.dtype):
        running = walk.enter(tile)
        for first in range(0, walk.layers, step):
            chunk = slice(first, first + step)
            total = None
            for place, states in enumerate(walk.alone):
                linear = product(states[chunk].flatten(0, 1).to(walk.dtype), tile.weight)
                walk.read_alone(place, first, linear)
                if sites.sums and place >= len(sites.plain):
                    total = linear if total is None else total.add_(linear)
            if not sites.sums:
                total = product(sites.stream[chunk].flatten(0, 1).to(walk.dtype), tile.weight)
            assert total is not None  # there is always something added
            for offset, of_layer in enumerate(total.unflatten(0, (-1, walk.positions))):
                running = running.add_(of_layer) if sites.sums else of_layer
                walk.read_stream(first + offset + 1, running)
        walk.leave()
        on_tile()
    return walk.readings()


class TopTokens:
    """The most probable tokens of every pi_l at some positions, and the produced token's rank.

    Args:
        count: how many.

    Attributes:
        kept: the positions that are wanted; to be set before a reading.
        ids: [layers, kept, count], the likeliest first.
        probs: their probabilities.
        ranks: [layers, kept], from 1: one more than the tokens of a larger logit.
    """

    kept: Int[Tensor, " kept"]

    def __init__(self, count: int) -> None:
        self.count = count

    def start(
        self,
        sites: Sites,
        unembedding: Unembedding,
        tokens: Int[Tensor, " positions"],
        dtype: torch.dtype,
    ) -> bool:
        """Forget what was read before; say whether there is anything to read."""
        layers, device = len(sites.added[0]), tokens.device
        self.kept = self.kept.to(device)
        shape = (layers, len(self.kept), self.count)
        self.ids = torch.zeros(shape, dtype=torch.long, device=device)
        self.probs = torch.full(shape, -torch.inf, dtype=dtype, device=device)  # logits so far
        self.ranks = torch.ones(shape[:2], dtype=torch.long, device=device)
        self.tokens = tokens[self.kept]
        weight, bias = unembedding.rows(self.tokens, dtype)
        self.chosen = torch.zeros(shape[:2], dtype=dtype, device=device)
        stream = sites.start[self.kept].to(dtype)
        for place in range(layers):
            if sites.sums:
                stream = stream + sum(it[place][self.kept].to(dtype) for it in sites.added)
            else:
                stream = sites.stream[place][self.kept].to(dtype)
            self.chosen[place] = (stream * weight).sum(-1) + bias
        return len(self.kept) > 0

    def take(self, place: int, linear: Tensor, tile: Tile, transform: OutputTransform) -> None:
        """Take in one tile of one layer's logits."""
        linear = linear[self.kept]
        if tile.bias is not None:
            linear = linear + tile.bias
        chosen = self.chosen[place]
        own = pick(linear, self.tokens, tile, chosen)  # no token is ahead of itself
        self.ranks[place] += (linear > chosen[:, None]).sum(-1) - (own > chosen).long()
        best, column = transform(linear).topk(min(self.count, linear.shape[-1]), dim=-1)
        values = torch.cat([self.probs[place], best], dim=-1)
        ids = torch.cat([self.ids[place], column + tile.start], dim=-1)
        self.probs[place], order = values.topk(self.count, dim=-1)
        self.ids[place] = ids.gather(-1, order)

    def finish(self, log_normalizer: Float[Tensor, "layers positions"]) -> None:
        """Turn logits into probabilities."""
        self.probs = (self.probs - log_normalizer[:, self.kept].unsqueeze(-1)).exp()


class PolicyWalk:
    """What is read of all sites, tile by tile: `enter`, read each site, `leave`; then `readings`.

    Args:
        sites, final, unembedding, head, tokens, body, top: as for `read_policies`.

    Attributes:
        alone: the plain sites, then the added ones.
    """

    def __init__(
        self,
        sites: Sites,
        final: Float[Tensor, "positions d_model"],
        unembedding: Unembedding,
        head: PolicyHead,
        tokens: Int[Tensor, " positions"],
        body: Body,
        top: TopTokens | None,
    ) -> None:
        self.dtype, self.transform = compute_dtype(sites.start), unembedding.transform
        self.sites, self.unembedding, self.head = sites, unembedding, head
        self.tokens, self.body = tokens, body
        self.alone = (*sites.plain, *sites.added)
        self.layers, self.positions, device = len(sites.stream), len(final), final.device
        self._start, self._final = sites.start.to(self.dtype), final.to(self.dtype)
        self._normalizer = head.log_normalizer.to(self.dtype).unsqueeze(-1)
        wanted = top is not None and top.start(sites, unembedding, tokens, self.dtype)
        self._top = top if wanted else None
        shape = (self.layers + 1, self.positions)
        self._modules = Accumulator(len(self.alone) * self.layers, self.positions, device)
        self._stream = Accumulator(*shape, device)
        self._dot = torch.zeros(shape, dtype=torch.float64, device=device)
        self._chosen = torch.zeros(shape, dtype=self.dtype, device=device)
        self._at_top = torch.zeros_like(self._chosen)

    def enter(self, tile: Tile) -> Float[Tensor, "positions tile"]:
        """Begin a tile: read pi_theta and H^0, and return H^0's logits."""
        own = product(self._final, tile.weight)
        own = self.transform(own if tile.bias is None else own + tile.bias)
        log_probs = own - self._normalizer
        self._tile, self._probs = tile, log_probs.clamp_min_(SHIFT_FLOOR).exp_()
        start = product(self._start, tile.weight)
        self.read_stream(0, start)
        return start

    def read_alone(self, place: int, first: int, linear: Float[Tensor, "rows tile"]) -> None:
        """Take in the logits of one site of `alone` at the layers from place `first` on."""
        part = self.body(linear, self._tile.bias, self.transform, None)
        self._modules.put(place * self.layers + first, part)

    def read_stream(self, layer: int, linear: Float[Tensor, "positions tile"]) -> None:
        """Take in the logits of H^layer."""
        tile = self._tile
        self._chosen[layer] = pick(linear, self.tokens, tile, self._chosen[layer])
        self._at_top[layer] = pick(linear, self.head.top, tile, self._at_top[layer])
        part = self.body(linear, tile.bias, self.transform, self._probs)
        assert part.dot is not None  # probs were given
        self._dot[layer] += part.dot
        if self._top is not None and layer > 0:
            self._top.take(layer - 1, linear, tile, self.transform)
        self._stream.put(layer, part)

    def leave(self) -> None:
        """End the tile."""
        self._modules.merge()
        self._stream.merge()

    def readings(self) -> PolicyReadings:
        """What was read, after the last tile."""
        chosen, at_top, bias = self._chosen, self._at_top, self.unembedding.bias
        if bias is not None:
            chosen += bias[self.tokens].to(chosen.dtype)
            at_top += bias[self.head.top].to(chosen.dtype)
        log_normalizer, maximum = self._stream.log_normalizer(), self._stream.maximum
        if self._top is not None:
            self._top.finish(log_normalizer[1:])
        # Equal within float error counts as the top: a body may round its transform differently.
        slack = 1e-6 * maximum.abs()
        entropies = self._modules.entropy().unflatten(0, (len(self.alone), self.layers))
        plain = len(self.sites.plain)
        return PolicyReadings(
            plain=tuple(entropies[:plain]),
            added=tuple(entropies[plain:]),
            stream=self._stream.entropy(),
            nll=log_normalizer - self.transform(chosen),
            agree=(self.transform(at_top) >= maximum - slack).double(),
            kl=(log_normalizer - self._dot - self.head.entropy).clamp_min(0.0),
        )
