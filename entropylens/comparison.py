"""Two evaluations problem by problem: is one better, or can they not be told apart?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from entropylens.errors import SettingError
from entropylens.files import make_directory, write_text, write_whole
from entropylens.resampling import PromptSums
from entropylens.scores import AVERAGE, METRICS, Evaluation, ks_of, powers_of_two

__all__ = ["Comparison", "compare"]

#: With fewer problems that differ, an interval of the difference is not to be trusted.
FEW_DIFFER = 5
RESAMPLES = 10_000

_UNDECIDED = "cannot be told apart"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The paired difference of two evaluations.

    Args:
        first: the name of the one.
        second: the name of the other.
        frame: one row a benchmark, metric and K: `benchmark, metric, k, first, second,
            difference` (second - first), `low, high` (95 %, problems resampled with both models'
            values; NaN where fewer than 5 problems differ), `problems, differing` (problems whose
            values differ), `p` (two-sided, by random signs), `verdict` (first | second | cannot
            be told apart: interval and p must agree). Shares, not percentages.
        unlike: how their answers were drawn differently.
    """

    first: str
    second: str
    frame: pd.DataFrame
    unlike: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """`frame`."""
        return self.frame

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the Avg@K say, in words, and what they do not say."""
        rows = self.frame[self.frame["metric"] == "avg@k"]
        found = [self._sentence(row) for row in rows.to_dict("records")]
        if self.unlike:
            found.append(f"They were not drawn alike: {'; '.join(self.unlike)}.")
        return (
            *found,
            "Two checkpoints are compared here, not two methods: another seed of the same "
            "training may turn the sign.",
        )

    def _sentence(self, row: Mapping[Any, Any]) -> str:
        first, second, difference = (100 * row[name] for name in ("first", "second", "difference"))
        said = f"{row['benchmark']}: {self.second} {second:.1f} %, {self.first} {first:.1f} %"
        if math.isfinite(row["low"]):
            said += f", {difference:+.1f} points ({100 * row['low']:+.1f} to "
            said += f"{100 * row['high']:+.1f})"
        said += f" over {row['problems']} problems"
        if row["verdict"] == _UNDECIDED:
            few = row["differing"] < FEW_DIFFER
            why = f" (only {row['differing']} problems differ)" if few else ""
            return f"{said}: they cannot be told apart with this data{why}."
        better = self.second if row["verdict"] == "second" else self.first
        return f"{said}: {better} is better on this data."

    def to_dict(self) -> dict[str, Any]:
        """All but `frame`, and the sentences."""
        return {
            "first": self.first,
            "second": self.second,
            "unlike": self.unlike,
            "sentences": self.sentences,
        }

    def save(self, directory: str | Path) -> None:
        """Write comparison.csv and comparison.json.

        Raises:
            OutputDirectoryError: the directory cannot be written.
        """
        path = make_directory(Path(directory))
        write_whole(path / "comparison.csv", lambda aside: self.frame.to_csv(aside, index=False))
        write_text(path / "comparison.json", json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> Comparison:
        """Read what `save` wrote."""
        path = Path(directory)
        told = json.loads((path / "comparison.json").read_text(encoding="utf-8"))
        frame = pd.read_csv(path / "comparison.csv").astype({"k": "Int64"})
        return cls(told["first"], told["second"], frame, tuple(told["unlike"]))


def compare(
    first: Evaluation,
    second: Evaluation,
    names: tuple[str, str] | None = None,
    *,
    ks: Sequence[int] = (),
    seed: int = 0,
) -> Comparison:
    """Compare on the benchmarks that both answered, by a bootstrap over problems.

    Args:
        first: the one.
        second: the other.
        names: what to call them; by default their models.
        ks: of Pass@K and Maj@K; by default every power of two up to the smaller n.
        seed: of the resamples.

    Raises:
        SettingError: no benchmark in common, or one of other problems or another judge.
    """
    ks = ks_of(ks)
    if seed < 0:
        raise SettingError(f"--seed is {seed}", "give at least 0")
    shared = {one.name: one for one in first.benchmarks}
    pairs = [(shared[one.name], one) for one in second.benchmarks if one.name in shared]
    if not pairs:
        raise SettingError(
            f"{first.model} and {second.model} have no benchmark in common",
            "evaluate both on the same ones",
        )
    rows = []
    for one, other in pairs:
        if one.digest != other.digest:
            raise SettingError(
                f"{one.name}: the problems differ ({one.num_problems} and {other.num_problems})",
                "evaluate both on the same ones",
            )
        if one.grader != other.grader:
            raise SettingError(
                f"{one.name}: the judges differ ({one.grader} and {other.grader})",
                "evaluate both with the same --grading and version",
            )
        wanted = [("avg@k", one.num_samples if one.num_samples == other.num_samples else None)]
        smaller = min(one.num_samples, other.num_samples)
        wanted += [(metric, k) for metric in METRICS[1:] for k in ks or powers_of_two(smaller)]
        for metric, k in wanted:
            mine, theirs = (
                it.values(one.name, metric, k or 1).sort_index() for it in (first, second)
            )
            rows.append(
                {"benchmark": one.name, "metric": metric, "k": k}
                | _difference(mine.to_numpy(float), theirs.to_numpy(float), seed)
            )
    frame = pd.DataFrame(rows)
    if len(pairs) > 1:
        frame = pd.concat([frame, _average(frame, len(pairs))], ignore_index=True)
    called = names or (first.model, second.model)
    drawn = (first.sampling, second.sampling)
    unlike = tuple(
        f"{name} {drawn[0].get(name)} and {drawn[1].get(name)}"
        for name in {**drawn[0], **drawn[1]}
        if name != "seed" and drawn[0].get(name) != drawn[1].get(name)
    )
    return Comparison(*called, frame.astype({"k": "Int64"}), unlike)


def _difference(first: Any, second: Any, seed: int) -> dict[str, Any]:
    differences = second - first
    differing = int((np.abs(differences) > 1e-12).sum())
    sums = PromptSums(differences[:, None, None], np.ones(len(differences)))
    low, high = math.nan, math.nan
    if differing >= FEW_DIFFER:
        low, high = (float(it[0, 0]) for it in sums.draw(RESAMPLES, seed).studentised())
        chance = _chance_of_signs(differences, seed)
    else:
        chance = 1.0
    return {
        "first": float(first.mean()),
        "second": float(second.mean()),
        "difference": float(differences.mean()),
        "low": low,
        "high": high,
        "problems": len(differences),
        "differing": differing,
        "p": chance,
        "verdict": _verdict(low, high, chance),
    }


def _chance_of_signs(differences: Any, seed: int) -> float:
    """How often signs thrown at random give a mean as far from zero (two-sided p)."""
    signs = np.random.default_rng(seed).integers(0, 2, (RESAMPLES, len(differences))) * 2 - 1
    thrown = np.abs(signs @ differences)
    return float((1 + (thrown >= abs(differences.sum()) - 1e-9).sum()) / (1 + RESAMPLES))


def _verdict(low: float, high: float, chance: float) -> str:
    """Both must say so: the interval alone errs twice as often where few problems are solved."""
    if chance <= 0.05 and low > 0:
        return "second"
    if chance <= 0.05 and high < 0:
        return "first"
    return _UNDECIDED


def _average(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    """The unweighted mean of the differences, as in `Evaluation.scores`."""
    rows = []
    keyed = frame.assign(key=frame["k"].where(frame["metric"] != "avg@k", 0))
    for (metric, _), group in keyed.groupby(["metric", "key"], sort=False):
        if len(group) < count:
            continue
        row: dict[str, Any] = {"benchmark": AVERAGE, "metric": metric}
        row["k"] = group["k"].iloc[0] if group["k"].nunique(dropna=False) == 1 else None
        for name in ("first", "second", "difference"):
            row[name] = float(group[name].mean())
        # A benchmark without any difference adds none; one with an unknown interval an unknown one.
        alike = group["differing"] == 0
        for end, sign in (("low", -1), ("high", 1)):
            distances = (group["difference"] - group[end]).mask(alike, 0.0).to_numpy(float)
            row[end] = row["difference"] + sign * float(np.sqrt((distances**2).sum())) / count
        row["problems"], row["differing"] = (
            int(group[name].sum()) for name in ("problems", "differing")
        )
        if alike.all():
            row["low"] = row["high"] = math.nan
        # Stouffer's sum of the benchmarks' signed normal scores.
        scores = np.sign(group["difference"]) * norm.isf(group["p"] / 2)
        row["p"] = float(2 * norm.sf(abs(scores.sum()) / math.sqrt(count)))
        row["verdict"] = _verdict(row["low"], row["high"], row["p"])
        rows.append(row)
    return pd.DataFrame(rows)
