"""veRL's worker, and what BuPO's trainer asks of it besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_id, get_device_name, get_torch_device
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from bupo import engine  # with the workers, the engine that they ask for
from bupo.fixed_set import FixedSet
from entropylens.errors import EntropyLensError
from entropylens.sources.verl import assemble

_TrainingWorker: Any = TrainingWorker
if get_device_name() == "cpu":
    from bupo.cpu.bupo_engine import CPUBuPOEngine as _  # noqa: F401
    from bupo.cpu.workers import CPUTrainingWorker

    _TrainingWorker = CPUTrainingWorker

__all__ = ["BuPOCriticWorker", "BuPOWorker", "engine"]


class BuPOCriticWorker(_TrainingWorker):
    """The critic is veRL's."""


class BuPOWorker(ActorRolloutRefWorker):
    """The actor, its rollout and the reference model on one rank."""

    actor_worker_cls = _TrainingWorker
    ref_worker_cls = _TrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def reset_optimizer(self) -> None:
        """Forget the actor's moments."""
        self.actor.engine.reset_optimizer()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def look(self, directory: str, step: int, layer: int) -> dict[str, Any]:
        """Analyze the training weights over the fixed set, on rank 0.

        Args:
            directory: the fixed set's.
            step: updates made so far.
            layer: l.

        Returns:
            `Look.to_metrics()`, or {"error": why not}; {} on other ranks.
        """
        engine = self.actor.engine
        first = dist.get_rank() == 0
        weights = {}
        for name, weight in engine.whole_weights():
            if first:
                weights[name] = weight.detach().to("cpu", engine._autocast_dtype, copy=True)
        if not first:
            return {}
        try:
            return _look(engine.model_config, weights, Path(directory), step, layer)
        except EntropyLensError as error:
            return {"error": error.line}
        finally:
            get_torch_device().empty_cache()  # the rollout engine wants the memory


def _look(
    model_config: Any, weights: dict[str, torch.Tensor], directory: Path, step: int, layer: int
) -> dict[str, float]:
    model = assemble(
        model_config.hf_config,
        weights,
        dtype=next(iter(weights.values())).dtype,
        device=get_device_id(),
        trust_remote_code=model_config.trust_remote_code,
    )
    found = FixedSet.open(directory).look(model, step=step, layer=layer, progress=False)
    return found.to_metrics()
