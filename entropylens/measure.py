"""measure(): checked responses through a verified model, sums kept response by response."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pandas as pd
from tqdm import tqdm

from entropylens.batching import plan
from entropylens.capture import evaluating
from entropylens.kernels.compiled import select_body
from entropylens.memory import allocations_explained, estimate, smaller_batches
from entropylens.meter import Meter
from entropylens.policy import EAGER, Body
from entropylens.responses import Responses
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
        meter = Meter(subject, items, reading, body, seed, keeper)
        for whole_group in plan(items, batch_tokens):
            group = [index for index in whole_group if index not in finished]
            if not group:
                continue
            rows, kept = meter.measure(group, batch_tokens, bar)
            frames.append(rows)
            if kept is not None:
                tokens.append(kept)
            if run is not None:
                run.add(rows, kept)
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
