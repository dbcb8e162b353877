"""Hugging Face generate, reproducible token by token.

Every token is drawn by inverting the cumulative distribution at a number that depends on seed,
prompt, sample and position alone. So neither batching nor an interruption changes a sample.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropylens.anatomy import longrope_switch, text_config
from entropylens.capture import evaluating
from entropylens.engines.engine import Answers, Job, until_end
from entropylens.errors import AllocationError
from entropylens.memory import is_allocation_failure
from entropylens.prompts import Prompt
from entropylens.responses import Limits
from entropylens.sampling import Sampling, suggested
from entropylens.sources import load_named
from entropylens.sources.subject import Subject, model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "HFEngine",
    "draw_tokens",
    "end_tokens",
    "keyed_draws",
    "left_padded",
    "plain_generation",
]

#: The key-value cache of one batch: so many positions at least, and so many bytes on a CPU.
CACHE_TOKENS, CACHE_BYTES = 4096, 2**30
#: Answers of one batch.
ROWS = 64


class HFEngine:
    """A Hugging Face model that answers; see `engines.engine.Engine`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, or None.
        name: what the user called it.
        limits: what it can read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        limits: Limits,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.limits = limits
        self.ends = end_tokens(model)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.settings: Mapping[str, Any] = {"engine": "hf", "dtype": dtype}

    @classmethod
    def of(cls, subject: Subject) -> Self:
        """The engine of a model that is open already."""
        return cls(subject.model, subject.tokenizer, subject.name, subject.limits)

    @classmethod
    def open(cls, model: str, **loading: Any) -> Self:
        """Load a Hub id, directory, GGUF file or veRL checkpoint; it need not be understood.

        Raises:
            EntropyLensError: as `sources.load_named`.
        """
        loaded, tokenizer = load_named(model, **loading)
        text = loaded.config.get_text_config(decoder=True)
        context = getattr(text, "max_position_embeddings", None)
        return cls(loaded, tokenizer, model, Limits(text.vocab_size, context))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of configuration and weights."""
        return model_fingerprint(self.model)

    @property
    def suggested(self) -> Mapping[str, Any]:
        """The fields of Sampling that the model's generation_config sets."""
        return suggested(self.model.generation_config)

    def answer(
        self,
        prompts: Sequence[Prompt],
        jobs: Sequence[Job],
        wanted: Collection[Job],
        sampling: Sampling,
        produced: Callable[[int], object],
    ) -> Iterator[Answers]:
        """See `Engine.answer`. A batch is answered whole where one of its jobs is wanted: so a
        resumed run makes the same batches, and the same float errors, as an uninterrupted one.
        """
        with evaluating(self.model), plain_generation(self.model) as ends:
            for room, batch in self._batches(prompts, jobs, sampling):
                if any(job in wanted for job in batch):
                    try:
                        found = self._answer(prompts, batch, room, sampling, ends, produced)
                    except (MemoryError, RuntimeError) as error:
                        if not is_allocation_failure(error):
                            raise
                        raise AllocationError(
                            f"not enough memory for {len(batch)} answers of up to "
                            f"{sampling.max_new_tokens} tokens",
                            "try a smaller --max-new-tokens; what was finished is kept",
                        ) from error
                    yield {job: found[job] for job in batch if job in wanted}

    def close(self) -> None:
        """Let go of the model, and of the GPU memory that torch keeps."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def cache_tokens(self) -> int:
        """Positions (prompts and answers) in the key-value cache of one batch."""
        parameter = next(self.model.parameters())
        config = self.model.config.get_text_config(decoder=True)
        # As many heads as queries have is the most that a layer keeps.
        kept = getattr(config, "num_key_value_heads", None)
        queries = getattr(config, "num_attention_heads", None)
        share = kept / queries if isinstance(kept, int) and isinstance(queries, int) else 1.0
        numbers = 2 * config.num_hidden_layers * config.hidden_size * share
        bytes_each = max(1, int(numbers * parameter.element_size()))
        room = CACHE_BYTES
        if parameter.device.type == "cuda":
            room = torch.cuda.mem_get_info(parameter.device)[0] // 2
        return max(CACHE_TOKENS, room // bytes_each)

    @cached_property
    def _switch(self) -> int | None:
        """See `longrope_switch`."""
        return longrope_switch(text_config(self.model))

    def _batches(
        self, prompts: Sequence[Prompt], jobs: Sequence[Job], sampling: Sampling
    ) -> Iterator[tuple[int, list[Job]]]:
        """Similar lengths together, with the tokens that each answer has room for; equal ones
        where the longest decides how positions are turned."""
        batch: list[Job] = []
        room, most, switch = 0, self.cache_tokens, self._switch
        for job in sorted(jobs, key=lambda job: (len(prompts[job[0]].ids), job)):
            length = len(prompts[job[0]].ids)
            own_room = sampling.max_new_tokens
            if self.limits.context is not None:
                own_room = min(own_room, self.limits.context - length)
            full = len(batch) == ROWS or (len(batch) + 1) * (length + own_room) > most
            switches = switch is not None and length + own_room > switch
            unlike = switches and bool(batch) and len(prompts[batch[0][0]].ids) != length
            if batch and (full or own_room != room or unlike):
                yield room, batch
                batch = []
            batch.append(job)
            room = own_room
        if batch:
            yield room, batch

    def _answer(
        self,
        prompts: Sequence[Prompt],
        batch: Sequence[Job],
        room: int,
        sampling: Sampling,
        ends: frozenset[int],
        produced: Callable[[int], object],
    ) -> Answers:
        input_ids, mask = left_padded([prompts[prompt].ids for prompt, _ in batch])
        width = input_ids.shape[1]
        draws = np.stack(
            [keyed_draws((sampling.seed, s), prompts[p].ids, room) for p, s in batch], axis=1
        )
        device = self.model.get_input_embeddings().weight.device
        output, mask = input_ids.to(device), mask.to(device)
        sampler = _KeyedSampler(draws, width, ends, produced)
        parts, switch = [room], self._switch
        if switch is not None and width <= switch < width + room - 1:
            # Transformers would go on over keys that the short factors turned.
            parts = [switch + 1 - width, width + room - switch - 1]
        for part in parts:
            output = self.model.generate(
                output,
                attention_mask=mask,
                max_new_tokens=part,
                logits_processor=_processors(sampling, sampler),
            )
            if bool(sampler.ended(output).all()):
                break
            mask = torch.ones_like(output)  # rows that switch are of one length
        rows = output[:, width:].tolist()
        return {job: until_end(row, ends) for job, row in zip(batch, rows, strict=True)}


def _processors(sampling: Sampling, sampler: _KeyedSampler) -> Any:
    """What happens to the logits, in the order of Hugging Face and vLLM."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature == 0:
        sampler.greedy = True
    elif sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(float(sampling.top_p)))
    found.append(sampler)
    return found


