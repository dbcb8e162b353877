"""Figures 4 and 7: reward, entropy and response length over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropylens.plots.layout import footnote, legend_above, panels, step_axis
from entropylens.plots.style import model_colors
from entropylens.training_run import TrainingRun

__all__ = ["CURVES", "dynamics"]

#: What is shown: the metrics that may hold it, and its label.
CURVES = (
    (("bupo/reward", "critic/rewards/mean"), "reward"),
    (("bupo/entropy_policy", "actor/entropy"), r"entropy of $\pi_\theta$ (nats)"),
    (("response_length/mean",), "tokens a response"),
)
#: Runs are told apart in grey, too.
_LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
#: Runs longer than this are shown as a running mean over this share of their steps.
_LONG, _SHARE = 40, 1 / 20


def dynamics(
    runs: Sequence[TrainingRun],
    *,
    colors: Mapping[str, str] | None = None,
    width: float | None = None,
) -> Figure:
    """Reward, entropy of the model's own policy, and response length (Fig. 4 and 7).

    A dotted line marks the end of a run's internal phase; long runs are running means over their
    pale single steps.

    Args:
        runs: in the order of the legend.
        colors: of runs by name; by default each name's own.
        width: of the figure in inches; by default as wide as the panels need.

    Raises:
        TrainingFilesError: a run has not logged one of these.
    """
    colors = colors or model_colors([run.name for run in runs])
    with panels(len(CURVES), per_row=3, size=(2.9, 2.6), width=width) as (figure, axes):
        missing = []
        for panel, (names, label) in zip(axes, CURVES, strict=True):
            for place, run in enumerate(runs):
                line, color = _LINES[place % len(_LINES)], colors[run.name]
                values = run.curve(*names)
                _curve(panel, values, color, line, run.name)
                if values.empty:
                    missing.append(f"{run.name}: {label} was never finite.")
                if 0 < run.internal_steps < len(run.metrics):
                    panel.axvline(run.internal_steps + 0.5, color=color, lw=1, ls=":")
            step_axis(panel)
            panel.set_ylabel(label)
        if any(0 < run.internal_steps < len(run.metrics) for run in runs):
            axes[0].plot([], [], color="0.3", lw=1, ls=":", label="internal phase ends")
        legend_above(figure)
        footnote(figure, missing)
    return figure


def _curve(axes: Axes, values: pd.Series, color: str, line: Any, name: str) -> None:
    if len(values) <= _LONG:
        axes.plot(
            values.index, values, marker="o", ls=line, color=color, ms=2.5, lw=1.2, label=name
        )
        return
    axes.plot(values.index, values, color=color, lw=0.6, alpha=0.3)
    window = max(3, round(len(values) * _SHARE))
    smooth = values.rolling(window, center=True, min_periods=1).mean()
    axes.plot(smooth.index, smooth, color=color, ls=line, lw=1.5, label=name)
