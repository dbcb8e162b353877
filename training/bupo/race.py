"""Which layer to train first, found by trying (beyond the paper).

Each candidate's pi_l is trained from the same start for a few steps; the better half goes on for
twice as many, until one is left (successive halving, Jamieson & Talwalkar 2016). Better is who
answers more of the held-out problems as pi_theta, among those that have not moved pi_theta
farther than `kl_bound` from its start. What is left has won a short race on few problems: the
margin stands beside it, and a race whose margin is within its error settles nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

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


@dataclass(frozen=True)
class Race:
    """A finished race.

    Args:
        rounds: the trials of each round.
        kl_bound: nats a token.
        layer: the winner, or None where every candidate moved too far in the first round.
    """

    rounds: tuple[tuple[Trial, ...], ...]
    kl_bound: float
    layer: int | None

    @property
    def margin(self) -> tuple[float, float]:
        """The last round's first over its second: difference in reward, and its 95 % half-width.

        Problems are the units (paired, Student's t). NaN where one ran alone.
        """
        last = _ranked(self.rounds[-1], self.kl_bound)
        if len(last) < 2:
            return math.nan, math.nan
        pairs = zip(last[0].rewards, last[1].rewards, strict=True)
        differences = [mine - other for mine, other in pairs]
        count = len(differences)
        if count < 2:
            return differences[0], math.nan
        half = stats.t.ppf(0.975, count - 1) * stdev(differences) / math.sqrt(count)
        return fmean(differences), float(half)

    @property
    def reason(self) -> str:
        """The outcome in words."""
        if self.layer is None:
            return (
                "No layer: after the first round every candidate had moved the policy by more than "
                f"{self.kl_bound:g} nats a token."
            )
        said = f"Layer {self.layer} is left of {sorted(it.layer for it in self.rounds[0])}"
        difference, half = self.margin
        if math.isnan(difference):
            return f"{said}."
        settled = "" if difference > half else ", which does not settle it"
        return (
            f"{said}; its lead in held-out reward over the second of the last round is "
            f"{difference:+.3f} (95 % half-width {half:.3f}){settled}."
        )

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
        told = asdict(self) | {"reason": self.reason}
        write_text(directory / "race.json", json.dumps(told, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Race:
        """Read what `save` wrote.

        Raises:
            AnalysisFilesError: there is nothing, or nothing readable.
        """
        try:
            told = json.loads((directory / "race.json").read_text(encoding="utf-8"))
            rounds = tuple(
                tuple(Trial(**it | {"rewards": tuple(it["rewards"])}) for it in trials)
                for trials in told["rounds"]
            )
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
    """Steps at the end of each round: the last one has made all internal steps.

    Raises:
        SettingError: there are too few of them to be halved so often.
    """
    rounds = math.ceil(math.log2(candidates))
    first = internal_steps // 2 ** (rounds - 1)
    if first < 1:
        raise SettingError(
            f"{internal_steps} internal steps cannot be halved for {rounds} rounds of "
            f"{candidates} layers",
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
    """Let the candidates race.

    Args:
        layers: the candidates.
        internal_steps: of the last round.
        trials: from layers and steps to how they stand then; steps grow from round to round.
        kl_bound: nats a token that pi_theta may move.
    """
    rounds = []
    left = list(layers)
    for steps in round_steps(len(layers), internal_steps):
        found = tuple(trials(left, steps))
        rounds.append(found)
        if not rounds[1:] and all(not it.kl <= kl_bound for it in found):
            return Race(tuple(rounds), kl_bound, None)
        left = [it.layer for it in _ranked(found, kl_bound)[: math.ceil(len(found) / 2)]]
    return Race(tuple(rounds), kl_bound, left[0])


def _ranked(trials: Sequence[Trial], kl_bound: float) -> list[Trial]:
    """Best first; a KL that is NaN is too far, and of equal rewards the smaller KL is better."""
    return sorted(trials, key=lambda it: (not it.kl <= kl_bound, -it.reward, it.kl))
