"""veRL 0.9.1 on a CPU: platform, engines, workers and rollouts, each registered where it belongs.

Importing this package (VERL_USE_EXTERNAL_MODULES=bupo.cpu) is all that plain veRL needs. It is for
tests and small studies: GPUs use none of it. What is heavy is registered when veRL imports what it
is registered with.
"""

from types import ModuleType

import wrapt

from bupo.cpu import platform  # before veRL is first asked for its platform
from bupo.names import AGENT, ROLLOUT

__all__ = ["platform"]


@wrapt.when_imported("verl.workers.rollout.base")
def _register_rollout(module: ModuleType) -> None:
    module._ROLLOUT_REGISTRY[ROLLOUT, "async"] = "bupo.cpu.rollout.GenerateAdapter"


@wrapt.when_imported("verl.workers.rollout.replica")
def _register_replica(module: ModuleType) -> None:
    def load() -> type:
        from bupo.cpu.rollout import GenerateReplica

        return GenerateReplica

    module.RolloutReplicaRegistry.register(ROLLOUT, load)


@wrapt.when_imported("verl.experimental.agent_loop.agent_loop")
def _register_agent(module: ModuleType) -> None:
    module._agent_loop_registry[AGENT] = {"_target_": "bupo.cpu.agent.KeyedAgentLoop"}


@wrapt.when_imported("verl.trainer.ppo.v1.trainer_sync")
def _register_trainer(_module: ModuleType) -> None:
    from bupo.cpu import trainer  # noqa: F401
