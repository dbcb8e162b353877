"""Let a model answer: Hugging Face generate, reproducible token by token, resumable.

Every token is drawn by inverting the cumulative distribution at a number that depends on seed,
prompt, sample and position alone. So neither batching nor an interruption changes a sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from entropylens.capture import evaluating
from entropylens.errors import OutputDirectoryError, SettingError
from entropylens.files import unwritable
from entropylens.prompts import Prompt
from entropylens.responses import Response
from entropylens.sources.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Sampling",
    "draw_tokens",
    "end_tokens",
    "generate",
    "keyed_draws",
    "left_padded",
    "plain_generation",
    "until_end",
]

#: Positions (prompts and answers) in the key-value cache of one batch.
CACHE_TOKENS = 4096


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; nothing comes from the model's generation_config but its end tokens.

    Args:
        num_samples: answers a prompt.
        max_new_tokens: tokens an answer at most.
        temperature: of the softmax; 0 takes the likeliest token.
        seed: of the draws.

    Raises:
        SettingError: a value that makes no sense.
    """

    num_samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--samples", self.num_samples, 1),
            ("--max-new-tokens", self.max_new_tokens, 1),
            ("--temperature", self.temperature, 0),
        ):
            if not least <= value < float("inf"):
                raise SettingError(f"{name} is {value}", f"give at least {least}")


def generate(
    subject: Subject,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    journal: Path | None = None,
    *,
    progress: bool = True,
) -> tuple[Response, ...]:
    """Answer every prompt `num_samples` times, in the order prompt by prompt.

    Args:
        subject: the model.
        prompts: what it is asked.
        sampling: how answers are drawn.
        journal: a JSONL file that finished answers are appended to and resumed from; it can be
            given to `analyze --responses`.
        progress: show a progress bar.

    Raises:
        OutputDirectoryError: the journal cannot be written, or is damaged.
    """
    jobs = [(p, s) for p in range(len(prompts)) for s in range(sampling.num_samples)]
    answers = _finished(journal) if journal is not None else {}
    bound = len(jobs) * sampling.max_new_tokens
    bar = tqdm(total=bound, desc="answering", unit="tok", disable=not progress)
    with bar, evaluating(subject.model), plain_generation(subject.model) as ends:
        for batch in _batches(prompts, jobs, sampling):
            if any(job not in answers for job in batch):
                tokens = _answer(subject, prompts, batch, sampling, ends, bar)
                fresh = dict(zip(batch, tokens, strict=True))
                if journal is not None:
                    new = {job: ids for job, ids in fresh.items() if job not in answers}
                    _append(journal, subject, prompts, new, sampling, ends)
                answers = fresh | answers
            # Answers that ended early make the work smaller than the bound.
            bound -= sum(sampling.max_new_tokens - len(answers[job]) for job in batch)
            bar.total = bound
            bar.refresh()
    return tuple(
        Response(
            prompt_ids=prompts[prompt].ids,
            response_ids=answers[prompt, sample],
            truncated=answers[prompt, sample][-1] not in ends,
            task=prompts[prompt].task,
        )
        for prompt, sample in jobs
    )


Job = tuple[int, int]


def _batches(
    prompts: Sequence[Prompt], jobs: Sequence[Job], sampling: Sampling
) -> Iterator[list[Job]]:
    """Similar lengths together; the same batches whether or not some are finished."""
    batch: list[Job] = []
    for job in sorted(jobs, key=lambda job: (len(prompts[job[0]].ids), job)):
        width = len(prompts[job[0]].ids) + sampling.max_new_tokens
        if batch and (len(batch) + 1) * width > CACHE_TOKENS:
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _answer(
    subject: Subject,
    prompts: Sequence[Prompt],
    batch: Sequence[Job],
    sampling: Sampling,
    ends: frozenset[int],
    bar: tqdm[Any],
) -> list[tuple[int, ...]]:
    from transformers import LogitsProcessorList

    rows = [prompts[prompt].ids for prompt, _ in batch]
    input_ids, mask = left_padded(rows)
    width = input_ids.shape[1]
    room = sampling.max_new_tokens
    if subject.limits.context is not None:
        room = min(room, subject.limits.context - width)
    draws = np.stack(
        [keyed_draws((sampling.seed, s), prompts[p].ids, room) for p, s in batch], axis=1
    )
    sampler = _KeyedSampler(draws, sampling.temperature, width, ends, bar)
    device = subject.anatomy.device
    output = subject.model.generate(
        input_ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=room,
        logits_processor=LogitsProcessorList([sampler]),
    )
    return [until_end(row, ends) for row in output[:, width:].tolist()]


