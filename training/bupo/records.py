"""What a run leaves behind a step: metrics.jsonl, and some of its rollouts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from entropylens.files import make_directory, write_text

__all__ = ["MetricsFile", "shares"]


class MetricsFile:
    """One JSON object a step, in the manner of veRL's loggers.

    Args:
        path: continued by a resumed run; what it will write anew is dropped: later steps, and
            everything where it starts from the beginning.
        step: updates made so far.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        make_directory(path.parent)
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if step and _step_of(line) <= step]
            write_text(path, "".join(line + "\n" for line in kept))

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Append the numbers of one step; what is not finite becomes null."""
        record: dict[str, Any] = {"step": step}
        for name, value in data.items():
            if isinstance(value, Real) or hasattr(value, "item"):
                number = float(value)
                record[name] = number if math.isfinite(number) else None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # torn by the end of a run


def shares(timing: Mapping[str, float]) -> dict[str, float]:
    """Each part's share of the step's seconds."""
    whole = timing.get("step", 0.0)
    return {
        f"share/{part}": seconds / whole
        for part, seconds in timing.items()
        if part != "step" and whole > 0
    }
