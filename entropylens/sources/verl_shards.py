"""The shards of a veRL checkpoint: read without running code, merged tensor by tensor."""

from __future__ import annotations

import contextlib
import logging
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from entropylens.errors import WeightsError
from entropylens.memory import is_allocation_failure

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["COPY_AGAIN", "StateDict", "local_part", "merge", "misfit", "own_dtype", "read_shard"]

COPY_AGAIN = "copy the checkpoint again, or name another step"

#: One rank's tensors by name.
StateDict = Mapping[str, torch.Tensor]


def read_shard(file: Path) -> StateDict:
    """One rank's tensors, mapped from the file; nothing but tensors can come out of it.

    Raises:
        WeightsError: it is corrupt, or holds more than tensors.
    """
    # Importing it is what lets weights_only pass DTensor, its mesh and placements, and only them.
    import torch.distributed.tensor

    try:
        with _quiet_mesh():
            content = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL\s+(\S+)", str(error))
        what = f" (it calls {found[1]})" if found else ""
        raise WeightsError(
            f"shard {str(file)!r} holds more than tensors{what}",
            "it could run code and is not read; save the model again with veRL, or add hf_model "
            "to the run's checkpoint.save_contents",
        ) from error
    except Exception as error:  # torch raises anything from OSError to AttributeError here
        if is_allocation_failure(error):
            raise
        raise WeightsError(
            f"shard {str(file)!r} is truncated or corrupt ({str(error).strip()[:200]})",
            COPY_AGAIN,
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    ):
        raise WeightsError(f"shard {str(file)!r} is no state dict of a model", COPY_AGAIN)
    return content


def own_dtype(shard: StateDict) -> torch.dtype:
    """The dtype of most of its floating-point numbers."""
    sizes: dict[torch.dtype, int] = {torch.float32: 0}
    for tensor in shard.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def merge(name: str, parts: Sequence[torch.Tensor], actor: Path) -> torch.Tensor:
    """The whole tensor out of every rank's part of it, in memory of its own.

    Raises:
        WeightsError: the parts do not make up one tensor.
    """
    from torch.distributed.tensor import DTensor

    first = parts[0]
    sharded = [part for part in parts if isinstance(part, DTensor)]
    if not sharded:
        if any(not torch.equal(part, first) for part in parts):
            raise misfit(actor, f"{name} is not sharded, yet differs between ranks")
        return first.clone()
    if len(sharded) < len(parts) or any(
        part.shape != first.shape or part.placements != sharded[0].placements for part in sharded
    ):
        raise misfit(actor, f"ranks differ in how {name} is sharded")
    dim = _sharded_dim(name, sharded[0], actor)
    if dim is None:
        return local_part(first).clone()
    merged = torch.cat(_first_replica(sharded, dim), dim)
    if merged.shape != first.shape:
        raise misfit(
            actor, f"the parts of {name} make up {tuple(merged.shape)}, not {tuple(first.shape)}"
        )
    return merged


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def misfit(actor: Path, what: str) -> WeightsError:
    """The error of shards that contradict one another or their configuration."""
    return WeightsError(
        f"the shards of {str(actor)!r} do not fit together or their configuration ({what})",
        "copy the checkpoint again, with its own huggingface/config.json",
    )


@contextlib.contextmanager
def _quiet_mesh() -> Iterator[None]:
    """Keep torch from warning, once a mesh, that there are no process groups here."""
    logger = logging.getLogger("torch.distributed.device_mesh")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _sharded_dim(name: str, part: DTensor, actor: Path) -> int | None:
    """The dimension that is spread over ranks, or None where each rank holds all of it.

    veRL's meshes are (fsdp) and (ddp, fsdp): one placement, or a Replicate before it.
    """
    from torch.distributed.tensor import Replicate, Shard

    *outer, inner = part.placements
    if len(outer) <= 1 and all(isinstance(one, Replicate) for one in outer):
        if isinstance(inner, Replicate):
            return None
        if type(inner) is Shard:
            return inner.dim % part.ndim
    raise WeightsError(
        f"checkpoint {str(actor)!r} shards {name} in a way that is not read here "
        f"({', '.join(map(str, part.placements))})",
        "add hf_model to the run's checkpoint.save_contents, or save with FSDP alone",
    )


def _first_replica(parts: Sequence[DTensor], dim: int) -> list[torch.Tensor]:
    """The parts of ranks 0, 1, ... until the tensor is whole; a (ddp, fsdp) mesh repeats it then.

    The mesh in the file is not asked: its pickled form changes between versions of torch.
    """
    pieces: list[torch.Tensor] = []
    length = 0
    for part in parts:
        if length >= parts[0].shape[dim]:
            break
        pieces.append(local_part(part))
        length += pieces[-1].shape[dim]
    return pieces