class _KeyedSampler:
    """A logits processor that leaves one token standing: the one drawn, or the likeliest."""

    def __init__(
        self,
        draws: np.ndarray[Any, Any],
        prompt_width: int,
        ends: frozenset[int],
        produced: Callable[[int], object],
    ) -> None:
        self.draws = draws
        self.prompt_width = prompt_width
        self.ends = torch.tensor(sorted(ends))
        self.produced = produced
        self.greedy = False

    def ended(self, input_ids: Int[Tensor, "batch sequence"]) -> Bool[Tensor, " batch"]:
        """Which answers have come to their end."""
        return torch.isin(input_ids[:, self.prompt_width :].cpu(), self.ends).any(-1)

    def __call__(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        scores: Float[Tensor, "batch vocab"],
    ) -> Float[Tensor, "batch vocab"]:
        step = input_ids.shape[1] - self.prompt_width
        self.produced(int((~self.ended(input_ids)).sum()))
        if self.greedy:
            return scores
        drawn = draw_tokens(scores, torch.from_numpy(self.draws[step]), 1.0)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


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
    """Prompts of different lengths as input_ids and attention_mask, all ending together.

    A row is padded with its own first token, so that a penalty on repeated tokens finds none
    that the prompt has not.
    """
    width = max(map(len, rows))
    input_ids = torch.tensor([[ids[0]] * (width - len(ids)) + list(ids) for ids in rows])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
    return input_ids, mask


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
    return ends_in(model.generation_config, model.config)


def ends_in(*configs: Any) -> frozenset[int]:
    """The end tokens that configurations name."""
    ends: set[int] = set()
    for config in configs:
        found = getattr(config, "eos_token_id", None)
        ends.update([found] if isinstance(found, int) else found or [])
    return frozenset(ends)
