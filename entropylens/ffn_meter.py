"""The FFNs' entropy changes at sampled positions: what a recommendation rests on, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from entropylens.batching import Piece, pieces
from entropylens.capture import States, evaluating
from entropylens.control import NormControl
from entropylens.errors import NonFiniteStatesError
from entropylens.kernels import fused_reading
from entropylens.kernels.fused import merge, reduce_rows
from entropylens.memory import allocations_explained, smaller_batches
from entropylens.planning import plan
from entropylens.policy import Accumulator, Body, Unembedding, compute_dtype, policy_head
from entropylens.products import product
from entropylens.quantities import prefix_of
from entropylens.readings import ROWS
from entropylens.responses import Response
from entropylens.sources.subject import Subject

__all__ = ["FFNMeter", "full_products", "sampled_positions"]

Groups = tuple[Float[Tensor, "layers positions d_model"], ...]


def sampled_positions(response: Response, count: int | None, seed: int) -> NDArray[Any]:
    """Positions of a response that are read: drawn without replacement, in their order.

    Every position is as likely as any other, so the mean over the drawn ones is an unbiased
    estimate of the mean over the response, and that mean times the response's whole number of
    tokens one of its token sum. Sums of prompts, and the ratio of sums that a profile is, are
    therefore estimated as if all had been read. An interval needs no term of its own for it: the
    draws of two prompts are independent, so a prompt's estimated sum varies between prompts by
    its own variance and that of the draw together, and what is resampled are these sums. (With
    all prompts of a finite set read, the interval is still about other prompts like these.)

    Args:
        response: the response; its content settles the draw, wherever it stands.
        count: how many; None for all. Fewer of them are a subset of more.
        seed: of the draw.

    Returns:
        positions from 0.
    """
    everything = np.arange(response.num_tokens)
    if count is None or count >= response.num_tokens:
        return everything
    random = np.random.default_rng([int(response.key, 16), seed])
    return np.sort(random.permutation(everything)[:count])


def full_products(num_layers: int, dtype: str) -> int:
    """Products of a state with E_u that `analyze` makes at each position for the raw reading.

    Four sites a layer, H^0 and N(H^L); in half precision H^l, too (see `readings.raw_reading`).
    """
    return (4 if dtype in ("float32", "float64") else 5) * num_layers + 2


class FFNMeter:
    """Reads delta_ffn with its same-norm control, or normed_delta_ffn, response by response.

    Args:
        subject: the model.
        reading: raw | normed.
        positions: how many of a response are read; None for all.
        body: reduces the logits.
        batch_tokens: response positions whose states are held at a time.
        seed: of positions and control.

    Attributes:
        names: the quantities read a layer.
        products: products of a state with E_u so far, without the control's 256 directions.
    """

    def __init__(
        self,
        subject: Subject,
        reading: str,
        positions: int | None,
        body: Body,
        batch_tokens: int,
        seed: int,
    ) -> None:
        self.model, self.anatomy = subject.model, subject.anatomy
        self.reading, self.positions, self.body = reading, positions, body
        self.batch_tokens, self.seed = batch_tokens, seed
        self.names: tuple[str, ...] = (f"{prefix_of(reading)}delta_ffn",)
        if reading == "raw":
            self.names += ("control_delta_ffn",)
        self.present = [place for place, it in enumerate(self.anatomy.ffn) if it is not None]
        self.products = 0
        self._control: NormControl | None = None

    def measure(self, items: Sequence[Response], bar: tqdm[Any]) -> pd.DataFrame:
        """One row a response and layer, as in responses.parquet: means over the sampled positions.

        Args:
            items: the responses.
            bar: moved on by the positions that were read.

        Returns:
            `response_id` (the place in items), `prompt_id, response_key, task, layer, num_tokens`
            (of the whole response), `num_positions`, policy_entropy, policy_nll` and `names`.

        Raises:
            NonFiniteStatesError, AllocationError: what their names say.
        """
        chosen = [sampled_positions(it, self.positions, self.seed) for it in items]
        sums = np.zeros((len(items), self.anatomy.num_layers, len(self.names)))
        policy = np.zeros((len(items), 2))
        explained = allocations_explained(*smaller_batches(self.batch_tokens))
        with explained, evaluating(self.model):
            for part in self._batches(items, chosen):
                values, head = self._read(part)
                np.add.at(sums, part.owner.numpy(), values)
                np.add.at(policy, part.owner.numpy(), head)
                self.products += len(part.owner) * (2 * len(self.present) + 1)
                bar.update(len(part.owner))
        return self._rows(items, np.array([len(it) for it in chosen]), sums, policy)

    def _batches(
        self, items: Sequence[Response], chosen: Sequence[NDArray[Any]]
    ) -> Iterator[_Sample]:
        """Samples of several forward passes together, as many positions as are held at a time."""
        held: list[_Sample] = []
        for group in plan(items, self.batch_tokens, self.anatomy.passes):
            seen = dict.fromkeys(group, 0)
            for piece in pieces(self.anatomy, items, group, self.batch_tokens):
                sample = self._sample(piece, chosen, seen)
                del piece  # before the next forward pass
                if not len(sample.owner):
                    continue
                size = sum(len(it.owner) for it in held) + len(sample.owner)
                if held and size > self.batch_tokens:
                    yield _joined(held)
                    held = []
                held.append(sample)
        yield _joined(held)

    def _sample(
        self, piece: Piece, chosen: Sequence[NDArray[Any]], seen: dict[int, int]
    ) -> _Sample:
        """The states that are read of a piece."""
        keep = np.zeros(len(piece.owner), dtype=bool)
        owners = piece.owner.numpy()
        for index in np.unique(owners):
            here = np.flatnonzero(owners == index)
            keep[here] = np.isin(seen[int(index)] + np.arange(len(here)), chosen[int(index)])
            seen[int(index)] += len(here)
        kept = torch.from_numpy(np.flatnonzero(keep))
        states = piece.states
        on_device = kept.to(states.final.device)
        sample = _Sample(
            groups=self._groups(states, on_device),
            final=states.final[on_device],
            tokens=piece.tokens[kept],
            owner=piece.owner[kept],
        )
        self._check_finite(sample)
        return sample

    def _groups(self, states: States, positions: Int[Tensor, " positions"]) -> Groups:
        """What the FFNs read and what they add, of the layers that have one."""
        added = states.ffn_out[:, positions][self.present]
        if self.reading == "raw" or not self.present:
            return states.ffn_in[:, positions][self.present], added
        with torch.inference_mode():
            bases = torch.stack([states.ffn_base(place)[positions] for place in self.present])
            return self.anatomy.norm(bases), self.anatomy.norm(added)

    def _read(self, sample: _Sample) -> tuple[NDArray[Any], NDArray[Any]]:
        """[positions, layers, names], and pi_theta's entropy and NLL [positions, 2]."""
        unembedding = self.anatomy.unembedding
        tokens = sample.tokens.to(sample.final.device)
        head = policy_head(sample.final, unembedding, tokens, self.body)
        found = np.full((len(tokens), self.anatomy.num_layers, len(self.names)), np.nan)
        if self.present:
            before, after = entropies(sample.groups, unembedding, self.body)
            found[:, self.present, 0] = (after - before).T.double().cpu().numpy()
        if self.present and self.reading == "raw":
            if self._control is None:
                self._control = NormControl(unembedding, self.body, self.seed)
            of_in, of_out = (self._control.entropy(_rms(group)) for group in sample.groups)
            found[:, self.present, 1] = (of_out - of_in).T
        return found, torch.stack([head.entropy, head.nll], dim=-1).double().cpu().numpy()

    def _check_finite(self, sample: _Sample) -> None:
        for group in (*sample.groups, sample.final.unsqueeze(0)):
            bad = ~torch.isfinite(group).all(-1)
            if bool(bad.any()):
                place, position = (int(index) for index in bad.nonzero()[0])
                layer = self.anatomy.num_layers
                if len(group) == len(self.present):
                    layer = self.present[place] + 1
                raise NonFiniteStatesError(
                    f"the states of layer {layer} are NaN or infinite in response "
                    f"{int(sample.owner[position]) + 1}",
                    "check the weights, or load the model with --dtype float32",
                )

    def _rows(
        self,
        items: Sequence[Response],
        counts: NDArray[Any],
        sums: NDArray[Any],
        policy: NDArray[Any],
    ) -> pd.DataFrame:
        layers = self.anatomy.num_layers
        keys = {
            "response_id": range(len(items)),
            "prompt_id": [it.prompt_key for it in items],
            "response_key": [it.key for it in items],
            "task": [it.task for it in items],
            "num_tokens": [it.num_tokens for it in items],
            "num_positions": counts,
            "policy_entropy": policy[:, 0] / counts,
            "policy_nll": policy[:, 1] / counts,
        }
        rows = pd.DataFrame({name: np.repeat(values, layers) for name, values in keys.items()})
        rows.insert(4, "layer", np.tile(np.arange(1, layers + 1), len(items)))
        means = (sums / counts[:, None, None]).reshape(-1, len(self.names))
        return pd.concat([rows, pd.DataFrame(means, columns=list(self.names))], axis=1)


class _Sample(NamedTuple):
    """States at the positions that are read, with the tokens produced there and whose they are."""

    groups: Groups
    final: Float[Tensor, "positions d_model"]
    tokens: Int[Tensor, " positions"]
    owner: Int[Tensor, " positions"]


def _joined(samples: Sequence[_Sample]) -> _Sample:
    if len(samples) == 1:
        return samples[0]
    groups, final, tokens, owner = zip(*samples, strict=True)
    return _Sample(
        tuple(torch.cat(group, dim=1) for group in zip(*groups, strict=True)),
        torch.cat(final),
        torch.cat(tokens),
        torch.cat(owner),
    )


def entropies(
    groups: Groups, unembedding: Unembedding, body: Body, on_tile: Callable[[], None] = lambda: None
) -> tuple[Float[Tensor, "layers positions"], ...]:
    """H(softmax(h E_u^T)) of every state of some sites, the vocabulary walked once (Eq. 8).

    Args:
        groups: the states of one site each, of the same layers and positions.
        unembedding: E_u with bias and output transform.
        body: which implementation reduces a tile.
        on_tile: called after each tile of the vocabulary.
    """
    layers, positions = groups[0].shape[:2]
    weight, transform = unembedding.weight, unembedding.transform
    if body.name == "triton" and {groups[0].dtype, weight.dtype} <= {*fused_reading.DTYPES}:
        parts = (
            reduce_rows(group.flatten(0, 1), weight, unembedding.bias, transform)
            for group in groups
        )
        return tuple(merge(part).entropy().unflatten(0, (-1, positions)) for part in parts)
    dtype = compute_dtype(groups[0])
    statistics = Accumulator(len(groups) * layers, positions, groups[0].device)
    step = max(1, ROWS // positions)
    for tile in unembedding.tiles(dtype):
        for first in range(0, layers, step):
            for place, group in enumerate(groups):
                states = group[first : first + step].flatten(0, 1).to(dtype)
                part = body(product(states, tile.weight), tile.bias, transform, None)
                statistics.put(place * layers + first, part)
        statistics.merge()
        on_tile()
    return tuple(statistics.entropy().unflatten(0, (len(groups), layers)))


def _rms(states: Float[Tensor, "layers positions d_model"]) -> Float[Tensor, "layers positions"]:
    """As `readings.geometry` has it: layer by layer, in float64."""
    return torch.stack([layer.double().square().mean(-1).sqrt() for layer in states])
