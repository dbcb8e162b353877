"""A laboratory's runs as frames, and its contrasts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from scipy import stats

from bupo.lab.arms import Arm
from bupo.lab.jobs import Job, read_outcome
from entropylens.metrics import pass_at_k
from entropylens.scores import powers_of_two
from entropylens.training_run import TrainingRun

__all__ = [
    "AVERAGE",
    "INTERNAL",
    "Contrast",
    "contrast",
    "contrasts",
    "curves",
    "in_common",
    "mean_run",
    "outcomes",
    "records_of",
]

#: The column of Avg@K.
AVERAGE = "avg"
#: The metric of a step that is 1 in the internal phase.
INTERNAL = "bupo/internal_phase"
#: Fewer have no interval.
LEAST_PAIRS = 3


def outcomes(jobs: Iterable[Job]) -> pd.DataFrame:
    """One row a finished run: `arm, start, seed, avg` (Avg@K, a share), `pass@1`, `pass@2`, ...
    (shares), `internal_steps` (that were made), `seconds` (of training).
    """
    rows = []
    for job in jobs:
        if not job.finished:
            continue
        told = read_outcome(job)
        right, samples = told["right"], told["samples"]
        row: dict[str, Any] = {"arm": job.arm.name, "start": job.start.name, "seed": job.seed}
        row[AVERAGE] = sum(right) / (len(right) * samples)
        for k in powers_of_two(samples):
            row[f"pass@{k}"] = fmean(pass_at_k(samples, it, k) for it in right)
        row["internal_steps"] = sum(int(it.get(INTERNAL, 0)) for it in records_of(job))
        row["seconds"] = told["seconds"]
        rows.append(row)
    return pd.DataFrame(rows)


def in_common(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of `outcomes` whose start and seed every arm has."""
    arms = frame["arm"].nunique()
    return frame[frame.groupby(["start", "seed"])["arm"].transform("nunique") == arms]


def curves(jobs: Iterable[Job]) -> pd.DataFrame:
    """Every logged step of every finished run, step 0 too: `arm, start, seed, step` and metrics."""
    frames = []
    for job in jobs:
        if not job.finished:
            continue
        frame = pd.DataFrame(records_of(job))
        frame.insert(0, "seed", job.seed)
        frame.insert(0, "start", job.start.name)
        frame.insert(0, "arm", job.arm.name)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def records_of(job: Job) -> list[dict[str, Any]]:
    """Its logged steps; none of a run without any."""
    file = job.directory / "metrics.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def mean_run(arm: Arm, jobs: Iterable[Job]) -> TrainingRun:
    """The mean over the finished runs of an arm, step by step, to be drawn like a run."""
    runs = [TrainingRun.load(job.directory) for job in jobs if job.finished and job.arm == arm]
    looks = [run.looks for run in runs if run.looks is not None]
    return TrainingRun(
        name=arm.name,
        metrics=_mean(run.metrics for run in runs),
        looks=_mean(looks) if looks else None,
        layer=arm.layer,
        config={},
    )


def _mean(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    numbers = pd.concat([it.select_dtypes("number") for it in frames])
    return numbers.groupby("step", as_index=False).mean()


@dataclass(frozen=True)
class Contrast:
    """An arm against another, paired by start and seed.

    Args:
        arm: whose mean is taken,
        reference: less that of this one.
        metric: the column of `outcomes`.
        pairs: runs that both have.
        difference: mean of the paired differences.
        half_width: of its 95 % interval (Student's t over the pairs); NaN under 3 pairs.
        p: two-sided, uncorrected; NaN likewise.
    """

    arm: str
    reference: str
    metric: str
    pairs: int
    difference: float
    half_width: float
    p: float

    @property
    def shown(self) -> bool:
        """Whether there is a difference at 5 %, were nothing else asked."""
        return self.p < 0.05


def contrast(frame: pd.DataFrame, arm: str, reference: str, metric: str = AVERAGE) -> Contrast:
    """One contrast of `outcomes`."""
    keys = ["start", "seed"]
    first, second = (
        frame[frame["arm"] == name].set_index(keys)[metric] for name in (arm, reference)
    )
    differences = (first - second).dropna().tolist()
    count = len(differences)
    half_width = p = math.nan
    if count >= LEAST_PAIRS:
        error = stdev(differences) / math.sqrt(count)
        half_width = float(stats.t.ppf(0.975, count - 1)) * error
        p = float(not any(differences))
        if error > 0:
            p = float(2 * stats.t.sf(abs(fmean(differences)) / error, count - 1))
    mean = fmean(differences) if differences else math.nan
    return Contrast(arm, reference, metric, count, mean, half_width, p)


def contrasts(frame: pd.DataFrame, asked: Iterable[tuple[str, str, str]]) -> pd.DataFrame:
    """Several contrasts, a row each, and `p_holm`: p with Holm's correction over all of them.

    Args:
        frame: `outcomes`.
        asked: arm, reference and metric of each.
    """
    found = [contrast(frame, *it) for it in asked]
    frame = pd.DataFrame(map(asdict, found))
    ordered = frame["p"].dropna().sort_values()
    times = range(len(ordered), 0, -1)
    return frame.assign(p_holm=(ordered * list(times)).clip(upper=1.0).cummax())
