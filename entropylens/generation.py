"""Let a model answer: by any engine, with a progress bar, resumable."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from entropylens.completions import Journal
from entropylens.engines.engine import Answers, Engine, Job
from entropylens.prompts import Prompt
from entropylens.responses import Response
from entropylens.sampling import Sampling

__all__ = ["fill", "generate"]


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    journal: Path | None = None,
    *,
    progress: bool = True,
) -> tuple[Response, ...]:
    """Answer every prompt `num_samples` times, in the order prompt by prompt.

    Args:
        engine: what answers.
        prompts: what it is asked.
        sampling: how answers are drawn.
        journal: a JSONL file that finished answers are appended to and resumed from; it can be
            given to `analyze --responses`.
        progress: show a progress bar.

    Raises:
        OutputDirectoryError: the journal cannot be written, or is damaged.
    """
    answers: Answers = {}
    if journal is None:
        for fresh in _answered(engine, prompts, sampling, {}, progress):
            answers |= fresh
    else:
        kept = Journal(journal, engine, prompts, sampling)
        fill(kept, progress=progress)
        answers = {one.job: one.response_ids for one in kept.completions()}
    return tuple(
        Response(
            prompt_ids=prompts[prompt].ids,
            response_ids=answers[prompt, sample],
            truncated=answers[prompt, sample][-1] not in engine.ends,
            task=prompts[prompt].task,
            problem=prompts[prompt].problem,
        )
        for prompt, sample in _jobs(prompts, sampling)
    )


def fill(journal: Journal, *, progress: bool = True) -> None:
    """Answer what is missing in a journal; nothing of it is held in memory.

    Raises:
        OutputDirectoryError: the file cannot be written, is damaged, or is another model's.
    """
    journal.repair()
    finished = {one.job: len(one.response_ids) for one in journal.completions()}
    for fresh in _answered(journal.engine, journal.prompts, journal.sampling, finished, progress):
        journal.append(fresh)


def _jobs(prompts: Sequence[Prompt], sampling: Sampling) -> list[Job]:
    return [(p, s) for p in range(len(prompts)) for s in range(sampling.num_samples)]


def _answered(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    finished: Collection[Job],
    progress: bool,
) -> Iterator[Answers]:
    jobs = _jobs(prompts, sampling)
    wanted = {job for job in jobs if job not in finished}
    if not wanted:
        return
    left, tokens = len(wanted), 0
    total = left * sampling.max_new_tokens
    with tqdm(total=total, desc="answering", unit="tok", disable=not progress) as bar:
        for fresh in engine.answer(prompts, jobs, wanted, sampling, bar.update):
            yield fresh
            left -= len(fresh)
            tokens += sum(map(len, fresh.values()))
            # Those to come are taken to be as long as those that have ended.
            mean = tokens / (len(wanted) - left)
            bar.total = max(int(bar.n), tokens + round(left * mean))
            bar.refresh()
