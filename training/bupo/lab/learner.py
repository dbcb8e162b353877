"""One step's updates in this process: what an arm trains, with which advantages, by how much."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bupo.lab.answering import Answered
from bupo.lab.arms import Arm
from bupo.lab.critic import Critic
from bupo.lab.objective import Spoken, advantages, policy_loss, speak
from bupo.probe import Probe
from entropylens.recognition import anatomy_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Learner", "Rates"]


@dataclass(frozen=True)
class Rates:
    """How far an update goes.

    Args:
        lr: AdamW's, constant, of both policies.
        critic_lr: AdamW's for PPO's critic.
        weight_decay: AdamW's.
        max_grad_norm: what gradients are clipped to.
        updates: optimizer steps a rollout, over as many parts of its prompts.
    """

    lr: float = 1e-4
    critic_lr: float = 1e-3
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    updates: int = 2


class Learner:
    """A model that learns as its arm says.

    Args:
        model: trained in place.
        arm: how.
        rates: how far.
        watched: the layer whose policy is told of where the arm names none.
        seed: of what it draws: shuffles, and the critic's head.
    """

    def __init__(
        self, model: PreTrainedModel, arm: Arm, rates: Rates, watched: int, seed: int
    ) -> None:
        self.model, self.arm, self.rates, self.seed = model, arm, rates, seed
        self.probe = Probe(model, arm.layer or watched)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=rates.lr, weight_decay=rates.weight_decay
        )
        self.critic = None
        if arm.estimator == "gae":
            self.critic = Critic(
                model, lr=rates.critic_lr, weight_decay=rates.weight_decay,
                max_grad_norm=rates.max_grad_norm, updates=rates.updates, seed=seed,
            )  # fmt: skip
        self._left_alone = tuple(_left_alone(model, arm))
        self._was_in_phase = False

    def learn(self, answered: Answered, step: int, *, in_phase: bool) -> dict[str, float]:
        """The updates of one step; returns its numbers, under the names that `bupo` logs.

        Args:
            answered: the policy's own answers.
            step: from 1.
            in_phase: whether it is one of the arm's internal steps.
        """
        arm, responses = self.arm, answered.responses
        internal = in_phase and arm.internal
        if self._was_in_phase and not in_phase and arm.reset_optimizer:
            self.optimizer.state.clear()
        self._was_in_phase = in_phase
        with torch.no_grad():
            policy, layer = speak(self.model, responses), speak(self.model, responses, self.probe)
        old = layer if internal else policy
        signal = self._signal(answered, old.mask, step, shuffled=in_phase and arm.shuffled)
        start = time.perf_counter()
        norms = []
        for part in torch.arange(len(responses)).chunk(self.rates.updates):
            spoken = speak(
                self.model, [responses[it] for it in part.tolist()],
                self.probe if internal else None,
            )  # fmt: skip
            width = spoken.mask.shape[1]
            loss = policy_loss(
                spoken, old.log_probs[part, :width], signal[part, :width],
                entropy_coeff=arm.entropy_coeff if in_phase else 0.0,
            )  # fmt: skip
            loss.backward()
            for parameter in self._left_alone if in_phase else ():
                parameter.grad = None
            parameters = self.model.parameters()
            norms.append(float(nn.utils.clip_grad_norm_(parameters, self.rates.max_grad_norm)))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {
            "bupo/reward": float(answered.rewards.mean()),
            "bupo/internal_phase": float(internal),
            "response_length/mean": float(old.mask.sum(-1).float().mean()),
            "actor/grad_norm": sum(norms) / len(norms),
            "timing_s/update_actor": time.perf_counter() - start,
            **_told(policy, "policy"),
            **_told(layer, "layer"),
        }

    def _signal(
        self,
        answered: Answered,
        mask: Int[Tensor, "responses tokens"],
        step: int,
        *,
        shuffled: bool,
    ) -> Float[Tensor, "responses tokens"]:
        rewards = answered.rewards
        if self.critic is not None:
            return self.critic.advantages(answered, mask)
        if shuffled:
            dealt = np.random.default_rng((self.seed, step)).permuted(rewards.numpy(), axis=1)
            rewards = torch.from_numpy(dealt)
        return advantages(self.arm.estimator, rewards.flatten(), mask, answered.groups)


def _left_alone(model: PreTrainedModel, arm: Arm) -> Iterator[nn.Parameter]:
    """Parameters that the arm's first steps do not train."""
    anatomy = anatomy_of(model)
    if arm.freeze_unembedding:
        yield from model.get_output_embeddings().parameters()
    if arm.only_lower and arm.layer is not None:
        for layer in anatomy.layers[arm.layer :]:
            yield from layer.parameters()
        yield from anatomy.final_norm.parameters()


def _told(spoken: Spoken, policy: str) -> dict[str, float]:
    tokens = spoken.mask.sum()
    return {
        f"bupo/entropy_{policy}": float(spoken.entropy.sum() / tokens),
        f"bupo/nll_{policy}": float(-spoken.log_probs.sum() / tokens),
    }
