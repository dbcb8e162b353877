"""`trainer.v1.trainer_mode=bupo`: veRL's synchronous trainer, with an internal phase in front.

Old log-probabilities and update speak for pi_l in the internal phase; rollouts, validation,
reference and critic are the full policy's throughout.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer
from verl.workers.utils.padding import response_from_nested

from bupo.checks import check_config
from bupo.engine import OTHER_ENTROPY, OTHER_LOG_PROBS
from bupo.fixed_set import FixedSet, choose
from bupo.names import STOP_FILE, WATCHED
from bupo.orders import Order
from bupo.phase import Phase
from bupo.records import MetricsFile, shares
from bupo.settings import Settings
from bupo.workers import BuPOCriticWorker, BuPOWorker
from entropylens.responses import Response

__all__ = ["BuPOTrainer"]

logger = logging.getLogger(__name__)

#: veRL's comparisons of the actor with the rollout policy: meaningless where they are pi_l's.
_OFF_POLICY = ("rollout_corr/", "training/rollout_probs_diff", "training/rollout_actor_probs")


@register_trainer("bupo")
class BuPOTrainer(PPOTrainerSync):
    """veRL's trainer; see `bupo.settings.Settings` for the `bupo` node of its configuration."""

    def __init__(self, config: DictConfig) -> None:
        self.settings = Settings.of(config)
        check_config(config)
        config.trainer.v1.trainer_mode = "sync"  # veRL compares with it in places
        if not self.settings.keep_rollouts:
            config.trainer.rollout_data_dir = None
        super().__init__(config)
        self.directory = self.settings.directory(config)
        self.phase = Phase(self.settings, self.directory / "phase.json")
        self._fetched: dict[str, int] = {}
        self._metrics_file: MetricsFile | None = None
        self._rewards: list[float] = []

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            worker = BuPOCriticWorker if role == Role.Critic else BuPOWorker
            self.role_worker_mapping[role] = ray.remote(worker)

    def _build_replay_buffer(self) -> Any:
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = 0.2  # the default of 2 s is lost in a small run's every step
        return replay_buffer

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._resumed = self.global_steps
        self.phase.resume(self.global_steps)
        for look in self._fixed_set.glob("step_*"):  # of steps that are made anew
            if int(look.name.removeprefix("step_")) > self.global_steps:
                shutil.rmtree(look)

    # What a step trains.

    def _order(self, *, update: bool) -> Order:
        settings, internal = self.settings, self.phase.is_internal(self.global_steps)
        if settings.layer is None:
            return Order()
        watching = settings.log_both_policies and not update
        return Order(
            layer=settings.layer,
            internal=internal,
            skip_upper_layers=internal and settings.skip_upper_layers and not watching,
            stride=self._stride if watching else 0,
            freeze_unembedding=internal and update and settings.freeze_unembedding,
        )

    def _with_order(
        self, order: Order, part: Callable[..., KVBatchMeta], batch: KVBatchMeta, metrics: Any
    ) -> KVBatchMeta:
        with order.given_with(batch.extra_info):
            found = part(batch, metrics=metrics)
        Order.taken_from(found.extra_info)
        return found

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        internal = self.phase.is_internal(self.global_steps)
        lengths = [tag["response_len"] for tag in batch.tags]
        self._stride = math.ceil(sum(lengths) / WATCHED)
        order = self._order(update=False)
        batch = self._with_order(order, super()._compute_old_log_prob, batch, metrics)
        metrics["bupo/internal_phase"] = float(internal)
        metrics["bupo/layer"] = float(self.settings.layer or 0) if internal else 0.0
        metrics |= self._policies(batch, internal, bool(order.stride))
        if self.settings.analyze_every and self.global_steps == 1:
            with marked_timer("fixed_set", self.timing_raw):
                self.logger.log(data=self._start_fixed_set(batch), step=0)
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        last = self.phase.last_internal_step
        if self.settings.reset_optimizer_at_switch and self.global_steps - 1 == last:
            self.actor_rollout_wg.reset_optimizer()
        order = self._order(update=True)
        return self._with_order(order, super()._update_actor, batch, metrics)

    def _policies(self, batch: KVBatchMeta, internal: bool, watched: bool) -> dict[str, float]:
        """Entropy and NLL (nats a token) of pi_theta and pi_l, as far as they are known."""
        fields = ["old_log_probs", "entropy", "response_mask"]
        if watched:
            fields += [OTHER_LOG_PROBS, OTHER_ENTROPY]
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        )
        own, other = ("layer", "policy") if internal else ("policy", "layer")
        mask = data["response_mask"]
        weights = mask.values().bool()
        found = {
            f"bupo/nll_{own}": -float(data["old_log_probs"].values()[weights].mean()),
            f"bupo/entropy_{own}": float(data["entropy"].values()[weights].mean()),
        }
        if watched:
            log_probs = response_from_nested(data[OTHER_LOG_PROBS], mask).values()
            entropies = response_from_nested(data[OTHER_ENTROPY], mask).values()
            found[f"bupo/nll_{other}"] = -float(torch.nanmean(log_probs))
            found[f"bupo/entropy_{other}"] = float(torch.nanmean(entropies))
            found["bupo/watched_positions"] = float(torch.isfinite(log_probs).sum())
        return found

    # The fixed set.

    def _start_fixed_set(self, batch: KVBatchMeta) -> dict[str, float]:
        """Keep some of the first rollouts, which are step 0's, and look before the first update."""
        if (self._fixed_set / "responses.jsonl").is_file():  # of a start that did not get far
            return self._look(0)
        chosen = choose(len(batch.keys), self.settings.analyze_responses)
        data = tq.kv_batch_get(
            keys=[batch.keys[place] for place in chosen],
            partition_id=batch.partition_id,
            select_fields=["prompts", "responses"],
        )
        pairs = zip(data["prompts"].unbind(), data["responses"].unbind(), strict=True)
        responses = [
            Response(tuple(prompt.tolist()), tuple(response.tolist())) for prompt, response in pairs
        ]
        FixedSet.start(self._fixed_set, responses)
        return self._look(0)

    @property
    def _fixed_set(self) -> Path:
        return self.directory / "fixed_set"

    def _look(self, step: int) -> dict[str, float]:
        """What the look says; one that fails (a collapsed model's states are NaN) says nothing."""
        told: dict[str, Any] = self.actor_rollout_wg.look(
            str(self._fixed_set.resolve()), step, self.settings.layer
        )[0]
        if "error" in told:
            logger.warning("no look at step %d: %s", step, told["error"])
            return {}
        return told

    # A run that can be repeated: veRL's order is that in which answers happened to arrive.

    def _fetch_one_gen_batch(self) -> Any:
        batch = super()._fetch_one_gen_batch()
        for uid in batch["uid"]:
            self._fetched[str(uid)] = len(self._fetched)
        return batch

    def _balance_batch(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> KVBatchMeta:
        def place(number: int) -> tuple[int, ...]:
            uid, session, index = batch.keys[number].rsplit("_", 2)
            return self._fetched.get(uid, 0), int(session), int(index)

        batch.reorder(sorted(range(len(batch.keys)), key=place))
        return super()._balance_batch(batch, *args, **kwargs)

    # Metrics, rollouts, and the end of a step.

    def on_validate_begin(self) -> None:
        """Before the first validation there is a logger, but nothing is logged yet."""
        super().on_validate_begin()
        self._open_metrics()

    def on_train_begin(self) -> None:
        """The run's own metrics file joins veRL's loggers."""
        super().on_train_begin()
        self._open_metrics()

    def _open_metrics(self) -> None:
        if self._metrics_file is None:
            self._metrics_file = MetricsFile(self.directory / "metrics.jsonl", self._resumed)
            self.logger.logger["metrics.jsonl"] = self._metrics_file

    def on_step_end(self) -> None:
        """Look at the fixed set, decide on the phase, and stop where that was asked for."""
        step, every = self.global_steps, self.settings.analyze_every
        self._looked: dict[str, float] = {}
        if every and step % every == 0:
            with marked_timer("fixed_set", self.timing_raw):
                self._looked = self._look(step)
        if (self.directory / STOP_FILE).exists():
            save_freq = self.config.trainer.save_freq
            if save_freq <= 0 or step % save_freq:
                with marked_timer("save_checkpoint", self.timing_raw):
                    self._save_checkpoint()
            self.total_training_steps = step
            (self.directory / STOP_FILE).unlink()
        super().on_step_end()

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: Any, **where: Any
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, **where)
        if self.phase.is_internal(self.global_steps):
            for name in [name for name in metrics if name.startswith(_OFF_POLICY)]:
                del metrics[name]
        metrics |= self._looked | shares(timing_raw) | self._rewards_of(batch)
        reason = self.phase.saw(self.global_steps, self._rewards, self._looked.get("fixed_set/kl"))
        if reason is not None:
            metrics["bupo/internal_phase_ends"] = 1.0

    def _rewards_of(self, batch: KVBatchMeta) -> dict[str, float]:
        """Mean reward, and accuracy where the reward function tells it."""
        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=["rm_scores", "extra_fields"],
        )
        scores = [float(row.sum()) for row in data["rm_scores"].unbind()]
        groups = defaultdict(list)
        accuracies = []
        extra_fields = list(data["extra_fields"])
        for key, tag, score, extra in zip(
            batch.keys, batch.tags, scores, extra_fields, strict=True
        ):
            if tag.get("is_padding", False):
                continue
            groups[key.split("_")[0]].append(score)
            told = (getattr(extra, "data", extra) or {}).get("reward_extra_info", {}).get("acc")
            if told is not None:
                accuracies.append(float(told))
        self._rewards = [sum(group) / len(group) for group in groups.values()]
        found = {"bupo/reward": sum(map(sum, groups.values())) / sum(map(len, groups.values()))}
        if accuracies:
            found["bupo/accuracy"] = sum(accuracies) / len(accuracies)
        return found

    def _dump_generations(self, **columns: Any) -> None:
        """veRL's, of an even choice of the rollouts."""
        keep = self.settings.keep_rollouts
        if columns["dump_path"] == self.config.trainer.rollout_data_dir:
            chosen = choose(len(columns["inputs"]), keep)
            for name in ("inputs", "outputs", "gts", "scores"):
                columns[name] = [columns[name][place] for place in chosen]
            extra = columns["reward_extra_infos_dict"]
            columns["reward_extra_infos_dict"] = {
                name: [values[place] for place in chosen] for name, values in extra.items()
            }
        super()._dump_generations(**columns)
