"""The whole laboratory in one directory: starts, learning rates, arms; resumable run by run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from bupo.lab import subject
from bupo.lab.arms import BUPO, GRPO, Arm, arms
from bupo.lab.findings import Findings
from bupo.lab.jobs import Job, perform, read_outcome, side_by_side
from bupo.lab.learner import Rates
from bupo.lab.plan import Plan
from bupo.lab.questions import KL
from bupo.lab.results import AVERAGE, records_of
from bupo.lab.run import Course
from bupo.lab.starts import Inspection, inspect, recommended
from bupo.lab.subject import Lesson
from bupo.lab.task import Split
from bupo.lab.twin import run_twins
from bupo.race import Race, Trial, race
from entropylens.rundir import RUN_FILE, open_run
from entropylens.training_run import TrainingRun

__all__ = ["Laboratory"]

#: What a laboratory writes, and so that --force may remove.
OWN = ("start[0-9]*", "grid", "arms", "race", "twins", "figures", "LAB.md")
#: A start's seeds begin behind its number times the first; those of its grid at the second more.
SEEDS_OF_A_START, GRID_SEED = 100, 51


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
            force: start anew, removing the laboratory that is there.

        Raises:
            OutputDirectoryError: the directory holds something else.
            SettingError: a start is unfit, or has no layer to train.
        """
        if force and self._is_there():
            for name in OWN:
                for found in self.directory.glob(name):
                    if found.is_dir():
                        shutil.rmtree(found)
                    else:
                        found.unlink()
        open_run(self.directory, {"lab": asdict(self.plan)}, force=force)
        inspections, layer, reading = self.prepare()
        rates, grid = self.chosen_rates(layer)
        jobs = self.jobs(layer, rates)
        self._do(jobs, "training")
        return Findings(
            plan=self.plan, layer=layer, reading=reading, rates=rates, grid=grid,
            teaching={it.name: taught_accuracy(it) for it in self.starts},
            inspections=inspections, arms=self.arms(layer), jobs=tuple(jobs),
            races=self.races(rates), twins=self.twins(jobs),
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

    def jobs(self, layer: int, rates: Mapping[str, Rates]) -> list[Job]:
        """All runs of all arms, seed by seed: an interrupted laboratory has whole comparisons."""
        plan = self.plan
        found = []
        for number in range(1, plan.seeds + 1):
            for arm in self.arms(layer):
                if number <= plan.other_seeds or arm.name in (GRPO, BUPO):
                    course = replace(plan.course, rates=rates[method_of(arm)])
                    found += self._jobs(arm, course, layer, number, self.directory / "arms")
        return found

    def chosen_rates(self, layer: int) -> tuple[dict[str, Rates], pd.DataFrame]:
        """GRPO's and BuPO's, each chosen by its grid; and the grids' runs (`arm, lr, avg`).

        What counts is Avg@K on the development split after the last step. All other arms have the
        one or the other's.
        """
        rates = self.plan.course.rates
        if not self.plan.learning_rates:
            return {GRPO: rates, BUPO: rates}, pd.DataFrame()
        chosen, tried = {}, []
        for arm in self.arms(layer)[:2]:
            runs = self._tried(arm, layer)
            best = runs.groupby("lr")[AVERAGE].mean()
            chosen[arm.name] = replace(rates, lr=float(best.index[int(best.argmax())]))
            tried.append(runs)
        return chosen, pd.concat(tried, ignore_index=True)

    def races(self, rates: Mapping[str, Rates]) -> dict[str, Race]:
        """A race of all inner layers from each start, by its name."""
        plan = self.plan
        if not plan.race:
            return {}
        course = replace(plan.course, rates=rates[BUPO])
        found = {}
        for seed, start in zip(self._seeds(1), self.starts, strict=True):
            place = self.directory / "race" / start.name
            if not (place / "race.json").is_file():
                trials = partial(self._trials, course=course, start=start, seed=seed, place=place)
                candidates = range(1, plan.lessons[0].layers)
                race(candidates, plan.race, trials, kl_bound=course.kl_bound).save(place)
            found[start.name] = Race.load(place)
        return found

    def _trials(
        self,
        layers: Sequence[int],
        steps: int,
        *,
        course: Course,
        start: Path,
        seed: int,
        place: Path,
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
                    arm, course, start, seed, place / arm.slug, it, "development",
                    plan.problems, plan.samples,
                )
            )  # fmt: skip
        self._do(jobs, f"race of {start.name}")
        found = []
        for it, job in zip(layers, jobs, strict=True):
            told = read_outcome(job)
            rewards = tuple(right / told["samples"] for right in told["right"])
            # A collapsed model, whose states are NaN, cannot be looked at.
            last = records_of(job)[-1].get(KL)
            found.append(Trial(it, steps, rewards, math.nan if last is None else last))
        return found

    def twins(self, jobs: Sequence[Job]) -> dict[str, TrainingRun]:
        """BuPO's first run in this process and through veRL, by name; {} where not planned."""
        if not self.plan.through_verl:
            return {}
        here = next(it for it in jobs if it.arm.name == BUPO)
        return run_twins(here, self.directory / "twins")

    def _tried(self, arm: Arm, layer: int) -> pd.DataFrame:
        """An arm with each learning rate: `arm, lr, avg`."""
        plan = self.plan
        jobs = []
        for lr in plan.learning_rates:
            course = replace(plan.course, rates=replace(plan.course.rates, lr=lr))
            place = self.directory / "grid" / f"lr{lr:g}"
            for number in range(GRID_SEED, GRID_SEED + plan.grid_seeds):
                jobs += self._jobs(arm, course, layer, number, place, split="development")
        self._do(jobs, f"learning rate of {arm.name}")
        rows = [(arm.name, it.course.rates.lr, accuracy_of(it)) for it in jobs]
        return pd.DataFrame(rows, columns=["arm", "lr", AVERAGE])

    def _jobs(
        self,
        arm: Arm,
        course: Course,
        layer: int,
        number: int,
        place: Path,
        split: Split = "test",
    ) -> list[Job]:
        """An arm's run from each start; no two starts share a seed."""
        return [
            Job(
                arm, course, start, seed, place / arm.slug / f"{start.name}-seed{seed}", layer,
                split, self.plan.problems, self.plan.samples,
            )
            for seed, start in zip(self._seeds(number), self.starts, strict=True)
        ]  # fmt: skip

    def _seeds(self, number: int) -> list[int]:
        return [SEEDS_OF_A_START * place + number for place in range(1, len(self.starts) + 1)]

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


def method_of(arm: Arm) -> str:
    """Whose learning rate an arm has: that of what it is a variant of."""
    return GRPO if arm.layer is None else BUPO


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
