"""The laboratory's own figures: a dot is a run, a bar a mean. Others are drawn as any run's are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bupo.lab.results import AVERAGE
from bupo.lab.run import HELD_OUT
from bupo.layer_probe import LayerProbe
from entropylens.plots.dynamics import CURVES
from entropylens.plots.layout import layer_axis, legend_above, panels, step_axis
from entropylens.plots.style import model_colors

__all__ = ["by_arm", "by_k", "by_layer", "collapse", "dynamics", "reward_curves"]

#: Starts are told apart by their marks.
_MARKS = "osD^v"
#: Steps of a running mean.
_WINDOW = 5


def by_arm(outcomes: pd.DataFrame, *, width: float | None = None) -> Figure:
    """Avg@K of every run, an arm a row, in the order in which they come.

    Args:
        outcomes: see `results.outcomes`.
        width: of the figure in inches.
    """
    names = list(dict.fromkeys(outcomes["arm"]))
    with panels(1, per_row=1, size=(5.6, 0.6 + 0.24 * len(names)), width=width) as (figure, axes):
        panel = axes[0]
        colors = model_colors(sorted(outcomes["start"].unique()))
        for row, name in enumerate(names):
            runs = outcomes[outcomes["arm"] == name]
            panel.plot([100 * runs[AVERAGE].mean()] * 2, [row - 0.32, row + 0.32], color="0.2")
        for mark, (start, runs) in zip(_MARKS, outcomes.groupby("start"), strict=False):
            rows = [names.index(it) for it in runs["arm"]]
            panel.plot(
                100 * runs[AVERAGE], rows, mark, color=colors[str(start)], ms=4, alpha=0.7,
                mew=0, label=str(start),
            )  # fmt: skip
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.set_xlabel("Avg@$K$ on the test split (%)")
        panel.grid(axis="y", lw=0.4, color="0.9")
        legend_above(figure)
    return figure


def by_k(outcomes: pd.DataFrame, names: Sequence[str], *, width: float | None = None) -> Figure:
    """Pass@K of some arms: means as lines, runs as dots (Fig. 6).

    Args:
        outcomes: see `results.outcomes`.
        names: of the arms.
        width: of the figure in inches.
    """
    columns = [str(it) for it in outcomes if str(it).startswith("pass@")]
    ks = sorted(int(it.removeprefix("pass@")) for it in columns)
    colors = model_colors(names)
    with panels(1, per_row=1, size=(4.6, 3.0), width=width) as (figure, axes):
        panel = axes[0]
        for place, name in enumerate(names):
            runs = outcomes[outcomes["arm"] == name]
            shift = 2 ** (0.09 * (place - (len(names) - 1) / 2))
            means = [100 * runs[f"pass@{k}"].mean() for k in ks]
            panel.plot(ks, means, color=colors[name], lw=1.2, label=name)
            for k in ks:
                values = 100 * runs[f"pass@{k}"]
                panel.plot(
                    [k * shift] * len(values), values, ".", color=colors[name], ms=4, alpha=0.6
                )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set_xlabel("$K$")
        panel.set_ylabel("Pass@$K$ (%)")
        legend_above(figure)
    return figure


def dynamics(
    curves: pd.DataFrame, names: Sequence[str], internal_steps: int, *, width: float | None = None
) -> Figure:
    """Reward, entropy and length over steps: a thin line a run, running means of all (Fig. 4, 7).

    Args:
        curves: see `results.curves`.
        names: of the arms.
        internal_steps: where a dotted line marks the end of the internal phase; 0 for none.
        width: of the figure in inches.
    """
    colors = model_colors(names)
    with panels(len(CURVES), per_row=3, size=(2.9, 2.6), width=width) as (figure, axes):
        for panel, ((metric, *_), label) in zip(axes, CURVES, strict=True):
            for line, name in zip(("-", "--", "-.", ":"), names, strict=False):
                of_arm = curves[curves["arm"] == name].pivot_table(
                    index="step", columns=["start", "seed"], values=metric
                )
                smooth = of_arm.rolling(_WINDOW, center=True, min_periods=1).mean()
                panel.plot(smooth.index, smooth, color=colors[name], lw=0.4, alpha=0.4)
                _line(panel, smooth.mean(axis=1), name, colors[name], line)
            if internal_steps:
                panel.axvline(internal_steps + 0.5, color="0.4", lw=1, ls=":")
            panel.set_ylabel(label)
            step_axis(panel)
        legend_above(figure)
    return figure


def by_layer(
    outcomes: pd.DataFrame,
    of_layers: Mapping[int, str],
    probes: Mapping[str, LayerProbe],
    chosen: int,
    *,
    intervals: bool,
    width: float | None = None,
) -> Figure:
    """BuPO at each inner layer, beside the cosine of its gradient with GRPO's before training.

    Args:
        outcomes: see `results.outcomes`.
        of_layers: the arm of each layer.
        probes: by start.
        chosen: the recommended layer.
        intervals: show those of the cosines (over prompts, 95 %).
        width: of the figure in inches.
    """
    colors = model_colors(sorted(probes))
    with panels(2, per_row=2, size=(3.1, 2.6), width=width) as (figure, axes):
        for mark, (start, probe) in zip(_MARKS, probes.items(), strict=False):
            look: Any = {"color": colors[start], "ms": 4, "mew": 0}
            of_start = outcomes[outcomes["start"] == start]
            for layer, name in of_layers.items():
                values = 100 * of_start[of_start["arm"] == name][AVERAGE]
                axes[0].plot([layer] * len(values), values, mark, alpha=0.7, label=start, **look)
            rows = probe.layers
            axes[1].plot(rows["layer"], rows["cosine"], f"{mark}-", lw=1.2, label=start, **look)
            if intervals:
                low, high = rows["cosine_low"], rows["cosine_high"]
                axes[1].vlines(rows["layer"], low, high, color=colors[start], lw=0.8)
        axes[0].set_ylabel("Avg@$K$ of BuPO (%)")
        axes[1].set_ylabel("gradients' cosine")
        for panel in axes:
            layer_axis(panel, max(of_layers))
            panel.set_xlabel("layer $l$")
            panel.axvspan(chosen - 0.3, chosen + 0.3, color="0.93", zorder=0)
        legend_above(figure)
    return figure


def collapse(curves: pd.DataFrame, kl_bound: float, *, width: float | None = None) -> Figure:
    """InterGRPO throughout: held-out Avg@1 over steps, and over how far pi_theta has moved.

    Args:
        curves: see `results.curves`; of that arm alone.
        kl_bound: of `internal_steps=auto`, nats a token.
        width: of the figure in inches.
    """
    looks = curves.dropna(subset=[HELD_OUT])
    colors = model_colors(sorted(looks["start"].unique()))
    with panels(2, per_row=2, size=(3.1, 2.6), width=width) as (figure, axes):
        for (start, _), run in looks.groupby(["start", "seed"]):
            for panel, column in zip(axes, ("step", "fixed_set/kl"), strict=True):
                panel.plot(
                    run[column], 100 * run[HELD_OUT], ".-", color=colors[str(start)], lw=0.8,
                    ms=3, label=str(start),
                )  # fmt: skip
        axes[0].set_ylabel("held-out Avg@1 (%)")
        step_axis(axes[0])
        axes[1].axvline(kl_bound, color="0.4", lw=1, ls=":", label="kl_bound")
        axes[1].set_xlabel(r"KL to step 0 (nats a token)")
        legend_above(figure)
    return figure


def reward_curves(curves: Mapping[str, pd.Series], *, width: float | None = None) -> Figure:
    """Rewards of some runs by step.

    Args:
        curves: by name.
        width: of the figure in inches.
    """
    with panels(1, per_row=1, size=(4.6, 2.8), width=width) as (figure, axes):
        colors = model_colors([*curves])
        for line, (name, values) in zip(("-", "--", ":"), curves.items(), strict=False):
            _line(axes[0], values, name, colors[name], line)
        axes[0].set_ylabel("reward")
        step_axis(axes[0])
        legend_above(figure)
    return figure


def _line(axes: Axes, values: pd.Series, name: str, color: str, line: str) -> None:
    axes.plot(values.index, values, ls=line, color=color, lw=1.2, label=name)
