"""What veRL loads: VERL_USE_EXTERNAL_MODULES=bupo.plugin, in every process of a run.

Only the process that trains pays for the trainer: it is registered once veRL's own is imported.
Engines come with `bupo.workers`, in the processes whose workers these are.
"""

from types import ModuleType

import wrapt

from bupo import cpu

__all__ = ["cpu"]


@wrapt.when_imported("verl.trainer.ppo.v1.trainer_sync")
def _register_trainer(_module: ModuleType) -> None:
    from bupo import trainer  # noqa: F401
