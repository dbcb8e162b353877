"""The files of a run: figures and report first, analysis.json last, as the sign of completion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from entropylens.files import write_text
from entropylens.plots import FIGURES
from entropylens.plots.style import save
from entropylens.report import report_page

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["write_outputs"]


def write_outputs(analysis: Analysis, directory: Path) -> None:
    """Write everything the contract names into a run's directory.

    Raises:
        OutputDirectoryError: it cannot be written.
    """
    for name, draw in FIGURES.items():
        save(draw([analysis]), directory / "figures" / name)
    write_text(directory / "report.html", report_page(analysis))
    analysis.save(directory)
