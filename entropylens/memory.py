"""How much memory a run will take above the model, and what to try when it is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from entropylens.anatomy import Anatomy
from entropylens.batching import FORWARD_FACTOR
from entropylens.errors import AllocationError
from entropylens.policy import VOCAB_TILE

__all__ = ["allocations_explained", "estimate"]

#: Sites held a layer: attn_in, attn_out, ffn_in, ffn_out, stream_out.
SITES = 5


def estimate(anatomy: Anatomy, batch_tokens: int) -> int:
    """Bytes above the model that `batch_tokens` response positions need, roughly.

    The states of all sites, a forward pass of FORWARD_FACTOR times as many positions, and a few
    tiles of logits.
    """
    d_model = anatomy.unembedding.d_model
    size = anatomy.unembedding.weight.element_size()
    states = (SITES * anatomy.num_layers + 2) * batch_tokens * d_model * size
    forward = 16 * FORWARD_FACTOR * batch_tokens * d_model * size
    tiles = 6 * batch_tokens * VOCAB_TILE * 4
    return states + forward + tiles


@contextlib.contextmanager
def allocations_explained(batch_tokens: int) -> Iterator[None]:
    """Name the smaller setting to try where an allocation fails.

    Raises:
        AllocationError: in place of what torch raises.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _too_large(batch_tokens) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise _too_large(batch_tokens) from error
        raise


def _too_large(batch_tokens: int) -> AllocationError:
    return AllocationError(
        f"not enough memory for --batch-tokens {batch_tokens}",
        f"try --batch-tokens {max(1, batch_tokens // 4)}; what was finished is kept",
    )
