"""One candidate of a layer race through veRL: a short internal phase, round after round.

Its directory is a run like any other. Each round goes on from the checkpoint of the one before;
what it ended with is read from the look and the held-out answers of its last step, and stands in
`trial_<steps>.json` from then on, so that no round is made twice.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

from bupo import launch
from bupo.race import Trial
from bupo.settings import Settings
from entropylens.errors import AnalysisFilesError, TrainingFilesError
from entropylens.files import write_text
from entropylens.look import LOOK_FILE, Look
from entropylens.rundir import fingerprint

__all__ = ["Candidate", "Ended"]

logger = logging.getLogger(__name__)

#: Where veRL notes the step of its last checkpoint.
_TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Ended:
    """A round of one candidate that is through.

    Args:
        trial: how it stands.
        problems: a digest of the held-out problems; equal ones, equal digest.
    """

    trial: Trial
    problems: str

    def save(self, file: Path) -> None:
        """Write a JSON file, whole."""
        told = self.trial.to_dict() | {"problems": self.problems}
        write_text(file, json.dumps(told, indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Ended:
        """Read what `save` wrote.

        Raises:
            AnalysisFilesError: it is not readable.
        """
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            return cls(Trial.of_dict(told), str(told["problems"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AnalysisFilesError(
                f"{str(file)!r} is no readable trial ({error})",
                "remove it, and the same command makes it again",
            ) from error


@dataclass(frozen=True)
class Candidate:
    """A layer that takes part.

    Args:
        layer: l.
        place: the directory of its run.
        rounds: steps at the end of each round.
        config: a preset's name, or a YAML file.
        overrides: of the run that the race is for.
    """

    layer: int
    place: Path
    rounds: Sequence[int]
    config: str
    overrides: Sequence[str]

    def plan(self, steps: int, *, check_machine: bool = True) -> launch.Plan:
        """The run that brings it to the end of a round.

        Raises:
            EntropyLensError: as `launch.plan`.
        """
        every = self.rounds[0]  # each round ends at a multiple of it
        own: dict[str, Any] = {
            "bupo.layer": self.layer,
            "bupo.internal_steps": self.rounds[-1],
            "bupo.analyze_every": every,
            # The bound judges trials and is not theirs: with another one they are as good.
            "bupo.kl_bound": Settings.kl_bound,
            "trainer.total_training_steps": steps,
            "trainer.test_freq": every,
            "trainer.save_freq": every,
            "trainer.resume_mode": "auto",
            "trainer.max_actor_ckpt_to_keep": 1,
            "trainer.max_critic_ckpt_to_keep": 1,
            "trainer.validation_data_dir": self.place.absolute() / "validation",
        }
        # Last, and so in force: also where the run's own checkpoints have a place of their own.
        forced = [*launch.places(self.place), *(f"{key}={value}" for key, value in own.items())]
        overrides = [*self.overrides, *forced]
        return launch.plan(self.config, self.place, overrides, check_machine=check_machine)

    def end_of(self, steps: int) -> Ended:
        """How it stands at the end of a round, which is made or, if it is through, read.

        Raises:
            OutputDirectoryError: its directory holds a run with other settings.
            TrainingFilesError: veRL did not get to the end.
            AnalysisFilesError: what stands there is damaged.
        """
        kept = self.place / f"trial_{steps}.json"
        planned = self.plan(steps, check_machine=not kept.is_file())
        launch.claim(planned)  # what is read must be of these settings, too
        if kept.is_file():
            return Ended.load(kept)
        self._rewind(steps)
        logger.info("race: layer %d to step %d in %s", self.layer, steps, self.place)
        code = launch.start(planned)
        if code != 0:
            raise self._unfinished(f"ended with veRL's exit code {code}")
        ended = self._read(steps)
        ended.save(kept)
        for checkpoint in self._checkpoints.glob("global_step_*"):
            if checkpoint.name != f"global_step_{steps}":
                shutil.rmtree(checkpoint, ignore_errors=True)
        return ended

    def drop_checkpoints(self) -> None:
        """It goes on no more; one checkpoint may take tens of GiB."""
        shutil.rmtree(self._checkpoints, ignore_errors=True)

    @property
    def _checkpoints(self) -> Path:
        return self.place / "checkpoints"

    def _rewind(self, steps: int) -> None:
        """Go back a round where this one's last step was saved, but not gone on from.

        Look and answers come after the checkpoint, and a run that has no step left makes neither.
        """
        tracker = self._checkpoints / _TRACKER
        if not tracker.is_file() or int(tracker.read_text(encoding="utf-8")) < steps:
            return
        tracker.unlink()
        shutil.rmtree(self._checkpoints / f"global_step_{steps}", ignore_errors=True)
        for end in self.rounds:  # its checkpoint is kept until this round is through
            if end < steps and (self._checkpoints / f"global_step_{end}").is_dir():
                write_text(tracker, str(end))

    def _read(self, steps: int) -> Ended:
        answers = self.place / "validation" / f"{steps}.jsonl"
        if not answers.is_file():  # Ctrl-C ends a run after any step, with exit code 0
            raise self._unfinished(f"ended before step {steps}")
        rewards = _held_out(answers)
        look = self.place / "fixed_set" / f"step_{steps}"
        # A collapsed model, whose states are NaN, cannot be looked at.
        kl = Look.load(look).kl if (look / LOOK_FILE).is_file() else nan
        trial = Trial(self.layer, steps, tuple(rewards.values()), kl)
        return Ended(trial, fingerprint({"problems": list(rewards)}))

    def _unfinished(self, how: str) -> TrainingFilesError:
        return TrainingFilesError(
            f"the trial of layer {self.layer} in {str(self.place)!r} {how}",
            "veRL's own messages stand above; the same command goes on with the race",
        )


def _held_out(file: Path) -> dict[str, float]:
    """Mean reward of each problem in veRL's validation file, ordered by problem.

    Raises:
        TrainingFilesError: it is empty or damaged.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    try:
        with file.open(encoding="utf-8") as lines:  # splitlines() would split within answers
            for line in lines:
                row = json.loads(line)
                scores[row["input"]].append(float(row["score"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingFilesError(
            f"{str(file)!r} cannot be read ({error})", "the same command makes it again"
        ) from error
    if not scores:
        raise TrainingFilesError(f"{str(file)!r} is empty", "the same command makes it again")
    return {problem: fmean(scores[problem]) for problem in sorted(scores)}
