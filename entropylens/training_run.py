"""What a training run left behind, for pictures of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from entropylens.errors import TrainingFilesError
from entropylens.look import trajectory

__all__ = ["TrainingRun"]


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A run of `entropylens train`, as far as it got.

    Args:
        name: its directory's.
        metrics: one row a step, from 1: everything that metrics.jsonl holds.
        looks: one row a look at the fixed set (see `look.trajectory`), or None without any.
        layer: l, or None for a run without an internal policy.
        config: resolved, or {} where it is gone.
    """

    name: str
    metrics: pd.DataFrame
    looks: pd.DataFrame | None
    layer: int | None
    config: Mapping[str, Any]

    @property
    def internal_steps(self) -> int:
        """Steps made in the internal phase."""
        if "bupo/internal_phase" not in self.metrics:
            return 0
        return int(self.metrics["bupo/internal_phase"].sum())

    def curve(self, *names: str) -> pd.Series:
        """The first of these metrics that the run has, by step; what a step lacks is left out.

        Raises:
            TrainingFilesError: it has none of them.
        """
        for name in names:
            if name in self.metrics:
                return self.metrics.set_index("step")[name].dropna()
        raise TrainingFilesError(
            f"run {self.name!r} has no {' or '.join(names)}", "train with the presets' loggers"
        )

    @classmethod
    def load(cls, directory: str | Path) -> TrainingRun:
        """Read a run's directory.

        Raises:
            TrainingFilesError: it is no run, or has not finished a step.
        """
        path = Path(directory)
        file = path / "metrics.jsonl"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            rows = [row for row in rows if row["step"] > 0]
        except FileNotFoundError as error:
            raise TrainingFilesError(
                f"{str(path)!r} holds no training run (metrics.jsonl is missing)",
                "name a directory that `entropylens train -o` writes",
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingFilesError(
                f"{str(file)!r} cannot be read ({error})", "remove the line that is damaged"
            ) from error
        if not rows:
            raise TrainingFilesError(
                f"run {str(path)!r} has not finished a step", "wait for its first step"
            )
        looks = None
        if any((path / "fixed_set").glob("step_*/look.json")):
            looks = trajectory(path / "fixed_set")
        config = _config(path / "config.yaml")
        layer = config.get("bupo", {}).get("layer")
        metrics = pd.DataFrame(rows).drop_duplicates("step", keep="last").sort_values("step")
        return cls(
            path.resolve().name, metrics.reset_index(drop=True), looks,
            layer if isinstance(layer, int) else None, config,
        )  # fmt: skip


def _config(file: Path) -> dict[str, Any]:
    import yaml

    if not file.is_file():
        return {}
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
