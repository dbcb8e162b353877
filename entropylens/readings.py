"""From captured states to the quantities of every layer, position by position.

`raw` reads softmax(h E_u^T) as training does (Eq. 6); `normed` puts the model's final norm
before it (the logit lens). RMS and cosines belong to neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entropylens.capture import States
from entropylens.policy import (
    SHIFT_FLOOR,
    Accumulator,
    Body,
    PolicyHead,
    Unembedding,
    compute_dtype,
    pick,
)
from entropylens.quantities import GEOMETRY

__all__ = ["geometry", "normed_reading", "raw_reading"]

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
        mid = states.stream_mid(place).double()
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


def _rms(states: Float[Tensor, "positions d_model"]) -> Float[Tensor, " positions"]:
    return states.square().mean(-1).sqrt()


def raw_reading(
    states: States,
    unembedding: Unembedding,
    head: PolicyHead,
    tokens: Int[Tensor, " positions"],
    body: Body,
    on_tile: Callable[[], None] = lambda: None,
) -> Quantities:
    """Entropies and their changes without the final norm (Eq. 6-8, 12-14), and pi_l's fit.

    Logits are linear in the state, so in a float32 stream those of H^l are the sum of those of
    H^{l-1}, A^l and F^l and need no product of their own; a bf16 stream rounds after each
    addition and gets its own.
    """
    accumulate = states.embedding.dtype in (torch.float32, torch.float64)
    sites = [
        LayerSites(
            plain=(states.attn_in[place], states.ffn_in[place]),
            added=(states.attn_out[place], states.ffn_out[place]),
            stream=None if accumulate else states.stream_out[place],
        )
        for place in range(states.num_layers)
    ]
    read = read_policies(
        states.embedding, sites, states.final, unembedding, head, tokens, body, on_tile
    )
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


def normed_reading(
    states: States,
    final_norm: nn.Module,
    unembedding: Unembedding,
    head: PolicyHead,
    tokens: Int[Tensor, " positions"],
    body: Body,
    on_tile: Callable[[], None] = lambda: None,
) -> Quantities:
    """The same behind the final norm N, against the un-normed stream each module reads.

    `normed_step_*` is what adding the module did to the policy: H(N(H + A)) - H(N(H)).
    """
    with torch.inference_mode():
        sites = [
            LayerSites(
                plain=(final_norm(states.stream_mid(place)),),
                added=(final_norm(states.attn_out[place]), final_norm(states.ffn_out[place])),
                stream=final_norm(states.stream_out[place]),
            )
            for place in range(states.num_layers)
        ]
        start = final_norm(states.embedding)
    read = read_policies(start, sites, states.final, unembedding, head, tokens, body, on_tile)
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


class LayerSites(NamedTuple):
    """What is read of one layer.

    Args:
        plain: states whose entropy alone is wanted.
        added: the same; where `stream` is None they are the layer's two additions.
        stream: H^l where it needs its own product, else None.
    """

    plain: tuple[Tensor, ...]
    added: tuple[Tensor, ...]
    stream: Tensor | None


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
    start: Float[Tensor, "positions d_model"],
    layers: Sequence[LayerSites],
    final: Float[Tensor, "positions d_model"],
    unembedding: Unembedding,
    head: PolicyHead,
    tokens: Int[Tensor, " positions"],
    body: Body,
    on_tile: Callable[[], None] = lambda: None,
) -> PolicyReadings:
    """Walk the vocabulary once for all sites of all layers.

    Args:
        start: H^0, normed or not.
        layers: the sites of each layer.
        final: N(H^L), for pi_theta's probabilities.
        unembedding: E_u and its transform.
        head: pi_theta's statistics from `policy_head`.
        tokens: the produced token at each position.
        body: which implementation reduces a tile.
        on_tile: called after each tile of the vocabulary, for a progress bar.
    """
    dtype, device, positions = compute_dtype(start), start.device, len(start)
    transform = unembedding.transform
    flat = [site for layer in layers for site in (*layer.plain, *layer.added)]
    num_plain, num_added = len(layers[0].plain), len(layers[0].added)
    modules = Accumulator(len(flat), positions, device)
    stream = Accumulator(len(layers) + 1, positions, device)
    dot = torch.zeros(len(layers) + 1, positions, dtype=torch.float64, device=device)
    chosen = torch.zeros(len(layers) + 1, positions, dtype=dtype, device=device)
    at_top = torch.zeros_like(chosen)
    start, final = start.to(dtype), final.to(dtype)
    normalizer = head.log_normalizer.to(dtype).unsqueeze(-1)

    for tile in unembedding.tiles(dtype):
        weight = tile.weight.T
        own = final @ weight
        log_probs = transform(own if tile.bias is None else own + tile.bias) - normalizer
        probs = log_probs.clamp_min_(SHIFT_FLOOR).exp_()
        running = start @ weight
        for index, layer in enumerate([None, *layers]):
            if layer is not None:
                first = (index - 1) * (num_plain + num_added)
                for offset in range(num_plain + num_added):
                    linear = flat[first + offset].to(dtype) @ weight
                    if layer.stream is None and offset >= num_plain:
                        running += linear
                    modules.put(first + offset, body(linear, tile.bias, transform, None))
                if layer.stream is not None:
                    running = layer.stream.to(dtype) @ weight
            chosen[index] = pick(running, tokens, tile, chosen[index])
            at_top[index] = pick(running, head.top, tile, at_top[index])
            part = body(running, tile.bias, transform, probs)
            assert part.dot is not None  # probs were given
            dot[index] += part.dot
            stream.put(index, part)
        modules.merge()
        stream.merge()
        on_tile()

    if unembedding.bias is not None:
        chosen += unembedding.bias[tokens].to(dtype)
        at_top += unembedding.bias[head.top].to(dtype)
    log_normalizer = stream.log_normalizer()
    # Equal within float error counts as the top: a body may round its transform differently.
    slack = 1e-6 * stream.maximum.abs()
    per_site = modules.entropy().unflatten(0, (len(layers), num_plain + num_added))
    return PolicyReadings(
        plain=tuple(per_site[:, site] for site in range(num_plain)),
        added=tuple(per_site[:, num_plain + site] for site in range(num_added)),
        stream=stream.entropy(),
        nll=log_normalizer - transform(chosen),
        agree=(transform(at_top) >= stream.maximum - slack).double(),
        kl=(log_normalizer - dot - head.entropy).clamp_min(0.0),
    )
