"""verify(): do the captured states really add up to what the model computes?

It stands apart from anatomy.py because it runs the model through capture.py, which reads
the anatomy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entropylens.anatomy import Anatomy, first_input
from entropylens.capture import States, capture, evaluating
from entropylens.errors import DecompositionError, NonFiniteStatesError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ENLARGED",
    "TRIAL_TOKENS",
    "Verification",
    "bounds",
    "relative_error",
    "trial_ids",
    "verify",
]

#: Tokens of the trial input: enough to fill attention, cheap on any model.
TRIAL_TOKENS = 16
#: So much larger attention's output must show in what the FFN reads, in any dtype.
ENLARGED = 1024


@dataclass(frozen=True)
class Verification:
    """How far stream_in + A + F is from stream_out, and the rebuilt logits from the model's.

    Args:
        stream_errors: one a layer, the largest |error| / |stream_out| over the trial positions.
        logits_error: the same for the logits.
        stream_bound: what stream_errors may be: 1e-4 in float32, 4 eps sqrt(L) in other types.
        logits_bound: what logits_error may be.
        middle_as_said: does the FFN read what attention added just where the anatomy says so?
        dtype: of the states, which E_u's need not be.
    """

    stream_errors: tuple[float, ...]
    logits_error: float
    stream_bound: float
    logits_bound: float
    middle_as_said: bool
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        """Whether every error is within its bound (a NaN is not), and the order is as said."""
        return (
            self.middle_as_said
            and self.logits_error <= self.logits_bound
            and all(error <= self.stream_bound for error in self.stream_errors)
        )

    def to_frame(self) -> pd.DataFrame:
        """One row a layer: `layer, error, bound`."""
        return pd.DataFrame(
            {
                "layer": range(1, len(self.stream_errors) + 1),
                "error": self.stream_errors,
                "bound": self.stream_bound,
            }
        )

    def raise_if_broken(self) -> None:
        """Raise what a user should see where the decomposition does not hold.

        Raises:
            NonFiniteStatesError: naming the first layer whose states are NaN or infinite.
            DecompositionError: naming the first layer that fails, or the logits.
        """
        if self.holds:
            return
        for layer, error in enumerate(self.stream_errors, start=1):
            if not math.isfinite(error):
                raise NonFiniteStatesError(
                    f"the states of layer {layer} are NaN or infinite on a trial input",
                    "check the weights, or load the model with --dtype float32",
                )
        remedy = (
            "the model adds something that its family's spec does not name; describe it with "
            "entropylens.register(), and see `entropylens doctor MODEL` for each layer's error"
        )
        broken = [
            layer
            for layer, error in enumerate(self.stream_errors, start=1)
            if not error <= self.stream_bound
        ]
        if broken:
            error = self.stream_errors[broken[0] - 1]
            raise DecompositionError(
                f"layer {broken[0]}: stream_in + attn_out + ffn_out differs from stream_out by "
                f"{error:.2g} of its size (allowed {self.stream_bound:.2g}; {len(broken)} of "
                f"{len(self.stream_errors)} layers fail)",
                remedy,
            )
        if not self.middle_as_said:
            raise DecompositionError(
                "whether attention and FFN run in parallel is not as the family's spec says",
                "set parallel= in entropylens.register()",
            )
        raise DecompositionError(
            f"final norm, unembedding and output transform give logits that differ from the "
            f"model's by {self.logits_error:.2g} of their size (allowed {self.logits_bound:.2g})",
            remedy,
        )


def verify(model: PreTrainedModel, anatomy: Anatomy) -> Verification:
    """Compare the captured states with the model's own sums and logits on a trial input."""
    length = TRIAL_TOKENS if anatomy.context is None else min(TRIAL_TOKENS, anatomy.context)
    ids = trial_ids(anatomy.unembedding.vocab_size, length)
    with evaluating(model), torch.inference_mode():
        states, _ = capture(anatomy, torch.arange(length), ids, use_cache=False)
        expected = model(input_ids=ids.to(anatomy.device), use_cache=False).logits[0]
        rebuilt = anatomy.unembedding.logits(states.final.to(anatomy.unembedding.weight.device))
        middle_as_said = _ffn_reads_attention(anatomy, ids, states) in (None, not anatomy.parallel)
        errors = tuple(
            relative_error(
                states.stream_in(place) + states.attn_out[place] + states.ffn_out[place],
                states.stream_out[place],
            )
            for place in range(anatomy.num_layers)
        )
    logits_error = relative_error(rebuilt, expected)
    return Verification(
        errors,
        logits_error,
        *bounds(states.final.dtype, anatomy.num_layers),
        middle_as_said,
        states.final.dtype,
    )


def bounds(dtype: torch.dtype, num_layers: int) -> tuple[float, float]:
    """What the errors of the streams and of the logits may be in states of this type."""
    if dtype in (torch.float32, torch.float64):
        return 1e-4, 1e-4
    rounding = 4 * torch.finfo(dtype).eps
    return rounding * math.sqrt(num_layers), rounding


def trial_ids(vocab_size: int, length: int) -> Int[Tensor, "1 sequence"]:
    """Different token ids for a forward pass that only looks at the model."""
    return (torch.arange(length) * 7919 + 11).remainder(vocab_size).unsqueeze(0)


class _Seen(Exception):
    """What the FFN read, in a forward pass that goes no further."""


def _ffn_reads_attention(
    anatomy: Anatomy, ids: Int[Tensor, "1 sequence"], states: States
) -> bool | None:
    """Does what attention adds change what the FFN of its layer reads? None where none has both."""
    for place, (attention, ffn) in enumerate(zip(anatomy.attention, anatomy.ffn, strict=True)):
        if attention is not None and ffn is not None and bool(states.attn_out[place].any()):
            break
    else:
        return None

    def enlarge(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * ENLARGED, *output[1:])
        return output * ENLARGED

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Seen(first_input(args, kwargs))

    handles = [module.register_forward_hook(enlarge) for module in attention.adds]
    handles.append(ffn.reads.register_forward_pre_hook(stop, with_kwargs=True))
    try:
        anatomy.decoder(input_ids=ids.to(anatomy.device), use_cache=False)
    except _Seen as seen:
        read: Tensor = seen.args[0].reshape(states.ffn_in[place].shape)
        return not torch.equal(read.to(states.ffn_in[place].device), states.ffn_in[place])
    finally:
        for handle in handles:
            handle.remove()
    return None


def relative_error(
    found: Float[Tensor, "positions width"], expected: Float[Tensor, "positions width"]
) -> float:
    """max over positions of RMS(found - expected) / RMS(expected)."""
    expected = expected.double()
    error = (found.double().to(expected.device) - expected).norm(dim=-1)
    return float((error / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)).max())
