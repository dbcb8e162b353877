"""Figures 6 and 11: Pass@K with intervals."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropylens.benchmarks import column_title
from entropylens.errors import SettingError
from entropylens.plots.layout import legend_above, panels
from entropylens.plots.marks import band
from entropylens.plots.style import model_colors
from entropylens.scores import AVERAGE, Evaluation

__all__ = ["passing", "passing_each"]


def passing(
    evaluations: Mapping[str, Evaluation],
    *,
    colors: Mapping[str, str] | None = None,
    width: float | None = None,
) -> Figure:
    """Pass@K, averaged over the benchmarks, with 95 % over problems (Fig. 6).

    Args:
        evaluations: by name, in the order of the legend.
        colors: by the same names; by default each name's own.
        width: of the figure in inches; by default as wide as the panel needs.

    Raises:
        SettingError: they do not share their benchmarks, and so have no average in common.
    """
    asked = {name: {one.name for one in it.benchmarks} for name, it in evaluations.items()}
    if len({frozenset(names) for names in asked.values()}) > 1:
        raise SettingError(
            "the evaluations are of different benchmarks, and have no average in common",
            "evaluate all on the same, or draw --figure 11",
        )
    first = next(iter(asked.values()))
    name = AVERAGE if len(first) > 1 else next(iter(first))
    return _figure(evaluations, [name], colors, width)


def passing_each(
    evaluations: Mapping[str, Evaluation],
    *,
    colors: Mapping[str, str] | None = None,
    width: float | None = None,
) -> Figure:
    """Pass@K, a panel each benchmark, with 95 % over problems (Fig. 11).

    Args:
        evaluations: by name, in the order of the legend.
        colors: by the same names; by default each name's own.
        width: of the figure in inches; by default as wide as the panels need.
    """
    names = list(dict.fromkeys(one.name for it in evaluations.values() for one in it.benchmarks))
    return _figure(evaluations, sorted(names, key=column_title), colors, width)


def _figure(
    evaluations: Mapping[str, Evaluation],
    benchmarks: list[str],
    colors: Mapping[str, str] | None,
    width: float | None,
) -> Figure:
    colors = colors or model_colors([*evaluations])
    per_row = min(4, len(benchmarks))
    size = (3.0 if per_row > 1 else 3.6, 2.6)
    with panels(len(benchmarks), per_row=per_row, size=size, width=width) as (figure, axes):
        for panel, benchmark in zip(axes, benchmarks, strict=True):
            shown = []
            for place, (name, evaluation) in enumerate(evaluations.items()):
                scores = evaluation.scores
                of_it = scores[(scores["benchmark"] == benchmark) & (scores["metric"] == "pass@k")]
                if len(of_it):
                    _curve(panel, of_it, name, colors[name], "os^DvP"[place % 6])
                    shown += of_it["k"].tolist()
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.set_xlim(0.8 * min(shown), 1.25 * max(shown))
            panel.set_xlabel("$K$")
            panel.set_title(
                "average" if benchmark == AVERAGE else column_title(benchmark)[1],
                loc="left", fontweight="bold",
            )  # fmt: skip
        axes[0].set_ylabel("Pass@$K$ (%)")
        legend_above(figure)
    return figure


def _curve(axes: Axes, scores: pd.DataFrame, name: str, color: str, marker: str) -> None:
    k = scores["k"].to_numpy(float)
    value, low, high = (100 * scores[it].to_numpy(float) for it in ("value", "low", "high"))
    band(axes, k, low, high, color)
    axes.plot(k, value, marker=marker, color=color, ms=3.5, lw=1.2, label=name)
