"""A layer race through veRL: what is checked before, and the candidates' runs in `DIR/race`.

All start from the same model, are trained on the same problems in the same order, and answer the
same held-out ones. The same command resumes a race; see race.py for how it is decided.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from omegaconf import DictConfig

from bupo import launch
from bupo.checks import listed
from bupo.estimate import free_disk
from bupo.model import model_config, skeleton
from bupo.race import Race, Trial, parse_layers, race, round_steps
from bupo.race_trial import Candidate
from entropylens.errors import OutputDirectoryError, SettingError, TrainingFilesError
from entropylens.recognition import anatomy_of
from entropylens.rundir import RUN_FILE

__all__ = ["RacePlan", "plan_race"]


@dataclass(frozen=True)
class RacePlan:
    """A checked race.

    Args:
        config: a preset's name, or a YAML file.
        directory: of the run that the race is for; the race's own is `race/` in it.
        overrides: of that run, without its layer.
        layers: the candidates.
        rounds: steps at the end of each round.
        kl_bound: nats a token that pi_theta may move.
    """

    config: str
    directory: Path
    overrides: tuple[str, ...]
    layers: tuple[int, ...]
    rounds: tuple[int, ...]
    kl_bound: float

    @property
    def place(self) -> Path:
        """The race's own directory."""
        return self.directory / "race"

    @property
    def text(self) -> str:
        """All of it for a reader, and one trial as it would start."""
        lines, left = [f"A race of layers {', '.join(map(str, self.layers))}:"], len(self.layers)
        for number, steps in enumerate(self.rounds, start=1):
            lines.append(f"  round {number}: {left} layers to internal step {steps}")
            left = ceil(left / 2)
        first = self.candidate(self.layers[0])
        lines += [
            "The better half goes on: more held-out reward, the policy having moved by at most "
            f"{self.kl_bound:g} nats a token (bupo.kl_bound).",
            f"Each runs in {self.place}/layer<l>; the first trial, of layer {first.layer}:",
            "",
            first.plan(self.rounds[0], check_machine=False).text,
        ]
        return "\n".join(lines)

    def candidate(self, layer: int) -> Candidate:
        """One of them."""
        place = self.place / f"layer{layer}"
        return Candidate(layer, place, self.rounds, self.config, self.overrides)

    def run(self, *, force: bool = False) -> Race:
        """Let them race and save the outcome; what is finished is read.

        Args:
            force: start anew, removing the race that is there.

        Raises:
            OutputDirectoryError: the directory holds other runs, or has no room.
            TrainingFilesError: a trial did not get to its end; the same call goes on.
        """
        if force:
            for place in self.place.glob("layer[0-9]*"):
                shutil.rmtree(place, ignore_errors=True)
        else:
            self._check_place()
        self._check_room()
        found = race(self.layers, self.rounds[-1], self._trials, kl_bound=self.kl_bound)
        found.save(self.place)
        self._drop_checkpoints(self.layers)
        return found

    def _trials(self, layers: Sequence[int], steps: int) -> list[Trial]:
        self._drop_checkpoints(set(self.layers) - set(layers))
        found = [self.candidate(layer).end_of(steps) for layer in layers]
        if len({it.problems for it in found}) > 1:
            raise TrainingFilesError(
                f"the trials in {str(self.place)!r} answered different held-out problems",
                "leave the file data.val_files as it is during a race, or start it anew with "
                "--force",
            )
        return [it.trial for it in found]

    def _drop_checkpoints(self, layers: Iterable[int]) -> None:
        for layer in layers:
            self.candidate(layer).drop_checkpoints()

    def _check_place(self) -> None:
        """Refuse now, not after the race, a directory that no winner's run could go on in."""
        if not (self.directory / RUN_FILE).is_file():
            return
        overrides = [*self.overrides, f"bupo.layer={self.layers[0]}"]
        planned = launch.plan(self.config, self.directory, overrides, check_machine=False)
        refusal: OutputDirectoryError | None = None
        for layer in self.layers:
            config = planned.config.copy()
            config.bupo.layer = layer
            try:
                launch.claim(replace(planned, config=config))
            except OutputDirectoryError as error:
                refusal = error
            else:
                return
        assert refusal is not None
        raise refusal

    def _check_room(self) -> None:
        """Refuse where the first round's checkpoints, one a candidate, have no room."""
        new = [it for it in map(self.candidate, self.layers) if not it.place.exists()]
        if not new:
            return
        needed = len(new) * new[0].plan(self.rounds[0], check_machine=False).estimate.checkpoint
        if (room := free_disk(self.directory)) < needed:
            raise OutputDirectoryError(
                f"a checkpoint for each of {len(new)} layers takes about {needed:.1f} GiB, and "
                f"{str(self.directory)!r} has room for {room:.1f}",
                "choose another -o, or fewer layers",
            )


def plan_race(config: str, directory: Path, overrides: Sequence[str], layers: str) -> RacePlan:
    """Check a race, as far as that needs no GPU and no disk.

    Args:
        config: a preset's name, or a YAML file.
        directory: of the run that the race is for.
        overrides: Hydra's `key=value`, without a layer.
        layers: `race:A,B,C`.

    Raises:
        EntropyLensError: its subclasses say what is wrong and what to do.
    """
    composed = launch.with_model(config, overrides)
    steps, kl_bound = composed.bupo.internal_steps, composed.bupo.kl_bound
    if not isinstance(steps, int):
        raise SettingError(
            f"--layer {layers} compares layers after as many steps, and bupo.internal_steps is "
            f"{steps}",
            "give --internal-steps as a number",
        )
    if not isinstance(kl_bound, int | float) or not kl_bound > 0:
        raise SettingError(f"bupo.kl_bound is {kl_bound!r}", "give nats a token, more than 0")
    _check_held_out(composed)
    candidates = tuple(sorted(parse_layers(layers, _num_layers(composed))))
    rounds = tuple(round_steps(len(candidates), steps))
    planned = RacePlan(config, directory, tuple(overrides), candidates, rounds, float(kl_bound))
    for layer in candidates:
        planned.candidate(layer).plan(rounds[0], check_machine=False)
    return planned


def _num_layers(config: DictConfig) -> int:
    remote = bool(config.actor_rollout_ref.model.trust_remote_code)
    return anatomy_of(skeleton(model_config(config), trust_remote_code=remote)).num_layers


def _check_held_out(config: DictConfig) -> None:
    trained, held_out = (
        {Path(file).expanduser().resolve(): file for file in listed(config.data[key])}
        for key in ("train_files", "val_files")
    )
    for path in held_out.keys() & trained.keys():
        raise SettingError(
            f"data.val_files={held_out[path]} is trained on, too, and the race needs held-out "
            "problems",
            "pass data.val_files=FILE; `entropylens prepare --val-size N` writes one",
        )
