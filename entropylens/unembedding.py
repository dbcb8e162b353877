"""E_u out of whatever module stands for lm_head: plain, LoRA-wrapped, quantized or offloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropylens.errors import WeightsError

__all__ = ["bias_of", "weight_of"]


@torch.no_grad()
def weight_of(module: Any) -> Tensor:
    """The matrix that an lm_head module multiplies with, [vocab, d_model], dense and detached.

    Raises:
        WeightsError: it is quantized or offloaded in a way that is not understood.
    """
    if hasattr(module, "modules_to_save"):  # peft trains a copy of the module
        return weight_of(_active(module))
    if hasattr(module, "get_delta_weight"):  # a LoRA layer around the module
        base = weight_of(module.get_base_layer())
        if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
            return base
        if any(getattr(module, "use_dora", {}).values()) or not hasattr(module, "lora_A"):
            raise WeightsError(
                "the adapter of the unembedding is no plain LoRA",
                "merge it first: model = model.merge_and_unload()",
            )
        deltas = [module.get_delta_weight(name) for name in _adapters(module)]
        return torch.stack([base, *(delta.to(base) for delta in deltas)]).sum(0)
    weight = _materialised(module, "weight")
    if not weight.is_floating_point():
        weight = _dequantized(module)
    return weight.detach()


def bias_of(module: Any) -> Tensor | None:
    """The bias that this module adds, [vocab], or None."""
    if hasattr(module, "modules_to_save"):
        return bias_of(_active(module))
    if hasattr(module, "get_delta_weight"):
        return bias_of(module.get_base_layer())
    if getattr(module, "bias", None) is None:
        return None
    return _materialised(module, "bias").detach()


def _active(module: Any) -> Any:
    if getattr(module, "disable_adapters", False):
        return module.original_module
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    return module.modules_to_save[active[0]] if active else module.original_module


def _adapters(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def _materialised(module: Any, name: str) -> Tensor:
    """A parameter that accelerate may have offloaded, read from where it lies."""
    value: Tensor = getattr(module, name)
    if value.device.type != "meta":
        return value
    hook: Any = getattr(module, "_hf_hook", None)
    stored = getattr(hook, "weights_map", None)
    if stored is None:
        raise WeightsError(
            f"the unembedding's {name} is on the meta device: it was never loaded",
            "load the model with weights, or keep lm_head on a device in device_map",
        )
    found: Tensor = stored[name].to(hook.execution_device)
    return found


def _dequantized(module: Any) -> Tensor:
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        import bitsandbytes.functional

        dense: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, state)
        return dense
    raise WeightsError(
        f"the unembedding is quantized ({type(module).__name__}, {weight.dtype})",
        "quantize the model without lm_head (llm_int8_skip_modules=['lm_head'])",
    )
