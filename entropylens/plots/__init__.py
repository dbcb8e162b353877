"""One pure function a figure: analyses in, matplotlib Figure out; no global state is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from entropylens.plots.change import change
from entropylens.plots.cosine import cosine
from entropylens.plots.flow import flow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from entropylens.results import Analysis

__all__ = ["FIGURES", "Plots", "change", "cosine", "flow"]

#: File name of each figure -> its function.
FIGURES = {"figure2_flow": flow, "figure3_change": change, "figure8_cosine": cosine}


@dataclass(frozen=True)
class Plots:
    """The figures of one analysis, for `analysis.plot.<TAB>`."""

    analysis: Analysis

    def flow(self) -> Figure:
        """Figure 2: entropy along the stream."""
        return flow([self.analysis])

    def change(self) -> Figure:
        """Figure 3: entropy change of attention and FFN."""
        return change([self.analysis])

    def cosine(self) -> Figure:
        """Figure 8: residual cosine similarity."""
        return cosine([self.analysis])
