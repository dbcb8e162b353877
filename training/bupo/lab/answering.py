"""The subject answers sums: keyed samples, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from bupo.cpu.rollout import Request, answer
from bupo.lab.task import MAX_ANSWER_TOKENS, Sum
from bupo.reward import compute_score
from entropylens.responses import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Answered", "ask"]

#: Answers in one batch of generation.
_TOGETHER = 1024


@dataclass(frozen=True)
class Answered:
    """Answers to some problems, sample by sample, problem by problem.

    Args:
        responses: the answers, those of a problem in a row.
        rewards: theirs, as `bupo` gives them: 1 where the boxed number is right.
    """

    responses: tuple[Response, ...]
    rewards: Float[Tensor, "problems samples"]

    @property
    def groups(self) -> list[int]:
        """Each answer's problem."""
        problems, samples = self.rewards.shape
        return [problem for problem in range(problems) for _ in range(samples)]


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    sums: Sequence[Sum],
    samples: int,
    key: tuple[int, ...],
    *,
    first: int = 0,
) -> Answered:
    """Answers at temperature 1.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        sums: the problems.
        samples: answers to each.
        key: what tells these draws from others; a problem's place and a sample's number join it.
        first: the place of the first problem.
    """
    requests = [
        Request(tuple(tokenizer(it.prompt)["input_ids"]), (*key, first + place, sample), 1.0)
        for place, it in enumerate(sums)
        for sample in range(samples)
    ]
    responses = []
    for start in range(0, len(requests), _TOGETHER):
        part = requests[start : start + _TOGETHER]
        found = answer(model, part, MAX_ANSWER_TOKENS)
        responses += [
            Response(request.prompt_ids, tuple(ids))
            for request, (ids, _) in zip(part, found, strict=True)
        ]
    golds = [it.gold for it in sums for _ in range(samples)]
    rewards = [
        compute_score(
            "sums", tokenizer.decode(it.response_ids, skip_special_tokens=True), gold,
            mode="strict",
        )["score"]
        for it, gold in zip(responses, golds, strict=True)
    ]  # fmt: skip
    return Answered(tuple(responses), torch.tensor(rewards).view(len(sums), samples))
