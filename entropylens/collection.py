"""What lies in some directories: analyses, training runs, evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from entropylens.errors import SettingError, TrainingFilesError
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

    A training run's directory may hold an analysis and a layer probe of its own beside it; a probe
    without one belongs to the only analysis that is named.

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
            runs[name] = replace(TrainingRun.load(path), name=name)
        if (path / "evaluation.json").is_file():
            evaluations[name] = Evaluation.load(path)
        probe = path / "layer_probe" / "layer_probe.csv"
        if probe.is_file():
            probes[name] = _probe(probe)
        if before == len(analyses) + len(runs) + len(evaluations) + len(probes):
            raise SettingError(
                f"{str(path)!r} holds no finished result",
                "name directories that analyze, train or evaluate wrote",
            )
    if len(analyses) == len(probes) == 1:
        probes = dict(zip(analyses, probes.values(), strict=True))
    by_model = {analyses[name].model: it for name, it in probes.items() if name in analyses}
    readings = {tuple(sorted(one.readings)) for one in analyses.values()}
    if len(readings) > 1:
        told = ", ".join(f"{name}: {'+'.join(it.readings)}" for name, it in analyses.items())
        raise SettingError(
            f"the analyses are of different readings ({told})",
            "analyze all with the same --reading",
        )
    return Collection(analyses, runs, evaluations, by_model)


def _probe(file: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(file)[["layer", "cosine", "cosine_low", "cosine_high"]]
    except (OSError, ValueError, KeyError) as error:
        raise TrainingFilesError(
            f"the layer probe {str(file)!r} cannot be read ({error})",
            "make it again: entropylens train --probe-layers --force",
        ) from error
