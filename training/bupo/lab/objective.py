"""One update's objective in this process: veRL's own loss and advantages, over pi_theta or pi_l."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import agg_loss, get_adv_estimator_fn, get_policy_loss_fn
from verl.workers.config import ActorConfig

from bupo.probe import Probe
from entropylens.batching import Batch, batch
from entropylens.responses import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "AGGREGATION",
    "Spoken",
    "advantages",
    "by_response",
    "of_last_tokens",
    "policy_loss",
    "speak",
]

#: Eq. 4's and 10's: mean over tokens, then over responses; no dual clip (veRL demands a bound).
AGGREGATION, NO_DUAL_CLIP = "seq-mean-token-mean", 1e9


@dataclass(frozen=True)
class Spoken:
    """What a policy says of the tokens of some responses, zero behind each response's end.

    Args:
        log_probs: of the produced tokens, in nats.
        entropy: of the policy at their positions, in nats.
        mask: 1 at the tokens of a response.
    """

    log_probs: Float[Tensor, "responses tokens"]
    entropy: Float[Tensor, "responses tokens"]
    mask: Int[Tensor, "responses tokens"]


def speak(
    model: PreTrainedModel, responses: Sequence[Response], probe: Probe | None = None
) -> Spoken:
    """pi_theta's words on the responses, or pi_l's with its probe (Eq. 6), at temperature 1.

    Args:
        model: the model; gradients are kept where autograd is on.
        responses: of any lengths, in one forward pass.
        probe: of layer l; layers above it are not run.
    """
    whole = batch(responses, range(len(responses)))
    policy = nullcontext() if probe is None else probe.internal(skip_upper_layers=True)
    with policy:
        logits = model(whole.input_ids, use_cache=False).logits
    every = logits.flatten(0, 1)[whole.positions].float().log_softmax(-1)
    produced = every.gather(1, whole.tokens[:, None])[:, 0]
    entropy = -(every.exp() * every).sum(-1)
    return Spoken(
        by_response(responses, whole, produced),
        by_response(responses, whole, entropy),
        by_response(responses, whole, torch.ones(len(produced))).long(),
    )


def by_response(
    responses: Sequence[Response], whole: Batch, values: Float[Tensor, " positions"]
) -> Float[Tensor, "responses tokens"]:
    """Values at a batch's positions, a row a response, zero behind its end."""
    shape = (len(responses), max(it.num_tokens for it in responses))
    place = torch.cat([torch.arange(it.num_tokens) for it in responses])
    return values.new_zeros(shape).index_put((whole.owner, place), values)


def of_last_tokens(
    rewards: Float[Tensor, " responses"], mask: Int[Tensor, "responses tokens"]
) -> Float[Tensor, "responses tokens"]:
    """Outcome rewards, as veRL takes them: at the last token of each response."""
    last = (torch.arange(len(mask)), mask.sum(-1) - 1)
    return torch.zeros(mask.shape).index_put(last, rewards)


def advantages(
    estimator: str,
    rewards: Float[Tensor, " responses"],
    mask: Int[Tensor, "responses tokens"],
    groups: Sequence[int],
) -> Float[Tensor, "responses tokens"]:
    """veRL's advantages of outcome rewards.

    Args:
        estimator: grpo, rloo or reinforce_plus_plus.
        rewards: of the whole responses.
        mask: 1 at the tokens of a response.
        groups: which responses answer the same prompt.
    """
    found, _ = get_adv_estimator_fn(estimator)(
        token_level_rewards=of_last_tokens(rewards, mask),
        response_mask=mask,
        index=np.asarray(groups),
        config=AlgoConfig(adv_estimator=estimator),
    )
    return torch.as_tensor(found)


def policy_loss(
    spoken: Spoken,
    old_log_probs: Float[Tensor, "responses tokens"],
    of_tokens: Float[Tensor, "responses tokens"],
    *,
    entropy_coeff: float = 0.0,
) -> Float[Tensor, ""]:
    """The clipped objective (Eq. 4, and Eq. 10 where pi_l spoke), less an entropy bonus.

    Args:
        spoken: the policy that is trained, with gradients.
        old_log_probs: its own when the responses were sampled.
        of_tokens: their advantages.
        entropy_coeff: of the bonus.
    """
    actor = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=AGGREGATION, clip_ratio_c=NO_DUAL_CLIP,
    )  # fmt: skip
    loss, _ = get_policy_loss_fn("vanilla")(
        old_log_prob=old_log_probs,
        log_prob=spoken.log_probs,
        advantages=of_tokens,
        response_mask=spoken.mask,
        loss_agg_mode=AGGREGATION,
        config=actor,
    )
    if entropy_coeff:
        loss = loss - entropy_coeff * agg_loss(spoken.entropy, spoken.mask, AGGREGATION)
    return torch.as_tensor(loss)
