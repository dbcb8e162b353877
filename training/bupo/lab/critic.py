"""PPO's critic: a value for every state, learned by veRL's own loss, with its own advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from verl.trainer.ppo.core_algos import compute_gae_advantage_return, compute_value_loss

from bupo.lab.answering import Answered
from bupo.lab.objective import AGGREGATION, by_response, of_last_tokens
from entropylens.batching import batch
from entropylens.responses import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Critic"]

#: veRL's defaults: how far a value may move in an update, and no discount.
CLIP, GAMMA, LAMBDA = 0.5, 1.0, 1.0


class Critic:
    """The policy's own start with a head of one value, as veRL makes it.

    Args:
        model: the policy at its start; it is copied.
        lr: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: what gradients are clipped to.
        updates: optimizer steps a rollout.
        seed: of the head's weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        lr: float,
        weight_decay: float,
        max_grad_norm: float,
        updates: int,
        seed: int,
    ) -> None:
        from transformers import AutoModelForTokenClassification

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = AutoModelForTokenClassification.from_config(
                type(model.config).from_dict(model.config.to_dict() | {"num_labels": 1}),
                attn_implementation="sdpa",
            )
        self.model.base_model.load_state_dict(model.base_model.state_dict())
        self.model.float().eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, weight_decay=weight_decay
        )
        self.max_grad_norm, self.updates = max_grad_norm, updates

    def advantages(
        self, answered: Answered, mask: Int[Tensor, "responses tokens"]
    ) -> Float[Tensor, "responses tokens"]:
        """GAE's advantages by the values as they are; then the critic learns from the returns.

        Args:
            answered: the policy's answers.
            mask: 1 at their tokens.
        """
        responses = answered.responses
        with torch.no_grad():
            values = self.values(responses)
        found, returns = compute_gae_advantage_return(
            token_level_rewards=of_last_tokens(answered.rewards.flatten(), mask),
            values=values, response_mask=mask,
            gamma=torch.tensor(GAMMA), lam=torch.tensor(LAMBDA),
        )  # fmt: skip
        for part in torch.arange(len(responses)).chunk(self.updates):
            predicted = self.values([responses[it] for it in part.tolist()])
            width = predicted.shape[1]
            loss, _ = compute_value_loss(
                predicted, returns[part, :width], values[part, :width], mask[part, :width],
                CLIP, AGGREGATION,
            )  # fmt: skip
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return torch.as_tensor(found)

    def values(self, responses: Sequence[Response]) -> Float[Tensor, "responses tokens"]:
        """The value of each state that a token was drawn in, zero behind a response's end."""
        whole = batch(responses, range(len(responses)))
        every = self.model(whole.input_ids, use_cache=False).logits
        return by_response(responses, whole, every.flatten(0, 1)[whole.positions, 0])
