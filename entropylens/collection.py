"""What lies in some directories: analyses, training runs, evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from entropylens.errors import SettingError
from entropylens.results import Analysis
from entropylens.rundir import distinct_names
from entropylens.scores import Evaluation
from entropylens.training_run import TrainingRun

__all__ = ["Collection", "load_collection"]


@dataclass(frozen=True)
class Collection:
    """Results of several runs, by the names of their directories.

    Args:
        analyses: what `analyze` wrote.
        runs: what `train` wrote.
        evaluations: what `evaluate` wrote.
        probes: by an analysis' model, what `train --probe-layers` wrote for it.
    """

    analyses: Mapping[str, Analysis]
    runs: Mapping[str, TrainingRun]
    evaluations: Mapping[str, Evaluation]
    probes: Mapping[str, pd.DataFrame]


def load_collection(directories: Sequence[str | Path]) -> Collection:
    """Read everything that the directories hold.

    A training run's directory may hold an analysis and a layer probe of its own beside it.

    Raises:
        SettingError: a directory holds no result, or analyses are of different readings.
        EntropyLensError: a result cannot be read.
    """
    paths = [Path(it).resolve() for it in directories]
    analyses: dict[str, Analysis] = {}
    runs: dict[str, TrainingRun] = {}
    evaluations: dict[str, Evaluation] = {}
    probes: dict[str, pd.DataFrame] = {}
    for name, path in zip(distinct_names([str(it) for it in paths]), paths, strict=True):
        before = len(analyses) + len(runs) + len(evaluations) + len(probes)
        for place in (path, path / "analysis"):
            if (place / "analysis.json").is_file():
                analyses[name] = Analysis.load(place)
        if (path / "metrics.jsonl").is_file():
            runs[name] = TrainingRun.load(path)
        if (path / "evaluation.json").is_file():
            evaluations[name] = Evaluation.load(path)
        probe = path / "layer_probe" / "layer_probe.csv"
        if probe.is_file():
            model = analyses[name].model if name in analyses else name
            probes[model] = pd.read_csv(probe)
        if before == len(analyses) + len(runs) + len(evaluations) + len(probes):
            raise SettingError(
                f"{str(path)!r} holds no finished result",
                "name directories that analyze, train or evaluate wrote",
            )
    readings = {tuple(sorted(one.readings)) for one in analyses.values()}
    if len(readings) > 1:
        told = ", ".join(f"{name}: {'+'.join(it.readings)}" for name, it in analyses.items())
        raise SettingError(
            f"the analyses are of different readings ({told})",
            "analyze all with the same --reading",
        )
    return Collection(analyses, runs, evaluations, probes)
