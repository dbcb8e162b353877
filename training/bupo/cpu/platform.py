"""A CPU as one of veRL's platforms: ranks are Ray processes, collectives run over gloo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

__all__ = ["PlatformCPU"]


class _DeviceModule(ModuleType):
    """torch.cpu, and the names of torch.cuda that veRL calls without asking."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return True

    def empty_cache(self) -> None:
        pass

    def synchronize(self, *_: Any) -> None:
        pass

    def set_device(self, *_: Any) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> int:
        return 0

    memory_allocated = memory_reserved = _nothing
    max_memory_allocated = max_memory_reserved = _nothing
    reset_peak_memory_stats = reset_accumulated_memory_stats = _nothing

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_device_name(self, *_: Any) -> str:
        return "CPU"

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)


_MODULE = _DeviceModule("bupo_cpu_device")


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """One CPU a rank."""

    device_name = "cpu"
    vendor_name = "generic"
    device_module = _MODULE

    def is_available(self) -> bool:
        """There always is a CPU."""
        return True

    def current_device(self) -> torch.device:
        """What veRL passes to `.to()`: a number would mean a GPU."""
        return torch.device("cpu")

    def device_count(self) -> int:
        """One a rank."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing to choose."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing runs aside."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        """No allocator to set."""

    def empty_cache(self) -> None:
        """No cache to empty."""

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        """None of CUDA's."""
        return None, None

    def communication_backend_name(self) -> str:
        """What torch.distributed runs on."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """A name that nothing else reads."""
        return "BUPO_CPU_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        """A logical resource: Ray is started with as many "GPUs" as there are ranks."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """None."""
        return []

    def is_ipc_supported(self) -> bool:
        """Weights go through Ray."""
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No profiler."""
        yield

    def profiler_start(self) -> None:
        """No profiler."""

    def profiler_stop(self) -> None:
        """No profiler."""

    def cudart(self) -> None:
        """No CUDA."""
