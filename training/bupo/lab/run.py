"""One arm in this process: sample, reward, update, step after step; all draws are keyed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

import bupo.plugin  # noqa: F401  (veRL settles on a platform when it is first asked)
from bupo.cpu.rollout import Request, answer
from bupo.lab.arms import Arm
from bupo.lab.objective import Spoken, advantages, policy_loss, speak
from bupo.lab.task import MAX_ANSWER_TOKENS, Sum, draw_sums
from bupo.probe import Probe
from bupo.records import MetricsFile
from bupo.reward import compute_score
from entropylens.recognition import anatomy_of
from entropylens.responses import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Course", "train"]

#: Tells the draws of rollouts from those of demonstrations.
_ROLLOUTS = 2


@dataclass(frozen=True)
class Course:
    """What all arms have in common.

    Args:
        steps: rollouts with their updates.
        prompts: of a rollout.
        samples: answers to each, a group.
        updates: optimizer steps a rollout, over as many parts of its prompts.
        lr: AdamW's, constant.
        weight_decay: AdamW's.
        max_grad_norm: what gradients are clipped to.
    """

    steps: int = 100
    prompts: int = 32
    samples: int = 8
    updates: int = 2
    lr: float = 1e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arm: Arm,
    course: Course,
    seed: int,
    metrics: Path,
    *,
    progress: bool = True,
) -> None:
    """Train the model in place; a line a step goes to metrics.jsonl.

    Args:
        model: a start, float32.
        tokenizer: its tokenizer.
        arm: how.
        course: how long, and with what.
        seed: of prompts and samples: the same for all arms that are compared.
        metrics: the file.
    """
    # Adapters and dropout apart, training mode changes nothing: what samples is what is trained.
    model.eval()
    probe = Probe(model, arm.layer) if arm.internal and arm.layer is not None else None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=course.lr, weight_decay=course.weight_decay
    )
    left_alone = list(_left_alone(model, arm))
    log = MetricsFile(metrics, step=0)
    steps = range(1, course.steps - arm.skipped + 1)
    for step in tqdm(steps, desc=arm.name, unit="step", disable=not progress):
        first = step <= arm.internal_steps
        asked = draw_sums("train", course.prompts, _ROLLOUTS, seed, step)
        responses = _sampled(model, tokenizer, asked, course.samples, (seed, step))
        rewards = _rewards(
            tokenizer, responses, [it for it in asked for _ in range(course.samples)]
        )
        groups = [it for it in range(course.prompts) for _ in range(course.samples)]
        inner = probe if first else None
        with torch.no_grad():
            old = speak(model, responses, inner)
        dealt = rewards
        if first and arm.shuffled:
            dealt = _dealt_anew(rewards.view(-1, course.samples), (seed, step)).flatten()
        signal = advantages(arm.estimator, dealt, old.mask, groups)
        if step == arm.internal_steps + 1 and step > 1 and arm.reset_optimizer:
            optimizer.state.clear()
        norms = []
        for part in torch.arange(len(responses)).chunk(course.updates):
            spoken = speak(model, [responses[it] for it in part.tolist()], inner)
            width = spoken.mask.shape[1]
            loss = policy_loss(
                spoken, old.log_probs[part, :width], signal[part, :width],
                entropy_coeff=arm.entropy_coeff if first else 0.0,
            )  # fmt: skip
            loss.backward()
            for parameter in left_alone if first else ():
                parameter.grad = None
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), course.max_grad_norm)))
            optimizer.step()
            optimizer.zero_grad()
        log.log(_told(rewards, old, norms) | {"internal": float(inner is not None)}, step)


def _sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Sum],
    samples: int,
    key: tuple[int, int],
) -> list[Response]:
    """Answers at temperature 1, group by group."""
    prompts = [tuple(tokenizer(it.prompt)["input_ids"]) for it in asked]
    requests = [
        Request(prompt, (*key, place, sample), 1.0)
        for place, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    found = answer(model, requests, MAX_ANSWER_TOKENS)
    return [
        Response(request.prompt_ids, tuple(ids))
        for request, (ids, _) in zip(requests, found, strict=True)
    ]


def _rewards(
    tokenizer: PreTrainedTokenizerFast, responses: Sequence[Response], asked: Sequence[Sum]
) -> Float[Tensor, " responses"]:
    """As `bupo` rewards them."""
    return torch.tensor(
        [
            compute_score(
                "sums",
                tokenizer.decode(response.response_ids, skip_special_tokens=True),
                one.gold,
                mode="strict",
            )["score"]
            for response, one in zip(responses, asked, strict=True)
        ]
    )


def _dealt_anew(
    rewards: Float[Tensor, "prompts samples"], key: tuple[int, int]
) -> Float[Tensor, "prompts samples"]:
    """Each group's rewards in another order."""
    return torch.from_numpy(np.random.default_rng(key).permuted(rewards.numpy(), axis=1))


def _left_alone(model: PreTrainedModel, arm: Arm) -> Iterator[nn.Parameter]:
    """Parameters that the arm's first steps do not train."""
    anatomy = anatomy_of(model)
    if arm.freeze_unembedding:
        yield from model.get_output_embeddings().parameters()
    if arm.only_lower and arm.layer is not None:
        for layer in anatomy.layers[arm.layer :]:
            yield from layer.parameters()
        yield from anatomy.final_norm.parameters()


def _told(
    rewards: Float[Tensor, " responses"], old: Spoken, norms: Sequence[float]
) -> dict[str, float]:
    """The numbers of a step, of the policy that it trained."""
    tokens = old.mask.sum()
    return {
        "reward": float(rewards.mean()),
        "entropy": float(old.entropy.sum() / tokens),
        "nll": float(-old.log_probs.sum() / tokens),
        "response_tokens": float(old.mask.sum(-1).float().mean()),
        "grad_norm": sum(norms) / len(norms),
    }
