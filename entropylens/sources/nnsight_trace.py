"""What runs inside an nnsight trace, beside the model: states are read there and reduced there.

nnsight.py sends this module and those it imports as text, since a server has no entropylens
installed. So it takes and returns builtin types and tensors only, never an object of a class
of its own.

`sites` of all functions, with an envoy in the place of each module of an `Anatomy`:

- `model`, `layers` (one a layer), `final_norm`, `unembedding`
- `attn`, `ffn`: one a layer, (what reads, [what adds]) in the order of the forward pass, or None
- `scale`, `parallel`, `transform` (scale, softcap), `vocab_size`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from entropylens.anatomy import first_input, first_tensor
from entropylens.capture import States
from entropylens.control import NormControl
from entropylens.policy import EAGER, Unembedding, policy_head
from entropylens.readings import geometry, normed_reading, raw_reading
from entropylens.transform import OutputTransform
from entropylens.unembedding import bias_of, weight_of
from entropylens.verification import ENLARGED, relative_error

__all__ = ["read", "verify"]

Sites = Mapping[str, Any]

#: A smaller change of what the FFN reads is the rounding between two rows of a batch.
READ_CHANGE = 1e-2


def read(sites: Sites, request: Mapping[str, Any]) -> dict[str, Any]:
    """Every quantity at some positions, without the control's interpolation.

    Args:
        sites: see above.
        request: `positions` [positions], `tokens` [positions], `reading`, `seed`, and whether
            the same-norm `control`'s curve is wanted.

    Returns:
        `quantities` (name -> [layers, positions]), `head` [positions, 2] of pi_theta's entropy
        and NLL, and `curve`: log norms and entropies of the control, or None.
    """
    with torch.no_grad():
        states = _Walk(sites, request["positions"]).states()
        unembedding = _unembedding(sites, states.final)
        # A server may run requests under autocast; products here are float32 by their meaning.
        with torch.autocast(states.final.device.type, enabled=False):
            return _reduced(sites, states, unembedding, request)


def verify(sites: Sites, request: Mapping[str, Any]) -> dict[str, Any]:
    """Errors of the sums and of the rebuilt logits, on a batch of two equal rows.

    The second row has what one attention adds enlarged, which its FFN reads or does not.

    Args:
        sites: see above.
        request: `length` of the rows.

    Returns:
        `stream_errors`, `logits_error`, `ffn_reads_attention` (None where no layer has both), and
        the `dtype` of the states.
    """
    length = request["length"]
    with torch.no_grad():
        walk = _Walk(sites, torch.arange(2 * length), nudge=True)
        states = walk.states()
        expected = sites["model"].output.logits[0]
        unembedding = _unembedding(sites, states.final)
        with torch.autocast(states.final.device.type, enabled=False):
            rebuilt = unembedding.logits(states.final[:length])
        ffn_reads_attention = None
        if walk.nudged is not None:
            ffn_in = states.ffn_in[walk.nudged]
            change = relative_error(ffn_in[length:], ffn_in[:length])
            ffn_reads_attention = not change <= READ_CHANGE  # too large for fp16 is a change too
        return {
            "stream_errors": [_stream_error(states, place, length) for place in range(len(walk))],
            "logits_error": relative_error(rebuilt, expected),
            "ffn_reads_attention": ffn_reads_attention,
            "dtype": str(states.final.dtype).removeprefix("torch."),
        }


def _stream_error(states: States, place: int, length: int) -> float:
    found = states.stream_in(place) + states.attn_out[place] + states.ffn_out[place]
    return relative_error(found[:length], states.stream_out[place][:length])


class _Walk:
    """Reads the sites of a running forward pass, in the order in which the model reaches them."""

    def __init__(self, sites: Sites, positions: Tensor, nudge: bool = False) -> None:
        self.sites = sites
        self.positions = positions
        self.nudge = nudge
        self.nudged: int | None = None
        self.device: torch.device | None = _device(sites["unembedding"])

    def __len__(self) -> int:
        return len(self.sites["layers"])

    def states(self) -> States:
        embedding = self._chosen(_given(self.sites["layers"][0]))
        blocks = {
            name: embedding.new_zeros((len(self), *embedding.shape))
            for name in ("attn_in", "attn_out", "ffn_in", "ffn_out", "stream_out")
        }
        for place, layer in enumerate(self.sites["layers"]):
            for name in ("attn", "ffn"):
                branch = self.sites[name][place]
                if branch is not None:
                    self._branch(blocks[f"{name}_in"][place], blocks[f"{name}_out"][place], branch)
                    if name == "attn" and self.sites["ffn"][place] is not None:
                        self._nudge(place, branch, blocks["attn_out"][place])
            blocks["stream_out"][place] = self._chosen(first_tensor(layer.output))
        final = self._chosen(first_tensor(self.sites["final_norm"].output))
        return States(embedding=embedding, final=final, parallel=self.sites["parallel"], **blocks)

    def _branch(self, given: Tensor, added: Tensor, branch: tuple[Any, list[Any]]) -> None:
        reads, adds = branch
        given.copy_(self._chosen(_given(reads)))
        for module in adds:
            hidden = first_tensor(module.output)
            scale = self.sites["scale"]
            added += self._chosen(hidden if scale == 1.0 else hidden * scale)

    def _nudge(self, place: int, branch: tuple[Any, list[Any]], added: Tensor) -> None:
        """Enlarge what this layer's attention adds in the second of two rows."""
        if not self.nudge or self.nudged is not None or not bool(added.any()):
            return
        self.nudged = place
        # Of several modules only the last can still be changed: the model is past the others.
        module = branch[1][-1]
        output = module.output
        hidden = first_tensor(output)
        rows = hidden.reshape(2, -1, hidden.shape[-1]).clone()
        rows[1] *= ENLARGED
        larger = rows.reshape(hidden.shape)
        module.output = (larger, *output[1:]) if isinstance(output, tuple) else larger

    def _chosen(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = flat.index_select(0, self.positions.to(flat.device))
        return chosen if self.device is None else chosen.to(self.device)


def _given(envoy: Any) -> Tensor:
    """A module's first argument."""
    args, kwargs = envoy.inputs
    given: Tensor = first_input(args, kwargs)
    return given


def _reduced(
    sites: Sites, states: States, unembedding: Unembedding, request: Mapping[str, Any]
) -> dict[str, Any]:
    reading, tokens = request["reading"], request["tokens"].to(states.final.device)
    found = geometry(states)
    head = policy_head(states.final, unembedding, tokens, EAGER)
    if reading != "normed":
        found |= raw_reading(states, unembedding, head, tokens, EAGER)
    if reading != "raw":
        found |= normed_reading(states, _norm(sites), unembedding, head, tokens, EAGER)
    return {
        "quantities": {name: values.cpu() for name, values in found.items()},
        "head": torch.stack([head.entropy, head.nll], dim=-1).cpu(),
        "curve": _curve(unembedding, request["seed"]) if request["control"] else None,
    }


def _curve(unembedding: Unembedding, seed: int) -> list[Tensor]:
    """The control's nodes: scipy, which joins them, is not here but its stand-in."""
    return [torch.as_tensor(it) for it in NormControl(unembedding, EAGER, seed).whole()]


def _norm(sites: Sites) -> Callable[[Tensor], Tensor]:
    """N, called out of its turn."""
    envoy = sites["final_norm"]
    device = _device(envoy)

    def norm(states: Tensor) -> Tensor:
        there = states if device is None else states.to(device)
        return first_tensor(envoy(there)).to(states.device)

    return norm


def _unembedding(sites: Sites, like: Tensor) -> Unembedding:
    """E_u of the running model, from its weights or, where these are not here, by asking it.

    NDIF runs a request either in the model's process or in one that has its modules only.
    """
    envoy = sites["unembedding"]
    module = envoy._module
    weight = getattr(module, "weight", None)
    if _device(envoy) is not None and weight is not None and len(weight) == sites["vocab_size"]:
        weight, bias = weight_of(module), bias_of(module)
    else:
        weight, bias = _asked(envoy, like)
    return Unembedding(weight, bias, OutputTransform(*sites["transform"]))


def _asked(envoy: Any, like: Tensor) -> tuple[Tensor, Tensor | None]:
    bias: Tensor = envoy(like.new_zeros((1, like.shape[-1])))[0]
    units = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    weight = (envoy(units) - bias).T
    return weight, bias if bool(bias.any()) else None


def _device(envoy: Any) -> torch.device | None:
    """Where a module's weights are, or None where this process has none of them."""
    module = envoy._module
    if module is None:
        return None
    return next((weight.device for weight in module.parameters() if not weight.is_meta), None)
