"""The whole laboratory in one directory: starts, learning rates, arms; resumable run by run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from bupo.lab import subject
from bupo.lab.arms import BUPO, GRPO, ONE_RATE, Arm, arms
from bupo.lab.findings import Findings
from bupo.lab.jobs import Job, perform, read_outcome, side_by_side
from bupo.lab.learner import Rates
from bupo.lab.plan import Plan
from bupo.lab.results import AVERAGE
from bupo.lab.run import Course
from bupo.lab.starts import Inspection, inspect, recommended
from bupo.lab.subject import Lesson
from bupo.lab.twin import run_twins
from bupo.race import Race, Trial, race
from entropylens.rundir import RUN_FILE, open_run
from entropylens.training_run import TrainingRun

__all__ = ["Laboratory"]

#: Directories that a laboratory writes, and so that --force may remove.
OWN = ("start[0-9]*", "grid", "arms", "race", "twins", "figures")


@dataclass(frozen=True)
class Laboratory:
    """A plan in its directory.

    It holds `start<N>/` (the model, `analysis/`, `layer_probe/`), `grid/` and `arms/` (a directory
    an arm, in it one a run: `start<N>-seed<S>/`), `race/` and `twins/`.

    Args:
        plan: what is done.
        directory: where.
        workers: processes.
        progress: show progress bars.
    """

    plan: Plan
    directory: Path
    workers: int
    progress: bool = True

    def run(self, *, force: bool = False) -> Findings:
        """Do what is not done yet, and tell of everything.

        Args:
            force: replace the laboratory of another plan.

        Raises:
            OutputDirectoryError: the directory holds something else.
            SettingError: a start is unfit, or has no layer to train.
        """
        if force and self._is_there():
            for name in OWN:
                for found in self.directory.glob(name):
                    shutil.rmtree(found)
        open_run(self.directory, {"lab": asdict(self.plan)}, force=force)
        inspections, layer, reading = self.prepare()
        rates, grid = self.chosen_rates(layer)
        jobs = self.jobs(layer, rates)
        self._do(jobs, "training")
        return Findings(
            plan=self.plan, layer=layer, reading=reading, rates=rates, grid=grid,
            teaching={it.name: taught_accuracy(it) for it in self.starts},
            inspections=inspections, arms=self.arms(layer), jobs=tuple(jobs),
            races=self.races(layer, rates), twins=self.twins(layer, rates),
        )  # fmt: skip

    def prepare(self) -> tuple[dict[str, Inspection], int, str]:
        """Teach and inspect the starts (by name); BuPO's layer, and the reading that names it."""
        plan = self.plan
        lessons = list(zip(plan.lessons, self.starts, strict=True))
        missing = [it for it in lessons if not (it[1] / subject.RECORD).is_file()]
        side_by_side(_taught, missing, _one, workers=self._workers(missing), title="teaching",
                     unit="start", progress=self.progress)  # fmt: skip
        looked = partial(
            inspect, analyzed=plan.analyzed, probed=plan.probed, samples=plan.course.samples
        )
        found = side_by_side(
            looked, self.starts, _one, workers=1, title="inspecting", unit="start",
            progress=self.progress,
        )  # fmt: skip
        inspections = {it.name: one for it, one in zip(self.starts, found, strict=True)}
        if plan.layer is not None:
            return inspections, plan.layer, "given"
        return inspections, *recommended([it.analysis for it in found])

    @property
    def starts(self) -> list[Path]:
        """The directories of the starts."""
        return [self.directory / f"start{n}" for n in range(1, len(self.plan.lessons) + 1)]

    def arms(self, layer: int) -> tuple[Arm, ...]:
        """All arms."""
        plan = self.plan
        depth = plan.lessons[0].layers
        return arms(layer, depth, plan.internal_steps, plan.course.steps)

    def jobs(self, layer: int, rates: Rates) -> list[Job]:
        """All runs of all arms, seed by seed: an interrupted laboratory has whole comparisons."""
        plan = self.plan
        course = replace(plan.course, rates=rates)
        found = []
        for seed in plan.seeds:
            for arm in self.arms(layer):
                if seed in plan.other_seeds or arm.name in (GRPO, BUPO):
                    found += self._jobs(arm, course, layer, [seed], self.directory / "arms")
        return found

    def chosen_rates(self, layer: int) -> tuple[Rates, pd.DataFrame]:
        """The grid's learning rates: pi_theta's by GRPO, then pi_l's by BuPO with that one.

        What counts is Avg@K on the development split after the last step; of all of the grid's
        runs it is returned, too (`arm, lr, avg`).
        """
        plan, rates = self.plan, self.plan.course.rates
        if not plan.learning_rates:
            return rates, pd.DataFrame()
        grpo, bupo = self.arms(layer)[:2]
        lrs = plan.learning_rates
        first = self._tried(grpo, [replace(rates, lr=it) for it in lrs], layer)
        rates = replace(rates, lr=lrs[int(first.groupby("lr")[AVERAGE].mean().argmax())])
        second = self._tried(bupo, [replace(rates, internal_lr=it) for it in lrs], layer)
        rates = replace(rates, internal_lr=lrs[int(second.groupby("lr")[AVERAGE].mean().argmax())])
        return rates, pd.concat([first, second], ignore_index=True)

    def races(self, layer: int, rates: Rates) -> dict[str, Race]:
        """A race of all inner layers from each start, by its name."""
        plan = self.plan
        course = replace(plan.course, rates=rates)
        found = {}
        for start in self.starts if plan.race else ():
            place = self.directory / "race" / start.name
            if not (place / "race.json").is_file():
                trials = partial(self._trials, course=course, start=start, place=place)
                candidates = range(1, plan.lessons[0].layers)
                race(candidates, plan.race, trials, kl_bound=course.kl_bound).save(place)
            found[start.name] = Race.load(place)
        return found

    def _trials(
        self, layers: Sequence[int], steps: int, *, course: Course, start: Path, place: Path
    ) -> list[Trial]:
        plan = self.plan
        jobs = []
        for it in layers:
            arm = Arm(
                f"layer {it}, {steps} steps", layer=it, internal_steps=steps, internal=True,
                skipped=course.steps - steps,
            )  # fmt: skip
            jobs.append(
                Job(
                    arm, course, start, plan.seeds[0], place / arm.slug, it, "development",
                    plan.problems, plan.samples,
                )
            )  # fmt: skip
        self._do(jobs, f"race of {start.name}")
        found = []
        for it, job in zip(layers, jobs, strict=True):
            told = read_outcome(job)
            rewards = tuple(right / told["samples"] for right in told["right"])
            looks = TrainingRun.load(job.directory).looks
            moved = math.nan if looks is None else float(looks["kl"].iloc[-1])
            found.append(Trial(it, steps, rewards, moved))
        return found

    def twins(self, layer: int, rates: Rates) -> dict[str, TrainingRun]:
        """One run in this process and through veRL, by name; {} where not planned."""
        if not self.plan.through_verl:
            return {}
        here = next(it for it in self.jobs(layer, rates) if it.arm.name == ONE_RATE)
        return run_twins(here, self.directory / "twins")

    def _tried(self, arm: Arm, candidates: Sequence[Rates], layer: int) -> pd.DataFrame:
        """The candidates' runs: `arm, lr, avg`."""
        jobs = {}
        for rates in candidates:
            rate = rates.internal_lr if arm.internal else rates.lr
            place = self.directory / "grid" / f"lr{rate:g}"
            course = replace(self.plan.course, rates=rates)
            of_it = self._jobs(arm, course, layer, self.plan.grid_seeds, place)
            jobs[rate] = [replace(it, split="development") for it in of_it]
        self._do([it for of_it in jobs.values() for it in of_it], f"learning rate of {arm.name}")
        return pd.DataFrame(
            [
                {"arm": arm.name, "lr": rate, AVERAGE: accuracy_of(job)}
                for rate, of_it in jobs.items()
                for job in of_it
            ]
        )

    def _jobs(
        self, arm: Arm, course: Course, layer: int, seeds: Sequence[int], place: Path
    ) -> list[Job]:
        return [
            Job(
                arm, course, start, seed, place / arm.slug / f"{start.name}-seed{seed}", layer,
                "test", self.plan.problems, self.plan.samples,
            )
            for seed in seeds
            for start in self.starts
        ]  # fmt: skip

    def _is_there(self) -> bool:
        """Whether the directory holds a laboratory, of whatever plan."""
        try:
            told = json.loads((self.directory / RUN_FILE).read_text(encoding="utf-8"))
            return "lab" in told["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _do(self, jobs: Sequence[Job], title: str) -> None:
        missing = [it for it in jobs if not it.finished]
        side_by_side(perform, missing, _steps, workers=self._workers(missing), title=title,
                     progress=self.progress)  # fmt: skip

    def _workers(self, items: Sequence[object]) -> int:
        return max(1, min(self.workers, len(items)))


def accuracy_of(job: Job) -> float:
    """Avg@K of a finished run."""
    told = read_outcome(job)
    return float(sum(told["right"]) / (len(told["right"]) * told["samples"]))


def taught_accuracy(start: Path) -> float:
    """Of a start when its teaching ended."""
    told = json.loads((start / subject.RECORD).read_text(encoding="utf-8"))
    return float(told["looks"][-1]["accuracy"])


def _taught(lesson_and_place: tuple[Lesson, Path]) -> None:
    subject.start(*lesson_and_place, progress=False)


def _one(_item: object) -> int:
    return 1


def _steps(job: Job) -> int:
    return job.course.steps - job.arm.skipped
