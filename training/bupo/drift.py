"""What changed since step 0: KL from the first pi_theta, and cos(H^l, H^m) (Figure 5a).

Policies are compared over the whole vocabulary, tile by tile: no row of logits is ever whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from entropylens.anatomy import Anatomy
from entropylens.batching import pieces
from entropylens.errors import WeightsError
from entropylens.files import write_whole
from entropylens.planning import plan
from entropylens.policy import Unembedding, compute_dtype, policy_head
from entropylens.responses import Response
from entropylens.transform import OutputTransform

__all__ = ["Drift", "Start", "divergence", "measure_drift", "similarity"]


@dataclass(frozen=True)
class Start:
    """pi_theta of step 0 over the set: what lm_head read then, and lm_head itself.

    Args:
        states: N(H^L) at all response positions in the set's order, in their own dtype.
        unembedding: E_u of step 0 and its bias in their own dtype, with the output transform.
    """

    states: Float[Tensor, "positions d_model"]
    unembedding: Unembedding

    def save(self, path: Path, mark: str) -> None:
        """Write a safetensors file, whole.

        Args:
            path: the file.
            mark: a digest of the set, which `load` asks for.

        Raises:
            OutputDirectoryError: it cannot be written.
        """
        tensors = {"states": self.states, "weight": self.unembedding.weight}
        if self.unembedding.bias is not None:
            tensors["bias"] = self.unembedding.bias
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

        def write(aside: Path) -> None:
            try:
                save_file(tensors, aside, metadata={"responses": mark})
            except SafetensorError as error:  # its kind of OSError
                raise OSError(str(error)) from error

        write_whole(path, write)

    @classmethod
    def load(cls, path: Path, mark: str, transform: OutputTransform) -> Start:
        """Open what `save` wrote; pages are read from the disk as they are used.

        Args:
            path: the file.
            mark: the digest that the file must carry.
            transform: what the model does to lm_head's output; training does not change it.

        Raises:
            WeightsError: it is damaged, or of another set.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if (file.metadata() or {}).get("responses") != mark:
                    raise SafetensorError("it belongs to other responses")
            states, weight = tensors["states"], tensors["weight"]
        except (SafetensorError, OSError, KeyError) as error:
            raise WeightsError(
                f"{str(path)!r} cannot be used ({error})",
                "start the fixed set in a new directory, with a look at step 0",
            ) from error
        return cls(states, Unembedding(weight, tensors.get("bias"), transform))


@dataclass(frozen=True)
class Drift:
    """What one pass over the set found.

    Args:
        kl: one a response, KL(pi_theta of step 0 || pi_theta), mean over its tokens in nats.
        similarity: m -> mean over all response positions of cos(H^l, H^m), for every m > l.
        start: pi_theta of the weights at hand where no earlier one was given, else None.
    """

    kl: tuple[float, ...]
    similarity: Mapping[int, float]
    start: Start | None


def measure_drift(
    anatomy: Anatomy,
    responses: Sequence[Response],
    layer: int,
    start: Start | None,
    *,
    batch_tokens: int,
    progress: bool = False,
) -> Drift:
    """Run the responses through the model once.

    Args:
        anatomy: of a model in evaluation mode.
        responses: the set.
        layer: l, from 1 to L.
        start: pi_theta of step 0, or None where the weights at hand are step 0's: kl is then 0.
        batch_tokens: response positions whose states are held at a time.
        progress: show a progress bar.
    """
    unembedding, layers = anatomy.unembedding, anatomy.num_layers
    device = unembedding.weight.device
    lengths = torch.tensor([response.num_tokens for response in responses])
    total = int(lengths.sum())
    then = None if start is None else _moved(start.unembedding, device)
    kl = torch.zeros(len(responses), dtype=torch.float64)
    cosines: list[list[float]] = []
    kept: Tensor | None = None
    unread = (lengths.cumsum(0) - lengths).tolist()  # each response's next place in the set
    bar = tqdm(total=total, desc="comparing", unit="tok", disable=not progress)
    with bar, torch.inference_mode():
        for group in plan(responses, batch_tokens, anatomy.passes):
            for piece in pieces(anatomy, responses, group, batch_tokens):
                final, rows = piece.states.final, _places(piece.owner, unread)
                cosines.append(similarity(piece.states.stream_out[layer - 1 :]).sum(-1).tolist())
                if start is None or then is None:
                    if kept is None:
                        kept = torch.empty(total, final.shape[1], dtype=final.dtype)
                    kept[rows] = final.cpu()
                else:
                    found = divergence(start.states[rows].to(device), then, final, unembedding)
                    kl.index_add_(0, piece.owner, found.cpu())
                bar.update(len(rows))
    # Exact sums: the order of batches leaves no trace.
    means = [math.fsum(column) / total for column in zip(*cosines, strict=True)]
    return Drift(
        kl=tuple((kl / lengths).tolist()),
        similarity=dict(zip(range(layer + 1, layers + 1), means, strict=True)),
        start=None if kept is None else Start(kept, unembedding),
    )


def similarity(
    streams: Float[Tensor, "layers positions d_model"],
) -> Float[Tensor, "higher positions"]:
    """cos(H^l, H^m) of the first of some layers with each of the others, in float64."""
    lowest = streams[0].double()
    shape = (len(streams) - 1, len(lowest))
    found = torch.zeros(shape, dtype=torch.float64, device=streams.device)
    for place, other in enumerate(streams[1:]):
        found[place] = torch.cosine_similarity(lowest, other.double(), dim=-1)
    return found


def divergence(
    start: Float[Tensor, "positions d_model"],
    start_unembedding: Unembedding,
    states: Float[Tensor, "positions d_model"],
    unembedding: Unembedding,
) -> Float[Tensor, " positions"]:
    """KL(p || q) of two policies over the whole vocabulary, in nats, float64.

    It is summed as q - p - p (log q - log p): the same where both sum to 1, never negative, and a
    rounding of the logits counts only by its square. A KL of 1e-6 shows in float32.

    Args:
        start: what lm_head read under p.
        start_unembedding: lm_head under p, with the output transform.
        states: what it reads under q.
        unembedding: lm_head under q, with the output transform.
    """
    dtype = torch.promote_types(compute_dtype(start), compute_dtype(states))
    sides = ((start.to(dtype), start_unembedding), (states.to(dtype), unembedding))
    nothing = torch.zeros(len(states), dtype=torch.long, device=states.device)
    normalizers = [policy_head(*side, nothing).log_normalizer.unsqueeze(-1) for side in sides]
    found = torch.zeros(len(states), dtype=torch.float64, device=states.device)
    for tiles in zip(start_unembedding.tiles(dtype), unembedding.tiles(dtype), strict=True):
        p, q = (
            head.transform(torch.nn.functional.linear(read, tile.weight, tile.bias)) - normalizer
            for tile, (read, head), normalizer in zip(tiles, sides, normalizers, strict=True)
        )
        found += (q.exp() - p.exp() * (1 + q - p)).sum(-1)
    return found


def _moved(unembedding: Unembedding, device: torch.device) -> Unembedding:
    bias = None if unembedding.bias is None else unembedding.bias.to(device)
    return Unembedding(unembedding.weight.to(device), bias, unembedding.transform)


def _places(owner: Tensor, unread: list[int]) -> Tensor:
    """Where in the set the positions of a piece stand; `unread` is moved on past them."""
    places = []
    for index, count in zip(*owner.unique_consecutive(return_counts=True), strict=True):
        first = unread[int(index)]
        unread[int(index)] = first + int(count)
        places.append(torch.arange(first, first + int(count)))
    return torch.cat(places)
