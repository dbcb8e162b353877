"""BuPO's engine on a CPU takes the place of the plain one."""

from verl.workers.engine.base import EngineRegistry

from bupo.cpu.engines import BACKENDS, CPUEngine
from bupo.engine import InternalPolicyEngine

__all__ = ["CPUBuPOEngine"]


class CPUBuPOEngine(InternalPolicyEngine, CPUEngine):
    """On a CPU."""


for _backend in BACKENDS:
    EngineRegistry._engines["language_model"][_backend]["cpu"] = CPUBuPOEngine
