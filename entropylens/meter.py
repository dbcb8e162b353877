"""From groups of responses to the sums that an analysis keeps of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from entropylens.batching import Piece, batch, pieces
from entropylens.control import NormControl
from entropylens.errors import NonFiniteStatesError
from entropylens.policy import VOCAB_TILE, Body, policy_head
from entropylens.precision import Precision
from entropylens.quantities import quantities_of
from entropylens.readings import (
    TopTokens,
    blank_absent,
    geometry,
    normed_reading,
    raw_reading,
)
from entropylens.responses import Response
from entropylens.sources.subject import Subject
from entropylens.tokens import TokenKeeper

__all__ = ["Meter"]


class Meter:
    """Measures groups of responses, keeping only sums.

    Args:
        subject: the model.
        items: all responses.
        reading: raw | normed | both.
        body: reduces the logits.
        seed: of the same-norm control.
        keeper: makes the rows of single tokens, where they are wanted.
        fast: which sites take bf16 products, or None where all are exact.
    """

    def __init__(
        self,
        subject: Subject,
        items: Sequence[Response],
        reading: str,
        body: Body,
        seed: int,
        keeper: TokenKeeper | None,
        fast: Precision | None = None,
    ) -> None:
        self.keeper = keeper
        self.top = TopTokens(keeper.top) if keeper is not None and keeper.top else None
        self.kept = torch.zeros(0, dtype=torch.long)
        self.anatomy, self.remote = subject.anatomy, subject.remote
        self.items = items
        self.reading = reading
        self.fast = {} if fast is None else fast.sites
        self.body = body
        self.names = quantities_of(reading)
        self.control: NormControl | None = None
        tiles = math.ceil(self.anatomy.unembedding.vocab_size / VOCAB_TILE)
        self.ticks = tiles * (2 if reading == "both" else 1)
        self.seed = seed

    def measure(
        self, group: Sequence[int], batch_tokens: int, bar: tqdm[Any]
    ) -> tuple[pd.DataFrame, pd.DataFrame | None]:
        """Rows of responses.parquet for one group's responses, and of its single tokens if kept.

        Args:
            group: which responses, as `batching.plan` puts them together.
            batch_tokens: response positions whose states are held at a time.
            bar: moved on by the response tokens that were read.

        Raises:
            NonFiniteStatesError: states that are NaN or infinite.
        """
        single = []
        row = {index: place for place, index in enumerate(group)}
        layers = self.anatomy.num_layers
        sums = torch.zeros(len(group), layers, len(self.names), dtype=torch.float64)
        policy = torch.zeros(len(group), 2, dtype=torch.float64)
        for owners, quantities, head in self._readings(group, batch_tokens, bar):
            if self.keeper is not None and len(self.kept):
                single.append(self.keeper.rows(self.kept, self.items, quantities, self.top))
            owner = torch.tensor([row[int(index)] for index in owners])
            stacked = torch.stack([quantities[name] for name in self.names], dim=-1)
            sums.index_add_(0, owner, stacked.double().cpu().transpose(0, 1))
            policy.index_add_(0, owner, head.double().cpu())
            del quantities, stacked, head  # before the next forward pass
        tokens = np.array([self.items[index].num_tokens for index in group])
        rows = self._rows(group, tokens, sums.numpy(), policy.numpy())
        return rows, pd.concat(single, ignore_index=True) if single else None

    def _readings(
        self, group: Sequence[int], batch_tokens: int, bar: tqdm[Any]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
        """The owners of positions with what `_read` says of them, piece by piece."""
        if self.remote is not None:
            whole = batch(self.items, group)
            self._expect(whole.owner)
            quantities, head = self.remote.read(
                whole.input_ids, whole.positions, whole.tokens, self.reading, self.seed
            )
            self._check_finite({"rms_layer": quantities["rms_layer"]}, whole.owner)
            bar.update(len(whole.tokens))
            yield whole.owner, quantities, head
            return
        for piece in pieces(self.anatomy, self.items, group, batch_tokens):
            self._expect(piece.owner)
            quantities, head = self._read(piece, _Ticker(bar, len(piece.tokens), self.ticks))
            owner = piece.owner
            del piece
            yield owner, quantities, head
            del quantities, head

    def _expect(self, owner: Tensor) -> None:
        """Settle which of the positions that are read next are kept one by one."""
        if self.keeper is not None:
            self.kept = self.keeper.expect(owner)
        if self.top is not None:
            self.top.kept = self.kept

    def _read(self, piece: Piece, ticker: _Ticker) -> tuple[dict[str, Tensor], Tensor]:
        """Every quantity [layers, positions], and pi_theta's entropy and NLL [positions, 2]."""
        states, unembedding = piece.states, self.anatomy.unembedding
        tokens = piece.tokens.to(states.final.device)
        found = geometry(states)
        self._check_finite(found, piece.owner)
        head = policy_head(states.final, unembedding, tokens, self.body)
        if self.reading != "normed":
            found |= raw_reading(
                states, unembedding, head, tokens, self.body, ticker.tick, self.top,
                self.fast.get("raw"),
            )  # fmt: skip
            if self.control is None:
                self.control = NormControl(unembedding, self.body, self.seed)
            found |= self.control.deltas(found)
        if self.reading != "raw":
            norm = self.anatomy.norm
            top = self.top if self.reading == "normed" else None
            found |= normed_reading(
                states, norm, unembedding, head, tokens, self.body, ticker.tick, top,
                self.fast.get("normed"),
            )  # fmt: skip
        found = {name: values.to(found["rms_layer"].device) for name, values in found.items()}
        blank_absent(found, self.anatomy)
        return found, torch.stack([head.entropy, head.nll], dim=-1)

    def _check_finite(self, found: Mapping[str, Tensor], owner: Tensor) -> None:
        rms = torch.stack([values for name, values in found.items() if name.startswith("rms_")])
        bad = ~torch.isfinite(rms).all(dim=0)
        if bool(bad.any()):
            place, position = (int(index) for index in bad.nonzero()[0])
            raise NonFiniteStatesError(
                f"the states of layer {place + 1} are NaN or infinite in response "
                f"{int(owner[position]) + 1}",
                "check the weights, or load the model with --dtype float32",
            )

    def _rows(
        self,
        group: Sequence[int],
        tokens: np.ndarray[Any, Any],
        sums: np.ndarray[Any, Any],
        policy: np.ndarray[Any, Any],
    ) -> pd.DataFrame:
        layers = self.anatomy.num_layers
        chosen = [self.items[index] for index in group]
        keys = {
            "response_id": list(group),
            "prompt_id": [response.prompt_key for response in chosen],
            "problem_key": [response.problem or response.prompt_key for response in chosen],
            "response_key": [response.key for response in chosen],
            "task": [response.task for response in chosen],
            "num_tokens": tokens,
            "truncated": [response.truncated for response in chosen],
            "policy_entropy": policy[:, 0] / tokens,
            "policy_nll": policy[:, 1] / tokens,
        }
        rows = pd.DataFrame({name: np.repeat(values, layers) for name, values in keys.items()})
        rows.insert(5, "layer", np.tile(np.arange(1, layers + 1), len(group)))
        means = (sums / tokens[:, None, None]).reshape(-1, len(self.names))
        return pd.concat([rows, pd.DataFrame(means, columns=list(self.names))], axis=1)


class _Ticker:
    """Moves a bar of tokens on in equal steps, tile by tile."""

    def __init__(self, bar: tqdm[Any], tokens: int, ticks: int) -> None:
        self.bar, self.tokens, self.ticks = bar, tokens, ticks
        self.ticked = 0

    def tick(self) -> None:
        before = self.tokens * self.ticked // self.ticks
        self.ticked += 1
        self.bar.update(self.tokens * self.ticked // self.ticks - before)
