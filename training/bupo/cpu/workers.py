"""veRL's workers on a CPU: the process group is opened before veRL asks for one."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from bupo.cpu import engines  # with the workers, the engines that they ask for

__all__ = ["CPUActorRolloutRefWorker", "CPUTrainingWorker", "engines"]


class CPUTrainingWorker(TrainingWorker):
    """Actor, reference or critic on one rank."""

    def __init__(self, config: Any) -> None:
        # veRL would ask for "cpu:gloo,<device>:<backend>", here "cpu:gloo,cpu:gloo", which torch
        # refuses; it does not ask where a group is open.
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo",
                rank=int(os.environ.get("RANK", "0")),
                world_size=int(os.environ.get("WORLD_SIZE", "1")),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        super().__init__(config)


class CPUActorRolloutRefWorker(ActorRolloutRefWorker):
    """The actor and its rollout on one rank."""

    actor_worker_cls = CPUTrainingWorker
    ref_worker_cls = CPUTrainingWorker
