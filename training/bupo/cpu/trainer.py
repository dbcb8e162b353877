"""`trainer.v1.trainer_mode=cpu`: veRL's synchronous trainer, its workers being ours for a CPU."""

from __future__ import annotations

import ray
from omegaconf import DictConfig
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from bupo.cpu.workers import CPUActorRolloutRefWorker, CPUTrainingWorker

__all__ = ["CPUTrainer"]


@register_trainer("cpu")
class CPUTrainer(PPOTrainerSync):
    """Plain veRL: nothing of BuPO in it. The yardstick of its tests."""

    def __init__(self, config: DictConfig) -> None:
        config.trainer.v1.trainer_mode = "sync"  # veRL compares with it in places
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            worker = CPUTrainingWorker if role == Role.Critic else CPUActorRolloutRefWorker
            self.role_worker_mapping[role] = ray.remote(worker)
