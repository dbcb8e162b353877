"""veRL's FSDP2 engines on a CPU: they are registered for CUDA and NPU only."""

from __future__ import annotations

from typing import Any

from torch import nn
from verl.utils import model as verl_model
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import (
    FSDPEngineWithLMHead,
    FSDPEngineWithValueHead,
)

__all__ = ["CPUEngine", "CPUValueEngine", "OnCPU"]

BACKENDS = ["fsdp", "fsdp2"]


class OnCPU:
    """What an FSDP engine must leave out where there is no accelerator to pin memory for."""

    engine_config: Any

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        # A reference model (forward_only) would get CPUOffloadPolicy(pin_memory=True).
        forward_only = self.engine_config.forward_only
        object.__setattr__(self.engine_config, "forward_only", False)
        try:
            return super()._build_fsdp_module(module)  # type: ignore[misc]
        finally:
            object.__setattr__(self.engine_config, "forward_only", forward_only)


class CPUEngine(OnCPU, FSDPEngineWithLMHead):
    """The actor and the reference model, plain veRL."""


class CPUValueEngine(OnCPU, FSDPEngineWithValueHead):
    """The critic: veRL loads it with flash attention, which needs a GPU."""

    def _build_module(self) -> nn.Module:
        from transformers import AutoModelForTokenClassification

        def load(
            local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool
        ) -> nn.Module:
            return AutoModelForTokenClassification.from_pretrained(
                local_path,
                dtype=torch_dtype,
                config=model_config,
                trust_remote_code=trust_remote_code,
            )

        original = verl_model.load_valuehead_model
        verl_model.load_valuehead_model = load
        try:
            return super()._build_module()
        finally:
            verl_model.load_valuehead_model = original


EngineRegistry.register("language_model", BACKENDS, device="cpu")(CPUEngine)
EngineRegistry.register("value_model", BACKENDS, device="cpu")(CPUValueEngine)
