"""How much memory a run will take above the model, and what to try when it is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from entropylens.anatomy import Anatomy
from entropylens.errors import AllocationError
from entropylens.planning import FORWARD_FACTOR
from entropylens.policy import VOCAB_TILE

__all__ = ["allocations_explained", "estimate", "is_allocation_failure", "smaller_batches"]

#: Sites held a layer: attn_in, attn_out, ffn_in, ffn_out, stream_out.
SITES = 5
#: And behind the final norm: N(A), N(F), N(stream_mid), N(H).
NORMED_SITES = 4


def estimate(anatomy: Anatomy, batch_tokens: int, reading: str) -> int:
    """Bytes above the model that `batch_tokens` response positions need, roughly.

    The states of all sites, a forward pass of FORWARD_FACTOR times as many positions, its
    key-value cache where the model continues, and a few tiles of logits.
    """
    d_model = anatomy.unembedding.d_model
    size = anatomy.unembedding.weight.element_size()
    sites = SITES if reading == "raw" else SITES + NORMED_SITES
    states = (sites * anatomy.num_layers + 2) * batch_tokens * d_model * size
    forward = 16 * FORWARD_FACTOR * batch_tokens * d_model * size
    width = 2 * _cached_width(anatomy.decoder.config, d_model) if anatomy.passes.continues else 0
    cache = anatomy.num_layers * FORWARD_FACTOR * batch_tokens * width * size
    tiles = 6 * batch_tokens * VOCAB_TILE * 4
    return states + forward + cache + tiles


def _cached_width(config: Any, d_model: int) -> int:
    """Numbers that one layer caches of a position's keys."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return d_model
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(kept * (getattr(config, "head_dim", None) or d_model // heads))


@contextlib.contextmanager
def allocations_explained(settings: str, remedy: str) -> Iterator[None]:
    """Name the settings that were too much where an allocation fails, and what to try.

    Raises:
        AllocationError: in place of what torch raises.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
        raise AllocationError(f"not enough memory for {settings}", remedy) from error


def smaller_batches(batch_tokens: int) -> tuple[str, str]:
    """What `allocations_explained` says of too large batches."""
    return (
        f"{batch_tokens} response positions at a time",
        f"try --batch-tokens {max(1, batch_tokens // 4)} (a call's batch_tokens); what was "
        "finished is kept",
    )


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    said = ("can't allocate memory", "not enough memory", "out of memory")
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(text in str(error) for text in said)
