"""Everything that a laboratory has found so far, read from its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from bupo.lab.arms import Arm, at_layer
from bupo.lab.jobs import Job
from bupo.lab.learner import Rates
from bupo.lab.plan import Plan
from bupo.lab.results import curves, mean_run, outcomes
from bupo.lab.starts import Inspection
from bupo.race import Race
from entropylens.training_run import TrainingRun

__all__ = ["Findings"]


@dataclass(frozen=True, eq=False)
class Findings:
    """The numbers behind LAB.md.

    Args:
        plan: what was done.
        layer: l of BuPO.
        reading: that recommends it, or "given".
        rates: of GRPO's variants and of BuPO's, by these names.
        grid: one row a run of the grid's: `arm, lr, avg` (development split); empty without one.
        teaching: by start, the last look at its accuracy while it was taught.
        inspections: by start.
        arms: all of them.
        jobs: the runs of the arms.
        races: by start.
        twins: one run in this process and through veRL, by name.
    """

    plan: Plan
    layer: int
    reading: str
    rates: Mapping[str, Rates]
    grid: pd.DataFrame
    teaching: Mapping[str, float]
    inspections: Mapping[str, Inspection]
    arms: tuple[Arm, ...]
    jobs: tuple[Job, ...]
    races: Mapping[str, Race]
    twins: Mapping[str, TrainingRun]

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """See `results.outcomes`."""
        return outcomes(self.jobs)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """See `results.curves`."""
        return curves(self.jobs)

    @property
    def of_layers(self) -> dict[int, str]:
        """The arm that trains each inner layer first."""
        depth = self.plan.lessons[0].layers
        return {it: at_layer(it, self.layer) for it in range(1, depth)}

    def mean_run(self, name: str) -> TrainingRun:
        """See `results.mean_run`."""
        arm = next(it for it in self.arms if it.name == name)
        return mean_run(arm, self.jobs)
