"""What answers prompts: one interface for Hugging Face generate, vLLM, and several of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from entropylens.prompts import Prompt
from entropylens.responses import Limits
from entropylens.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answers", "Engine", "Job", "until_end"]

#: The place of a prompt, and the number of a sample to it, both from 0.
Job = tuple[int, int]
#: The token ids of finished answers, an end token included.
Answers = dict[Job, tuple[int, ...]]


class Engine(Protocol):
    """A model, ready to answer.

    Args:
        name: what the user called the model.
        settings: what a sample depends on beside model and Sampling (engine, dtype).
        tokenizer: the model's.
        limits: what it can read.
        ends: the tokens that end an answer.
    """

    name: str
    settings: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase | None
    limits: Limits
    ends: frozenset[int]

    @property
    def fingerprint(self) -> str:
        """A digest of the model."""
        ...

    @property
    def suggested(self) -> Mapping[str, Any]:
        """The fields of Sampling that the model's generation_config sets."""
        ...

    def answer(
        self,
        prompts: Sequence[Prompt],
        jobs: Sequence[Job],
        wanted: Collection[Job],
        sampling: Sampling,
        produced: Callable[[int], object],
    ) -> Iterator[Answers]:
        """Answer the wanted jobs, handing out answers as they are finished.

        Args:
            prompts: what is asked.
            jobs: all jobs of the run, so that what is left of it can be put together alike.
            wanted: the jobs that are not finished yet.
            sampling: how answers are drawn.
            produced: told how many tokens were drawn since it was last called.

        Raises:
            SettingError: a prompt without room for an answer.
        """
        ...

    def close(self) -> None:
        """Give back what was started: processes, and GPU memory of its own."""
        ...


def until_end(ids: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """An answer up to its end token, which it keeps."""
    for place, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: place + 1])
    return tuple(ids)
