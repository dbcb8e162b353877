"""A single-turn agent whose draws are keyed, so that a run can be repeated and resumed."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

__all__ = ["KeyedAgentLoop"]


class KeyedAgentLoop(SingleTurnAgentLoop):
    """Passes (seed, step, dataset index, sample) with each request, as `sampling_params["key"]`."""

    async def run(
        self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any
    ) -> AgentLoopOutput:
        """One answer to one prompt."""
        key = [int(kwargs[name]) for name in ("global_steps", "index", "session_id")]
        keyed = {**sampling_params, "key": [self.rollout_config.seed, *key]}
        return await super().run(keyed, priority=priority, **kwargs)
