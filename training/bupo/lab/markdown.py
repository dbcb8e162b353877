"""Tables and numbers as Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

import pandas as pd

__all__ = ["filled", "points", "signed", "table"]

#: How a paragraph begins that is none.
_AS_IT_IS = ("|", "#", "!")


def table(frame: pd.DataFrame, titles: Mapping[str, str] | None = None) -> str:
    """A table with a line above and below.

    Args:
        frame: cells are texts, whole numbers, or numbers shown with three digits; NaN is empty.
        titles: of columns, where they differ from their names.
    """
    names = [(titles or {}).get(str(it), str(it)) for it in frame]
    lines = ["", f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for row in frame.itertuples(index=False):
        lines.append(f"| {' | '.join(map(_cell, row))} |")
    return "\n".join([*lines, ""])


def filled(text: str) -> str:
    """Paragraphs in lines of equal length; tables, headings and pictures as they are."""
    parts = [it.strip("\n") for it in text.split("\n\n")]
    return "\n\n".join(it if it.startswith(_AS_IT_IS) else textwrap.fill(it, 100) for it in parts)


def points(share: float) -> str:
    """A share as percentage points, without a sign of its own."""
    return "" if math.isnan(share) else f"{100 * share:.1f}"


def signed(share: float) -> str:
    """A difference of shares in percentage points."""
    return "" if math.isnan(share) else f"{100 * share:+.1f}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:.0f}" if value == round(value) else f"{value:.3g}"
    return str(value)
