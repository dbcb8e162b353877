"""Evaluation: graded answers of one model, with Avg@K, Pass@K, Maj@K and their intervals."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from entropylens.answers import normalized
from entropylens.errors import EvaluationFilesError, SettingError
from entropylens.files import make_directory, write_text, write_whole
from entropylens.metrics import (
    MOST_VOTES,
    Interval,
    maj_at_k,
    pass_at_k,
    problems_interval,
    sampling_interval,
)

__all__ = ["AVERAGE", "METRICS", "Evaluation", "GradedBenchmark", "powers_of_two"]

SCHEMA_VERSION = 1
METRICS = ("avg@k", "pass@k", "maj@k")
#: The name of the unweighted mean over benchmarks.
AVERAGE = "average"
#: Fewer solved problems than this say little about the model.
FEW_SOLVED = 5

_GRADES = "grades.parquet"


@dataclass(frozen=True)
class GradedBenchmark:
    """What was asked, and how it was judged.

    Args:
        name: of the benchmark.
        source: where it came from.
        revision: the Hub commit, or None.
        num_problems: how many were asked.
        num_samples: n, answers a problem.
        digest: of the problems and their gold answers.
        grader: what judged, with its version.
    """

    name: str
    source: str
    revision: str | None
    num_problems: int
    num_samples: int
    digest: str
    grader: str


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Graded answers of one model.

    Args:
        model: its name or path.
        fingerprint: a digest of the model.
        sampling: how answers were drawn, the engine included.
        benchmarks: what was asked, in the order of the command.
        grades: one row an answer: `benchmark, problem, sample, answer` (None without one),
            `verdict, num_tokens, truncated`.
        ks: of Pass@K and Maj@K; () stands for every power of two up to n.
        versions: of the packages that made it.
    """

    model: str
    fingerprint: str
    sampling: Mapping[str, Any]
    benchmarks: tuple[GradedBenchmark, ...]
    grades: pd.DataFrame
    ks: tuple[int, ...]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        for one in self.benchmarks:
            if self.ks and max(self.ks) > one.num_samples:
                raise SettingError(
                    f"K = {max(self.ks)} of n = {one.num_samples} answers ({one.name})",
                    f"draw at least {max(self.ks)} answers with -n, or lower --k",
                )

    @cached_property
    def problems(self) -> pd.DataFrame:
        """One row a problem: `benchmark, problem, n, correct, answered, truncated, mean_tokens`,
        and `answer`, the most frequent one that was given.
        """
        rows = []
        for (benchmark, problem), group in self.grades.groupby(
            ["benchmark", "problem"], sort=False
        ):
            votes = Counter(group["answer"].dropna())
            rows.append(
                {
                    "benchmark": benchmark,
                    "problem": problem,
                    "n": len(group),
                    "correct": int((group["verdict"] == "correct").sum()),
                    "answered": int((group["verdict"] != "no answer").sum()),
                    "truncated": int(group["truncated"].sum()),
                    "mean_tokens": float(group["num_tokens"].mean()),
                    "answer": max(votes, key=lambda it: votes[it]) if votes else None,
                }
            )
        return pd.DataFrame(rows)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One row a benchmark, metric and K.

        `benchmark, metric` (avg@k | pass@k | maj@k), `k, value, low, high` (95 %, had other
        problems of the kind been asked), `sampling_low, sampling_high` (95 %, had these problems
        been answered anew; NaN for maj@k), `n, problems, solved` (problems with a right answer),
        `few_solved` (fewer than 5: the values say little), `truncated, no_answer, unjudged`
        (shares of the answers: cut at the token limit, without an answer, given up by the
        judge), `mean_tokens, grader`. Values are shares, not percentages. `average` is the
        unweighted mean over the benchmarks, where one judge judged them all.
        """
        rows = [row for one in self.benchmarks for row in self._scores_of(one)]
        frame = pd.DataFrame(rows)
        if len(self.benchmarks) > 1 and len({one.grader for one in self.benchmarks}) == 1:
            frame = pd.concat([frame, _averages(frame, len(self.benchmarks))], ignore_index=True)
        return frame.astype({"k": "Int64", "n": "Int64"})

    def values(self, benchmark: str, metric: str, k: int) -> pd.Series:
        """A metric problem by problem, indexed by problem.

        Raises:
            KeyError: no such benchmark.
            SettingError: k is more than n.
        """
        one = {it.name: it for it in self.benchmarks}[benchmark]
        if metric != "avg@k" and k > one.num_samples:
            raise SettingError(f"K = {k} of n = {one.num_samples} answers", "choose a smaller K")
        of_it = self.problems[self.problems["benchmark"] == benchmark].set_index("problem")
        if metric == "maj@k":
            return self._majorities(benchmark, k)
        k = 1 if metric == "avg@k" else k
        return of_it["correct"].map(lambda correct: pass_at_k(one.num_samples, correct, k))

    def score(self, benchmark: str, metric: str = "avg@k", k: int | None = None) -> float:
        """One value of `scores`; k is needed for pass@k and maj@k."""
        found = self.scores
        found = found[(found["benchmark"] == benchmark) & (found["metric"] == metric)]
        if metric != "avg@k":
            found = found[found["k"] == k]
        return float(found["value"].iloc[0])

    def to_frame(self) -> pd.DataFrame:
        """`scores`."""
        return self.scores

    def beside(
        self, benchmarks: Sequence[GradedBenchmark], ks: Sequence[int]
    ) -> tuple[GradedBenchmark, ...]:
        """What stays of this evaluation where these benchmarks join it in its directory.

        Args:
            benchmarks: they take the place of those that are the same.
            ks: of Pass@K and Maj@K.

        Raises:
            SettingError: another benchmark has the name of one, or too few answers for a K.
        """
        names = {one.name: one.digest for one in benchmarks}
        kept = []
        for one in self.benchmarks:
            if names.get(one.name, one.digest) != one.digest:
                raise SettingError(
                    f"the directory holds other problems called {one.name!r} ({one.source})",
                    "choose another directory with -o, or rename the file",
                )
            if one.name in names or one.digest in names.values():
                continue
            if max(ks, default=1) > one.num_samples:
                raise SettingError(
                    f"the directory holds {one.name} with n = {one.num_samples}, fewer than "
                    f"--k {max(ks)}",
                    "choose another directory with -o, or name that benchmark with more answers",
                )
            kept.append(one)
        return tuple(kept)

    def with_others(self, other: Evaluation) -> Evaluation:
        """This one, and what stays of another of the same run.

        Raises:
            SettingError: as `beside`.
        """
        kept = other.beside(self.benchmarks, self.ks)
        theirs = other.grades[other.grades["benchmark"].isin([one.name for one in kept])]
        return replace(
            self,
            benchmarks=(*kept, *self.benchmarks),
            grades=pd.concat([theirs, self.grades], ignore_index=True),
        )

    def to_dict(self) -> dict[str, Any]:
        """What evaluation.json holds."""
        averages = self.scores
        averages = averages[averages["metric"] == "avg@k"]
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "sampling": dict(self.sampling),
            "benchmarks": [asdict(one) for one in self.benchmarks],
            "ks": list(self.ks),
            "avg": dict(zip(averages["benchmark"], averages["value"], strict=True)),
            "versions": dict(self.versions),
        }

    def save(self, directory: str | Path) -> None:
        """Write grades.parquet, problems.csv, scores.csv and, last, evaluation.json.

        Raises:
            OutputDirectoryError: the directory cannot be written.
        """
        path = make_directory(Path(directory))
        told = json.dumps(self.to_dict(), indent=2) + "\n"  # before anything is written
        write_whole(path / _GRADES, lambda aside: self.grades.to_parquet(aside, index=False))
        write_whole(path / "problems.csv", lambda aside: self.problems.to_csv(aside, index=False))
        write_whole(path / "scores.csv", lambda aside: self.scores.to_csv(aside, index=False))
        write_text(path / "evaluation.json", told)

    @classmethod
    def load(cls, directory: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            EvaluationFilesError: no evaluation, an unreadable one, or one of a newer version.
        """
        path = Path(directory)
        try:
            content = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
            if content["schema_version"] > SCHEMA_VERSION:
                raise EvaluationFilesError(
                    f"{str(path)!r} was written with schema_version {content['schema_version']}; "
                    f"this entropylens reads up to {SCHEMA_VERSION}",
                    "upgrade entropylens: pip install -U entropylens",
                )
            benchmarks = tuple(GradedBenchmark(**one) for one in content["benchmarks"])
            grades = pd.read_parquet(path / _GRADES)
            counts = grades["benchmark"].value_counts()
            wanted = {one.name: one.num_problems * one.num_samples for one in benchmarks}
            if counts.to_dict() != wanted:
                raise ValueError(f"{_GRADES} is of another call than evaluation.json")
            return cls(
                model=content["model"],
                fingerprint=content["fingerprint"],
                sampling=content["sampling"],
                benchmarks=benchmarks,
                grades=grades,
                ks=tuple(content["ks"]),
                versions=content["versions"],
            )
        except FileNotFoundError as error:
            raise EvaluationFilesError(
                f"{str(path)!r} holds no finished evaluation "
                f"({Path(error.filename or _GRADES).name} is missing)",
                "name a directory that `entropylens evaluate -o` wrote",
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationFilesError(
                f"the evaluation in {str(path)!r} cannot be read ({error})",
                "run `entropylens evaluate` again: finished answers are kept",
            ) from error

    def _scores_of(self, one: GradedBenchmark) -> list[dict[str, Any]]:
        grades = self.grades[self.grades["benchmark"] == one.name]
        of_it = self.problems[self.problems["benchmark"] == one.name]
        correct = of_it["correct"].to_numpy()
        solved = int((correct > 0).sum())
        shared = {
            "n": one.num_samples,
            "problems": one.num_problems,
            "solved": solved,
            "few_solved": solved < FEW_SOLVED,
            "truncated": float(grades["truncated"].mean()),
            "no_answer": float((grades["verdict"] == "no answer").mean()),
            "unjudged": float(grades["verdict"].isin(["timeout", "crashed"]).mean()),
            "mean_tokens": float(grades["num_tokens"].mean()),
            "grader": one.grader,
        }
        ks = self.ks or powers_of_two(one.num_samples)
        wanted = [("avg@k", one.num_samples)]
        wanted += [
            (metric, k)
            for metric in METRICS[1:]
            for k in ks
            if metric == "pass@k" or one.num_samples <= MOST_VOTES
        ]
        rows = []
        for metric, k in wanted:
            values = self.values(one.name, metric, k).to_numpy(dtype=float)
            over = problems_interval(values)
            within = Interval(math.nan, math.nan)
            if metric != "maj@k":
                within = sampling_interval(one.num_samples, correct, 1 if metric == "avg@k" else k)
            rows.append(
                {
                    "benchmark": one.name,
                    "metric": metric,
                    "k": k,
                    "value": float(values.mean()),
                    "low": over.low,
                    "high": over.high,
                    "sampling_low": within.low,
                    "sampling_high": within.high,
                    **shared,
                }
            )
        return rows

    @cached_property
    def _votes(self) -> dict[tuple[Any, Any], tuple[int, list[int], int]]:
        """By benchmark and problem: right answers, how often each wrong one, silent ones."""
        found: dict[tuple[Any, Any], tuple[int, list[int], int]] = {}
        for (benchmark, problem), group in self.grades.groupby(
            ["benchmark", "problem"], sort=False
        ):
            right = group["verdict"] == "correct"
            wrong = Counter(map(normalized, group["answer"][~right].dropna()))
            silent = len(group) - int(right.sum()) - sum(wrong.values())
            found[benchmark, problem] = (int(right.sum()), list(wrong.values()), silent)
        return found

    def _majorities(self, benchmark: str, k: int) -> pd.Series:
        found = {
            problem: maj_at_k(*votes, k)
            for (name, problem), votes in self._votes.items()
            if name == benchmark
        }
        return pd.Series(found).rename_axis("problem")


def powers_of_two(n: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to n."""
    return tuple(2**power for power in range(n.bit_length()) if 2**power <= n)


def _averages(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    """The unweighted mean over benchmarks, where all of them have the metric and K.

    Its interval joins theirs: the distances to their ends add up in squares (Zou & Donner 2008).
    """
    rows = []
    keyed = frame.assign(key=frame["k"].where(frame["metric"] != "avg@k", 0))
    for (metric, _), group in keyed.groupby(["metric", "key"], sort=False):
        if len(group) < count:
            continue
        same = {name: group[name].iloc[0] if group[name].nunique() == 1 else pd.NA
                for name in ("k", "n")}  # fmt: skip
        row = {"benchmark": AVERAGE, "metric": metric, **same, "value": group["value"].mean()}
        for kind in ("", "sampling_"):
            for end, sign in (("low", -1), ("high", 1)):
                distance = np.sqrt(((group["value"] - group[f"{kind}{end}"]) ** 2).sum())
                if group[f"{kind}{end}"].isna().any():
                    distance = math.nan
                row[f"{kind}{end}"] = row["value"] + sign * distance / count
        row |= {name: int(group[name].sum()) for name in ("problems", "solved")}
        row["few_solved"] = bool(group["few_solved"].any())
        for name in ("truncated", "no_answer", "unjudged", "mean_tokens"):
            row[name] = group[name].mean()
        row["grader"] = ", ".join(dict.fromkeys(group["grader"]))
        rows.append(row)
    return pd.DataFrame(rows)


def ks_of(given: Sequence[int]) -> tuple[int, ...]:
    """The K of a command, sorted.

    Raises:
        SettingError: one under 1.
    """
    if given and min(given) < 1:
        raise SettingError(f"--k is {min(given)}", "give numbers of answers, from 1")
    return tuple(sorted(set(given)))
