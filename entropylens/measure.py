"""measure(): checked responses through a verified model, sums kept response by response."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from entropylens.batching import Piece, batch, pieces, plan
from entropylens.capture import evaluating
from entropylens.control import NormControl
from entropylens.errors import NonFiniteStatesError
from entropylens.kernels.compiled import select_body
from entropylens.memory import allocations_explained, estimate, smaller_batches
from entropylens.policy import EAGER, VOCAB_TILE, Body, policy_head
from entropylens.quantities import quantities_of
from entropylens.readings import (
    TopTokens,
    blank_absent,
    geometry,
    normed_reading,
    raw_reading,
)
from entropylens.responses import Response, Responses
from entropylens.results import Analysis
from entropylens.rundir import RunDirectory
from entropylens.sources.subject import Subject
from entropylens.tokens import TokenKeeper
from entropylens.versions import versions

__all__ = ["BATCH_TOKENS", "measure"]

logger = logging.getLogger(__name__)

#: Response positions whose states are held at a time.
BATCH_TOKENS = 512


def measure(
    subject: Subject,
    responses: Responses,
    run: RunDirectory | None = None,
    *,
    reading: str = "raw",
    batch_tokens: int = BATCH_TOKENS,
    kernel: str = "auto",
    seed: int = 0,
    keeper: TokenKeeper | None = None,
    progress: bool = True,
) -> Analysis:
    """Measure checked responses; what `run` holds already is not computed again.

    Args:
        subject: the model.
        responses: what it is read over.
        run: keeps what is finished, or None.
        reading, batch_tokens, kernel, seed, progress: as for `analyze`.
        keeper: makes the rows of single tokens, where they are wanted.

    Raises:
        NonFiniteStatesError, AllocationError: what their names say.
    """
    items = responses.items
    frames, tokens = ([], []) if run is None else run.finished()
    finished = {index for frame in frames for index in frame["response_id"]}
    total = sum(response.num_tokens for response in items)
    unembedding = subject.anatomy.unembedding
    sites = 4 * subject.anatomy.num_layers + 2
    body: Body = EAGER  # what a server runs
    if subject.remote is None:
        body = select_body(
            kernel, subject.anatomy.device, float(total) * sites * unembedding.vocab_size
        )
    logger.info(
        "%d responses, %d tokens; %s kernel; about %.0f MB above the model",
        *(len(items), total, body.name),
        estimate(subject.anatomy, min(batch_tokens, total), reading) / 1e6,
    )
    if keeper is not None:
        size = keeper.size([it.num_tokens for it in items], subject.anatomy.num_layers)
        logger.info("single tokens are kept: about %.1f MB", size / 1e6)
    bar = tqdm(
        total=total,
        initial=sum(items[index].num_tokens for index in finished),
        desc="measuring",
        unit="tok",
        disable=not progress,
    )
    with bar, allocations_explained(*smaller_batches(batch_tokens)), evaluating(subject.model):
        meter = _Meter(subject, items, reading, body, seed, keeper)
        for whole_group in plan(items, batch_tokens):
            group = [index for index in whole_group if index not in finished]
            if not group:
                continue
            rows = meter.measure(group, batch_tokens, bar)
            frames.append(rows)
            kept = meter.take_tokens()
            tokens += kept
            if run is not None:
                run.add(rows, pd.concat(kept, ignore_index=True) if kept else None)
    table = pd.concat(frames, ignore_index=True)
    table = table.sort_values(["response_id", "layer"], ignore_index=True)
    return Analysis(
        model=subject.name,
        revision=subject.revision,
        num_layers=subject.anatomy.num_layers,
        vocab_size=unembedding.vocab_size,
        dtype=subject.dtype,
        reading=reading,
        kernel=body.name,
        mixers=subject.anatomy.mixers,
        responses=table,
        skipped=responses.skipped,
        seed=seed,
        versions=versions(),
        tokens=_in_order(tokens) if tokens else None,
    )


def _in_order(tokens: Sequence[pd.DataFrame]) -> pd.DataFrame:
    order = ["response_id", "position", "layer"]
    return pd.concat(tokens, ignore_index=True).sort_values(order, ignore_index=True)


class _Meter:
    """Measures groups of responses, keeping only sums."""

    def __init__(
        self,
        subject: Subject,
        items: Sequence[Response],
        reading: str,
        body: Body,
        seed: int,
        keeper: TokenKeeper | None,
    ) -> None:
        self.keeper = keeper
        self.top = TopTokens(keeper.top) if keeper is not None and keeper.top else None
        self.tokens: list[pd.DataFrame] = []
        self.kept = torch.zeros(0, dtype=torch.long)
        self.anatomy, self.remote = subject.anatomy, subject.remote
        self.items = items
        self.reading = reading
        self.body = body
        self.names = quantities_of(reading)
        self.control: NormControl | None = None
        tiles = math.ceil(self.anatomy.unembedding.vocab_size / VOCAB_TILE)
        self.ticks = tiles * (2 if reading == "both" else 1)
        self.seed = seed

    def measure(self, group: Sequence[int], batch_tokens: int, bar: tqdm[Any]) -> pd.DataFrame:
        """Rows of responses.parquet for the responses of one group."""
        row = {index: place for place, index in enumerate(group)}
        layers = self.anatomy.num_layers
        sums = torch.zeros(len(group), layers, len(self.names), dtype=torch.float64)
        policy = torch.zeros(len(group), 2, dtype=torch.float64)
        for owners, quantities, head in self._readings(group, batch_tokens, bar):
            if self.keeper is not None and len(self.kept):
                rows = self.keeper.rows(self.kept, self.items, quantities, self.top)
                self.tokens.append(rows)
            owner = torch.tensor([row[int(index)] for index in owners])
            stacked = torch.stack([quantities[name] for name in self.names], dim=-1)
            sums.index_add_(0, owner, stacked.double().cpu().transpose(0, 1))
            policy.index_add_(0, owner, head.double().cpu())
            del quantities, stacked, head  # before the next forward pass
        tokens = np.array([self.items[index].num_tokens for index in group])
        return self._rows(group, tokens, sums.numpy(), policy.numpy())

    def take_tokens(self) -> list[pd.DataFrame]:
        """The rows of single tokens since the last call."""
        taken, self.tokens = self.tokens, []
        return taken

    def _readings(
        self, group: Sequence[int], batch_tokens: int, bar: tqdm[Any]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
        """The owners of positions with what `_read` says of them, piece by piece."""
        if self.remote is not None:
            whole = batch(self.items, group)
            self._expect(whole.owner)
            quantities, head = self.remote.read(
                whole.input_ids, whole.mask, whole.positions, whole.tokens, self.reading, self.seed
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
                states, unembedding, head, tokens, self.body, ticker.tick, self.top
            )
            if self.control is None:
                self.control = NormControl(unembedding, self.body, self.seed)
            found |= self.control.deltas(found)
        if self.reading != "raw":
            norm = self.anatomy.norm
            top = self.top if self.reading == "normed" else None
            found |= normed_reading(
                states, norm, unembedding, head, tokens, self.body, ticker.tick, top
            )
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
            "response_key": [response.key for response in chosen],
            "task": [response.task for response in chosen],
            "num_tokens": tokens,
            "truncated": [response.truncated for response in chosen],
            "policy_entropy": policy[:, 0] / tokens,
            "policy_nll": policy[:, 1] / tokens,
        }
        rows = pd.DataFrame({name: np.repeat(values, layers) for name, values in keys.items()})
        rows.insert(4, "layer", np.tile(np.arange(1, layers + 1), len(group)))
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
