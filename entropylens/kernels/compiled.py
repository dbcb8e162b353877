"""The pass over a tile fused into one loop by torch.compile (needs a C++ compiler on a CPU)."""

from __future__ import annotations

import functools
import logging

import torch
from jaxtyping import Float
from torch import Tensor

from entropylens.kernels.fused import FUSED, available
from entropylens.policy import EAGER, SHIFT_FLOOR, Body, TileStatistics, compute_dtype
from entropylens.transform import IDENTITY, OutputTransform

__all__ = ["select_body"]

logger = logging.getLogger(__name__)

#: Logits (positions x sites x vocabulary) below which compiling costs more than it saves.
WORTH_COMPILING = 3e9


def _reduce(
    linear: Tensor, bias: Tensor | None, transform: OutputTransform, probs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    linear = linear.to(compute_dtype(linear))
    logits = transform(linear if bias is None else linear + bias)
    maximum = logits.amax(-1)
    shifted = (logits - maximum.unsqueeze(-1)).clamp_min(SHIFT_FLOOR)
    exponentials = shifted.exp()
    dot = None if probs is None else (probs * logits).sum(-1)
    return maximum, exponentials.sum(-1), (exponentials * shifted).sum(-1), dot


class CompiledBody:
    """`_reduce` through torch.compile, for any number of positions and any tile width."""

    name = "compiled"

    def __init__(self) -> None:
        self._reduce = torch.compile(_reduce, dynamic=True)

    def __call__(
        self,
        linear: Float[Tensor, "positions tile"],
        bias: Float[Tensor, " tile"] | None,
        transform: OutputTransform,
        probs: Float[Tensor, "positions tile"] | None,
    ) -> TileStatistics:
        """Reduce one tile."""
        return TileStatistics(*self._reduce(linear, bias, transform, probs))


@functools.cache
def _compiled(device_type: str) -> tuple[Body | None, str]:
    """The compiled body after a trial run, or None and why it cannot be had here."""
    trial = torch.zeros(3, 5, device=device_type)
    body = CompiledBody()
    try:
        body(trial, None, IDENTITY, None)
    except Exception as error:  # the compiler's failures share no base class
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0]
    return body, ""


def select_body(kernel: str, device: torch.device, num_logits: float) -> Body:
    """The body to use: `auto` takes Triton on a GPU, and else compiles where the work is worth it.

    Args:
        kernel: auto | triton | compiled | eager.
        device: where the states are.
        num_logits: logits of the whole run, as an estimate of its cost.

    Returns:
        A body; where one cannot be had a warning names the cause and a slower one is used.
    """
    if kernel == "triton" or (kernel == "auto" and device.type == "cuda"):
        why_not = available(device)
        if not why_not:
            return FUSED
        logger.warning("the Triton kernel cannot run (%s); plain tiles are read instead", why_not)
        if device.type == "cuda":  # torch.compile would want Triton too
            return EAGER
        kernel = "auto"
    if kernel == "eager" or (kernel == "auto" and num_logits < WORTH_COMPILING):
        return EAGER
    body, why_not = _compiled(device.type)
    if body is None:
        logger.warning(
            "the compiled pass cannot be built (%s); the eager one runs instead. "
            "On Debian: apt install g++ python3-dev",
            why_not,
        )
        return EAGER
    return body
