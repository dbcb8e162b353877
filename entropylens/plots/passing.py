"""Figures 6 and 11: Pass@K with intervals."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropylens.benchmarks import column_title
from entropylens.errors import SettingError
from entropylens.plots.style import model_colors, panels
from entropylens.scores import AVERAGE, Evaluation

__all__ = ["passing", "passing_each"]


def passing(evaluations: Mapping[str, Evaluation]) -> Figure:
    """Pass@K, averaged over the benchmarks, with 95 % over problems (Fig. 6).

    Args:
        evaluations: by name, in the order of the legend.

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
    return _figure(evaluations, [name])


def passing_each(evaluations: Mapping[str, Evaluation]) -> Figure:
    """Pass@K, a panel each benchmark, with 95 % over problems (Fig. 11).

    Args:
        evaluations: by name, in the order of the legend.
    """
    names = list(dict.fromkeys(one.name for it in evaluations.values() for one in it.benchmarks))
    return _figure(evaluations, sorted(names, key=column_title))


def _figure(evaluations: Mapping[str, Evaluation], benchmarks: list[str]) -> Figure:
    columns = min(4, len(benchmarks))
    rows = -(-len(benchmarks) // columns)
    width = 3.0 if columns > 1 else 3.6
    with panels(columns, rows=rows, width=width, height=2.6) as (figure, axes):
        colors = model_colors(list(evaluations))
        for axis, benchmark in zip(axes, benchmarks, strict=False):
            for place, (name, evaluation) in enumerate(evaluations.items()):
                scores = evaluation.scores
                of_it = scores[(scores["benchmark"] == benchmark) & (scores["metric"] == "pass@k")]
                if len(of_it):
                    _curve(axis, of_it, name, colors[place], "os^DvP"[place % 6])
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.set_xlabel("$K$")
            axis.set_title(
                "average" if benchmark == AVERAGE else column_title(benchmark)[1],
                loc="left", fontweight="bold",
            )  # fmt: skip
        for axis in axes[len(benchmarks) :]:
            axis.set_axis_off()
        axes[0].set_ylabel("Pass@$K$ (%)")
        axes[0].legend(loc="best", fontsize="small")
    return figure


def _curve(axes: Axes, scores: pd.DataFrame, name: str, color: str, marker: str) -> None:
    k = scores["k"].to_numpy(float)
    value, low, high = (100 * scores[it].to_numpy(float) for it in ("value", "low", "high"))
    axes.fill_between(k, low, high, color=color, alpha=0.15, lw=0)
    axes.plot(k, value, marker=marker, color=color, ms=3.5, lw=1.2, label=name)
