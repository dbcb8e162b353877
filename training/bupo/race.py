"""Which layer to train first, found by trying (beyond the paper).

Each candidate's pi_l is trained from the same start for a few steps; the better half goes on for
twice as many, until one is left (successive halving, Jamieson & Talwalkar 2016). Better is who
answers more of the held-out problems as pi_theta, among those that have not moved pi_theta
farther than `kl_bound` from its start; where all of a round have, no layer wins. What is left has
won a short race on few problems: the margin stands beside it, and a race whose margin is within
its error settles nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from scipy import stats

from entropylens.errors import AnalysisFilesError, SettingError
from entropylens.files import make_directory, write_text

__all__ = ["RACE", "Race", "Trial", "parse_layers", "race", "round_steps"]

#: What `--layer` begins with.
RACE = "race:"


@dataclass(frozen=True)
class Trial:
    """How pi_theta stands after some internal steps at a layer.

    Args:
        layer: l.
        steps: internal steps made.
        rewards: mean reward of each held-out problem, in an order that all trials share.
        kl: KL(pi_theta of step 0 || pi_theta) on the fixed set, nats a token.
    """

    layer: int
    steps: int
    rewards: tuple[float, ...]
    kl: float

    @property
    def reward(self) -> float:
        """Mean over the problems."""
        return fmean(self.rewards)

    def within(self, kl_bound: float) -> bool:
        """Whether pi_theta stayed near; a KL that is NaN is too far."""
        return self.kl <= kl_bound

    def to_dict(self) -> dict[str, Any]:
        """What a file holds; null for a KL that is NaN."""
        return asdict(self) | {"kl": None if math.isnan(self.kl) else self.kl}

    @classmethod
    def of_dict(cls, told: Mapping[str, Any]) -> Trial:
        """Read what `to_dict` told.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        kl = math.nan if told["kl"] is None else float(told["kl"])
        return cls(int(told["layer"]), int(told["steps"]), tuple(map(float, told["rewards"])), kl)


