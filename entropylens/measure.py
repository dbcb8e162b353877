"""measure(): checked responses through a verified model, sums kept response by response."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm import tqdm

from entropylens.capture import evaluating
from entropylens.kernels.compiled import select_body
from entropylens.memory import allocations_explained, estimate, smaller_batches
from entropylens.meter import Meter
from entropylens.planning import plan
from entropylens.policy import EAGER, Body
from entropylens.precision import settle
from entropylens.responses import Response, Responses
from entropylens.results import Analysis
from entropylens.rundir import RunDirectory
from entropylens.sources.subject import Subject
from entropylens.tokens import TokenKeeper
from entropylens.versions import versions

if TYPE_CHECKING:
    from entropylens.workers import Workers

__all__ = ["BATCH_TOKENS", "Measured", "Station", "measure"]

logger = logging.getLogger(__name__)

#: Rows of responses.parquet, and of tokens.parquet where single tokens are kept.
Measured = tuple[pd.DataFrame, pd.DataFrame | None]

#: Response positions whose states are held at a time.
BATCH_TOKENS = 512


class Station:
    """Where groups of responses are measured: the model, the body that reduces its logits.

    Args:
        subject: the model.
        items: all responses.
        keeper: makes the rows of single tokens, where they are wanted.
        reading, batch_tokens, kernel, seed: as for `analyze`.
        num_logits: of the whole run, wherever the rest of it is measured.
        precision: exact, or fast: bf16 products where they are near enough.

    Attributes:
        kernel: the name of the body.
        memory: bytes that are needed above the model, roughly.
        precision: what became of `fast`, as results tell it.
    """

    def __init__(
        self,
        subject: Subject,
        items: Sequence[Response],
        keeper: TokenKeeper | None,
        *,
        reading: str,
        batch_tokens: int,
        kernel: str,
        num_logits: float,
        seed: int,
        precision: str,
    ) -> None:
        body: Body = EAGER  # what a server runs
        if subject.remote is None:
            body = select_body(kernel, subject.anatomy.device, num_logits)
            if body.name == "triton" and subject.dtype == "float64":
                logger.warning("the Triton kernel takes no float64: the eager body runs instead")
                body = EAGER
        self._model, self._batch_tokens = subject.model, batch_tokens
        fast = None
        if precision == "fast":
            fast = settle(subject, items, reading, body, batch_tokens)
        self.precision = {"precision": "exact"} if fast is None else fast.told
        self._meter = Meter(subject, items, reading, body, seed, keeper, fast)
        self.kernel = body.name
        held = min(batch_tokens, sum(response.num_tokens for response in items))
        self.memory = estimate(subject.anatomy, held, reading)

    def measure(self, group: Sequence[int], bar: tqdm[Any]) -> Measured:
        """See `Meter.measure`.

        Raises:
            NonFiniteStatesError, AllocationError: what their names say.
        """
        explained = allocations_explained(*smaller_batches(self._batch_tokens))
        with explained, evaluating(self._model):
            return self._meter.measure(group, self._batch_tokens, bar)


def measure(
    subject: Subject | Workers,
    responses: Responses,
    run: RunDirectory | None = None,
    *,
    reading: str = "raw",
    batch_tokens: int = BATCH_TOKENS,
    kernel: str = "auto",
    seed: int = 0,
    keeper: TokenKeeper | None = None,
    progress: bool = True,
    precision: str = "exact",
) -> Analysis:
    """Measure checked responses; what `run` holds already is not computed again.

    Args:
        subject: the model, or workers that hold it.
        responses: what it is read over.
        run: keeps what is finished, or None.
        reading, batch_tokens, kernel, seed, progress, precision: as for `analyze`.
        keeper: makes the rows of single tokens, where they are wanted.

    Raises:
        NonFiniteStatesError, AllocationError: what their names say.
    """
    items = responses.items
    facts = subject.facts
    frames, tokens = ([], []) if run is None else run.finished()
    finished = {index for frame in frames for index in frame["response_id"]}
    planned = plan(items, batch_tokens, facts.passes)
    groups = [[index for index in it if index not in finished] for it in planned]
    groups = [group for group in groups if group]
    total = sum(response.num_tokens for response in items)
    sites = 4 * facts.num_layers + 2
    settings: dict[str, Any] = {
        "reading": reading,
        "batch_tokens": batch_tokens,
        "kernel": kernel,
        "num_logits": float(total) * sites * facts.vocab_size,
        "seed": seed,
        "precision": precision,
    }
    told: Mapping[str, Any]
    if isinstance(subject, Subject):
        station = Station(subject, items, keeper, **settings)
        kernel, memory, told = station.kernel, station.memory, station.precision
    else:
        kernel, memory, told = subject.begin(items, keeper, settings)
    logger.info(
        "%d responses, %d tokens; %s kernel; about %.0f MB above the model",
        *(len(items), total, kernel, memory / 1e6),
    )
    if keeper is not None:
        size = keeper.size([it.num_tokens for it in items], facts.num_layers)
        logger.info("single tokens are kept: about %.1f MB", size / 1e6)
    bar = tqdm(
        total=total,
        initial=sum(items[index].num_tokens for index in finished),
        desc="measuring",
        unit="tok",
        disable=not progress,
    )
    measured: Iterable[Measured]
    if isinstance(subject, Subject):
        measured = (station.measure(group, bar) for group in groups)
    else:
        measured = subject.measured(groups, bar)
    with bar:
        for rows, kept in measured:
            frames.append(rows)
            if kept is not None:
                tokens.append(kept)
            if run is not None:
                run.add(rows, kept)
    table = pd.concat(frames, ignore_index=True)
    table = table.sort_values(["response_id", "layer"], ignore_index=True)
    return Analysis(
        model=facts.name,
        revision=facts.revision,
        num_layers=facts.num_layers,
        vocab_size=facts.vocab_size,
        dtype=facts.dtype,
        reading=reading,
        kernel=kernel,
        mixers=facts.mixers,
        responses=table,
        skipped=responses.skipped,
        seed=seed,
        versions=versions(),
        tokens=_in_order(tokens) if tokens else None,
        settings=told,
    )


def _in_order(tokens: Sequence[pd.DataFrame]) -> pd.DataFrame:
    order = ["response_id", "position", "layer"]
    return pd.concat(tokens, ignore_index=True).sort_values(order, ignore_index=True)
