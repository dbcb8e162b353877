"""The pass over a tile of logits that never writes them: product and reduction in one kernel.

Triton is imported where it is first used. What the kernel computes is in fused_triton.py; what
a reading makes of it in fused_reading.py.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropylens.policy import EAGER, SHIFT_FLOOR, TileStatistics
from entropylens.transform import IDENTITY, OutputTransform

__all__ = ["FUSED", "Asked", "FusedBody", "Statistics", "available", "merge", "reduce_rows"]

#: Vocabulary entries that one program walks at most: bounds what float32 sums lose.
LONGEST_SPAN = 16384
#: Entries that are worth a program of their own: the widest block.
SHORTEST_SPAN = 256
#: Share of a card's time that must be put to use before shorter spans stop being worth it.
BUSY = 0.9

#: Blocks (rows, columns, depth) under the interpreter: small, as its cost goes by blocks.
INTERPRETED = (32, 64, 32)


class FusedBody:
    """Names the fused kernel as what reads the policies, where its dtypes allow.

    A single tile of logits that was made already (pi_theta's, the same-norm control's) is
    reduced by plain torch.
    """

    name = "triton"

    def __call__(
        self,
        linear: Float[Tensor, "positions tile"],
        bias: Float[Tensor, " tile"] | None,
        transform: OutputTransform,
        probs: Float[Tensor, "positions tile"] | None,
    ) -> TileStatistics:
        """Reduce one tile of logits that is there already."""
        return EAGER(linear, bias, transform, probs)


FUSED = FusedBody()


class Asked(NamedTuple):
    """What a reading of the stream wants beside entropies; row r is of position r % positions.

    Args:
        probs: pi_theta over the tile, in float32.
        tokens: the produced tokens, counted from the tile's first; outside it they are nowhere.
        tops: pi_theta's most probable tokens, counted likewise.
    """

    probs: Float[Tensor, "positions tile"]
    tokens: Int[Tensor, " positions"]
    tops: Int[Tensor, " positions"]


class Statistics(NamedTuple):
    """Merged statistics of each row's policy, in float64; the last three only where asked for.

    Args:
        maximum, total, weighted: m, sum exp(l - m) and sum exp(l - m)(l - m).
        dot: sum pi_theta * l.
        at_token, at_top: the logits of the produced token and of pi_theta's top token.
    """

    maximum: Float[Tensor, " rows"]
    total: Float[Tensor, " rows"]
    weighted: Float[Tensor, " rows"]
    dot: Float[Tensor, " rows"] | None = None
    at_token: Float[Tensor, " rows"] | None = None
    at_top: Float[Tensor, " rows"] | None = None

    def entropy(self) -> Float[Tensor, " rows"]:
        """H in nats (Eq. 8)."""
        return self.total.log() - self.weighted / self.total

    def log_normalizer(self) -> Float[Tensor, " rows"]:
        """log sum exp(l)."""
        return self.maximum + self.total.log()


def reduce_rows(
    states: Float[Tensor, "rows d_model"],
    weight: Float[Tensor, "tile d_model"],
    bias: Float[Tensor, " tile"] | None,
    transform: OutputTransform,
    asked: Asked | None = None,
    span: int | None = None,
) -> Float[Tensor, "splits statistics rows"]:
    """Statistics of each row's policy over a tile of the vocabulary, for `merge`.

    Args:
        states: bf16, fp16 or float32; products are accumulated in float32.
        weight: the tile's rows of E_u.
        bias: the tile's bias or None.
        transform: the model's output transform.
        asked: what else to read, or None.
        span: columns that one program walks; by default such that few rows fill a card.

    Returns:
        float32: the fields of `Statistics`, three or all six, of each span of columns.
    """
    from entropylens.kernels import fused_triton

    rows, width = states.shape
    columns = len(weight)
    interpreted = _interpreting()
    states, weight = _rows_in_memory(states), _rows_in_memory(weight)
    block_rows = INTERPRETED[0] if interpreted else 128 if rows > 64 else 64
    if span is None:
        processors = 4 if interpreted else _processors(states.device)
        span = choose_span(math.ceil(rows / block_rows), columns, processors)
    splits = math.ceil(columns / span)
    out = torch.empty(
        splits, 3 if asked is None else 6, rows, dtype=torch.float32, device=states.device
    )
    nothing = out  # stands for pointers that the kernel does not follow
    probs = nothing if asked is None else _rows_in_memory(asked.probs)
    widen = interpreted or states.dtype != weight.dtype  # the interpreter multiplies bf16 as bits
    kernel: Any
    blocks: dict[str, int] = {}
    if interpreted:
        kernel, deepest = fused_triton.reduce_rows, INTERPRETED[2]
        blocks = {"BLOCK_COLUMNS": INTERPRETED[1], "BLOCK_DEPTH": INTERPRETED[2]}
    elif widen or states.dtype == torch.float32:
        kernel, deepest = fused_triton.tuned_single, fused_triton.SINGLE_DEPTH
    else:
        kernel, deepest = fused_triton.tuned_half, fused_triton.HALF_DEPTH
    with torch.cuda.device_of(states):
        kernel[(math.ceil(rows / block_rows), splits)](
            states,
            weight,
            nothing if bias is None else bias,
            probs,
            nothing if asked is None else asked.tokens,
            nothing if asked is None else asked.tops,
            out,
            rows,
            columns,
            1 if asked is None else len(asked.tokens),
            span,
            width,
            states.stride(0),
            weight.stride(0),
            probs.stride(0),
            transform.scale,
            transform.softcap or 1.0,
            HAS_BIAS=bias is not None,
            HAS_SCALE=transform.scale != 1.0,
            HAS_SOFTCAP=transform.softcap is not None,
            ASKED=asked is not None,
            WIDEN=widen,
            EVEN=width % deepest == 0,
            FLOOR=SHIFT_FLOOR,
            BLOCK_ROWS=block_rows,
            **blocks,
        )
    return out


def merge(parts: Float[Tensor, "splits statistics rows"]) -> Statistics:
    """One policy a row out of those of its vocabulary's parts, as `Accumulator` merges tiles."""
    maximum, total, weighted, *sums = parts.double().unbind(1)
    top = maximum.amax(0)
    shift = (maximum - top).clamp_min(SHIFT_FLOOR)
    scale = shift.exp()
    merged = (scale * (weighted + total * shift)).sum(0)
    return Statistics(top, (scale * total).sum(0), merged, *(one.sum(0) for one in sums))


def choose_span(row_blocks: int, columns: int, processors: int) -> int:
    """Columns a program: the longest span that keeps the processors busy to the end."""
    longest = min(LONGEST_SPAN, math.ceil(columns / SHORTEST_SPAN) * SHORTEST_SPAN)
    candidates = range(longest, 0, -SHORTEST_SPAN)

    def busy(span: int) -> float:
        rounds = math.ceil(row_blocks * math.ceil(columns / span) / processors)
        return row_blocks * columns / (rounds * processors * span)

    return next((it for it in candidates if busy(it) >= BUSY), max(candidates, key=busy))


@functools.cache
def available(device: torch.device) -> str:
    """Why the kernel cannot run there, found by running it once; empty where it can."""
    if device.type == "cpu" and not _interpreting():
        return "a CPU has only Triton's interpreter: set TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"Triton does not run on {device.type}"
    trial = torch.zeros(3, 5, dtype=torch.bfloat16, device=device)
    try:
        reduce_rows(trial, trial, None, IDENTITY)
        _synchronize(device)
    except Exception as error:  # the compiler's failures share no base class
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _processors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _rows_in_memory(matrix: Tensor) -> Tensor:
    """The same matrix with each row's entries side by side."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