@dataclass(frozen=True)
class Race:
    """A finished race.

    Args:
        rounds: the trials of each round.
        kl_bound: nats a token.
        layer: the winner, or None where all of the last round moved too far.
    """

    rounds: tuple[tuple[Trial, ...], ...]
    kl_bound: float
    layer: int | None

    @property
    def margin(self) -> tuple[float, float]:
        """The last round's first over its second: difference in reward, and its 95 % half-width.

        Problems are the units (paired, Student's t). Who moved too far counts for nothing; NaN
        where fewer than two are left then, or where there is but one problem (the half-width).
        """
        last = [it for it in _ranked(self.rounds[-1], self.kl_bound) if it.within(self.kl_bound)]
        return _over(last[0], last[1]) if len(last) > 1 else (math.nan, math.nan)

    @property
    def _fall(self) -> str:
        """That the winner's own reward has fallen from its first round to the last, if it has."""
        first, last = (
            next(it for it in trials if it.layer == self.layer)
            for trials in (self.rounds[0], self.rounds[-1])
        )
        difference, half = _over(first, last)
        if not difference > half:
            return ""
        return (
            f" Its own reward fell from {first.reward:.3f} after {first.steps} steps to "
            f"{last.reward:.3f} after {last.steps}: so many internal steps do harm."
        )

    @property
    def reason(self) -> str:
        """The outcome in words."""
        bound = f"more than {self.kl_bound:g} nats a token"
        last = sorted(it.layer for it in self.rounds[-1])
        if self.layer is None:
            return (
                f"No layer: after {self.rounds[-1][0].steps} internal steps each of {last} had "
                f"moved the policy by {bound}."
            )
        said = f"Layer {self.layer} is left of {sorted(it.layer for it in self.rounds[0])}"
        difference, half = self.margin
        if math.isnan(difference):
            others = [layer for layer in last if layer != self.layer]
            return f"{said}; {others} moved the policy by {bound}.{self._fall}"
        settled = "" if difference > half else ", which does not settle it"
        return (
            f"{said}; its lead in held-out reward over the second of the last round is "
            f"{difference:+.3f} (95 % half-width {half:.3f}){settled}.{self._fall}"
        )

    @property
    def winner(self) -> int:
        """The layer.

        Raises:
            SettingError: there is none.
        """
        if self.layer is None:
            raise SettingError(
                self.reason,
                "pass --layer N to choose one yourself, let others race, or give fewer "
                "--internal-steps or a larger bupo.kl_bound",
            )
        return self.layer

    def to_frame(self) -> pd.DataFrame:
        """One row a trial: `round, layer, steps, reward, kl, goes_on`."""
        rows = []
        for number, trials in enumerate(self.rounds, start=1):
            going = {it.layer for it in self.rounds[number]} if number < len(self.rounds) else {
                self.layer
            }  # fmt: skip
            rows += [
                {
                    "round": number, "layer": it.layer, "steps": it.steps, "reward": it.reward,
                    "kl": it.kl, "goes_on": it.layer in going,
                }
                for it in sorted(trials, key=lambda it: it.layer)
            ]  # fmt: skip
        return pd.DataFrame(rows)

    def save(self, directory: Path) -> None:
        """Write race.csv and race.json.

        Raises:
            OutputDirectoryError: the directory cannot be written.
        """
        make_directory(directory)
        write_text(directory / "race.csv", self.to_frame().to_csv(index=False))
        told = {
            "layer": self.layer, "reason": self.reason, "kl_bound": self.kl_bound,
            "rounds": [[it.to_dict() for it in trials] for trials in self.rounds],
        }  # fmt: skip
        write_text(directory / "race.json", json.dumps(told, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Race:
        """Read what `save` wrote.

        Raises:
            AnalysisFilesError: there is nothing, or nothing readable.
        """
        try:
            told = json.loads((directory / "race.json").read_text(encoding="utf-8"))
            rounds = tuple(tuple(map(Trial.of_dict, trials)) for trials in told["rounds"])
            return cls(rounds, told["kl_bound"], told["layer"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AnalysisFilesError(
                f"{str(directory)!r} holds no readable race ({error})",
                "name a directory that a race wrote",
            ) from error


def parse_layers(text: str, num_layers: int) -> list[int]:
    """The candidates of `race:A,B,C`.

    Raises:
        SettingError: not two inner layers or more, or one of them twice.
    """
    try:
        layers = [int(it) for it in text.removeprefix(RACE).split(",")]
    except ValueError:
        layers = []
    if len(layers) < 2 or len(set(layers)) < len(layers) or not all(
        1 <= it < num_layers for it in layers
    ):  # fmt: skip
        raise SettingError(
            f"--layer {text} names no candidates",
            f"give different inner layers from 1 to {num_layers - 1}, as race:2,4,6",
        )
    return layers


def round_steps(candidates: int, internal_steps: int) -> list[int]:
    """Steps at the end of each round, doubling to `internal_steps` or just below.

    Raises:
        SettingError: there are too few of them to be halved so often.
    """
    rounds = math.ceil(math.log2(candidates))
    first = internal_steps // 2 ** (rounds - 1)
    if first < 1:
        raise SettingError(
            f"{internal_steps} internal steps are too few for a race of {candidates} layers",
            f"give --internal-steps {2 ** (rounds - 1)} or more, or fewer layers",
        )
    return [first * 2**number for number in range(rounds)]


def race(
    layers: Sequence[int],
    internal_steps: int,
    trials: Callable[[Sequence[int], int], Sequence[Trial]],
    *,
    kl_bound: float,
) -> Race:
    """Let the candidates race; their order does not matter.

    Args:
        layers: the candidates, at least two.
        internal_steps: of the last round, or a few more where they do not halve so often.
        trials: from layers and steps to how they stand then; steps grow from round to round.
        kl_bound: nats a token that pi_theta may move.
    """
    rounds: list[tuple[Trial, ...]] = []
    left = sorted(layers)
    for steps in round_steps(len(left), internal_steps):
        found = tuple(trials(left, steps))
        rounds.append(found)
        if not any(it.within(kl_bound) for it in found):
            return Race(tuple(rounds), kl_bound, None)
        better = _ranked(found, kl_bound)[: math.ceil(len(found) / 2)]
        left = sorted(it.layer for it in better)
    return Race(tuple(rounds), kl_bound, left[0])


def _over(one: Trial, other: Trial) -> tuple[float, float]:
    """How much more reward one has, and the 95 % half-width of that (paired by problem)."""
    differences = [mine - its for mine, its in zip(one.rewards, other.rewards, strict=True)]
    count = len(differences)
    if count < 2:
        return differences[0], math.nan
    half = stats.t.ppf(0.975, count - 1) * stdev(differences) / math.sqrt(count)
    return fmean(differences), float(half)


def _ranked(trials: Sequence[Trial], kl_bound: float) -> list[Trial]:
    """Best first: within the bound, more reward, less KL, the lower layer; NaN comes last."""

    def place(it: Trial) -> tuple[bool, float, float, int]:
        loss = math.inf if math.isnan(it.reward) else -it.reward
        return not it.within(kl_bound), loss, math.inf if math.isnan(it.kl) else it.kl, it.layer

    return sorted(trials, key=place)