def keyed_draws(key: Sequence[int], prompt_ids: Sequence[int], count: int) -> np.ndarray[Any, Any]:
    """One number in [0, 1) a position, the same wherever the prompt stands in its dataset.

    Args:
        key: what tells this answer from others to the same prompt (seed, sample, ...).
        prompt_ids: what is answered.
        count: positions.
    """
    return np.random.default_rng([*key, *prompt_ids]).random(count)


def draw_tokens(
    logits: Float[Tensor, "batch vocab"], draws: Float[Tensor, " batch"], temperature: float
) -> Int[Tensor, " batch"]:
    """The tokens at which the cumulative distribution passes the draws; the likeliest at 0.

    Args:
        logits: of one position.
        draws: uniform numbers in [0, 1).
        temperature: of the softmax.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    draw = draws.to(logits.device)
    drawn = torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp_max(logits.shape[-1] - 1)


def left_padded(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch width"], Int[Tensor, "batch width"]]:
    """Prompts of different lengths as input_ids and attention_mask, all ending together."""
    width = max(map(len, rows))
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return input_ids, mask


def until_end(ids: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """An answer up to its end token, which it keeps."""
    for place, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: place + 1])
    return tuple(ids)


class _KeyedSampler:
    """A logits processor that leaves one token standing: the one drawn."""

    def __init__(
        self,
        draws: np.ndarray[Any, Any],
        temperature: float,
        prompt_width: int,
        ends: frozenset[int],
        bar: tqdm[Any],
    ) -> None:
        self.draws = draws
        self.temperature = temperature
        self.prompt_width = prompt_width
        self.ends = torch.tensor(sorted(ends))
        self.bar = bar

    def __call__(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        scores: Float[Tensor, "batch vocab"],
    ) -> Float[Tensor, "batch vocab"]:
        step = input_ids.shape[1] - self.prompt_width
        ended = torch.isin(input_ids[:, self.prompt_width :].cpu(), self.ends).any(-1)
        self.bar.update(int((~ended).sum()))
        if self.temperature == 0:
            return scores
        drawn = draw_tokens(scores, torch.from_numpy(self.draws[step]), self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[frozenset[int]]:
    """Put a plain configuration in place of the model's, and hand out its end tokens."""
    from transformers import GenerationConfig

    original = model.generation_config
    ends = end_tokens(model)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
    )
    try:
        yield ends
    finally:
        model.generation_config = original


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end an answer, from the generation configuration and the model's own."""
    ends: set[int] = set()
    for holder in (model.generation_config, model.config):
        found = getattr(holder, "eos_token_id", None)
        ends.update([found] if isinstance(found, int) else found or [])
    return frozenset(ends)


def _finished(journal: Path) -> dict[Job, tuple[int, ...]]:
    """The answers of an earlier run; a line torn by its end is cut off."""
    if not journal.is_file():
        return {}
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        if len(whole) < len(content):
            os.truncate(journal, len(whole))
        records = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        return {
            (record["prompt"], record["sample"]): tuple(record["response_ids"])
            for record in records
        }
    except OSError as error:
        raise unwritable(journal, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise OutputDirectoryError(
            f"{str(journal)!r} is damaged ({error})", "start the run anew with --force"
        ) from error


def _append(
    journal: Path,
    subject: Subject,
    prompts: Sequence[Prompt],
    answers: dict[Job, tuple[int, ...]],
    sampling: Sampling,
    ends: frozenset[int],
) -> None:
    tokenizer = subject.tokenizer
    lines = [
        json.dumps(
            {
                "task": prompts[prompt].task,
                "prompt": prompt,
                "sample": sample,
                "prompt_ids": prompts[prompt].ids,
                "response_ids": ids,
                "truncated": ids[-1] not in ends,
                "text": None if tokenizer is None else tokenizer.decode(ids),
                "answer": prompts[prompt].answer,
                "sampling": asdict(sampling),
            }
        )
        for (prompt, sample), ids in answers.items()
    ]
    try:
        with journal.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        raise unwritable(journal, error) from error
