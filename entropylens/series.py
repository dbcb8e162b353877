"""A training run's checkpoints, each analyzed as a model of its own, in one frame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from entropylens.analysis import analyze
from entropylens.errors import AnalysisFilesError, SettingError
from entropylens.files import make_directory, write_whole
from entropylens.responses import Response
from entropylens.results import Analysis
from entropylens.sources import verl

__all__ = ["Series", "analyze_series"]


@dataclass(frozen=True, eq=False)
class Series:
    """The analyses of a run's checkpoints.

    Args:
        analyses: by global step, in order.
    """

    analyses: Mapping[int, Analysis]

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row a step and layer: `step`, then the columns of `Analysis.layers`."""
        frames = [analysis.layers.assign(step=step) for step, analysis in self.analyses.items()]
        frame = pd.concat(frames, ignore_index=True)
        frame.insert(0, "step", frame.pop("step"))
        return frame

    def to_frame(self) -> pd.DataFrame:
        """The same as `layers`."""
        return self.layers

    def save(self, directory: str | Path) -> None:
        """Write each analysis into `step_<N>`, and series.csv with all layers.

        Raises:
            OutputDirectoryError: the directory cannot be written.
        """
        path = make_directory(Path(directory))
        for step, analysis in self.analyses.items():
            analysis.save(path / f"step_{step}")
        write_whole(path / "series.csv", lambda aside: self.layers.to_csv(aside, index=False))

    @classmethod
    def load(cls, directory: str | Path) -> Series:
        """Read what `save` wrote.

        Raises:
            AnalysisFilesError: no series, or an analysis that cannot be read.
        """
        found = {
            int(step.name.removeprefix("step_")): step
            for step in Path(directory).glob("step_*")
            if step.name.removeprefix("step_").isdecimal()
        }
        if not found:
            raise AnalysisFilesError(
                f"{str(directory)!r} holds no series (no step_<N> in it)",
                "name a directory that `entropylens analyze RUN -o` wrote",
            )
        return cls({step: Analysis.load(found[step]) for step in sorted(found)})


def analyze_series(
    run: str | Path,
    responses: str | Path | Iterable[Response | Mapping[str, Any]] | None = None,
    *,
    output: str | Path | None = None,
    **settings: Any,
) -> Series:
    """Analyze every checkpoint of a veRL run; give responses to compare steps on the same text.

    Args:
        run: a directory with `global_step_<N>/actor`.
        responses: as for `analyze`; None lets each checkpoint answer for itself.
        output: gets one directory a step; the same call resumes what was interrupted.
        settings: as for `analyze`.

    Raises:
        SettingError: there are no checkpoints.
        EntropyLensError: as `analyze`.
    """
    found = verl.steps(Path(run))
    if not found:
        raise SettingError(
            f"{str(run)!r} holds no veRL checkpoints",
            "name a run's directory with global_step_<N>/actor",
        )
    if responses is not None and not isinstance(responses, str | Path):
        responses = list(responses)  # read once a step
    series = Series(
        {
            step: analyze(
                actor,
                responses,
                output=None if output is None else Path(output) / f"step_{step}",
                **settings,
            )
            for step, actor in found
        }
    )
    if output is not None:
        path = Path(output) / "series.csv"
        write_whole(path, lambda aside: series.layers.to_csv(aside, index=False))
    return series
