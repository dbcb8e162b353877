"""Figure 5: what training does to the features of the trained layer, over a fixed set of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from entropylens.errors import TrainingFilesError
from entropylens.plots.layout import note, panels, step_axis
from entropylens.plots.style import model_colors
from entropylens.training_run import TrainingRun

__all__ = ["features"]

#: Higher layers shown by a line of their own; of more, an even choice.
_LINES = 7


def features(
    runs: Sequence[TrainingRun],
    *,
    colors: Mapping[str, str] | None = None,
    width: float | None = None,
) -> Figure:
    """cos(H^l, H^m) for higher layers, Delta H of layer l, perplexity of pi_theta (Fig. 5).

    Args:
        runs: with looks at the fixed set; the first panel of each row is its similarities.
        colors: of runs by name; by default each name's own.
        width: of the figure in inches; by default as wide as the panels need.

    Raises:
        TrainingFilesError: a run has no looks.
    """
    colors = colors or model_colors([run.name for run in runs])
    size = (2.9, 2.4)
    with panels(3 * len(runs), per_row=3, size=size, width=width) as (figure, axes):
        for place, run in enumerate(runs):
            looks = run.looks
            if looks is None:
                raise TrainingFilesError(
                    f"run {run.name!r} has no looks at a fixed set",
                    "train with bupo.analyze_every=K to have one every K steps",
                )
            similarity, delta, perplexity = own = axes[3 * place : 3 * place + 3]
            layer = int(looks["layer"].iloc[0])
            _similarities(similarity, looks)
            similarity.set_ylabel(rf"$\cos(H^{{{layer}}}, H^m)$")
            similarity.set_title(run.name, loc="left", fontweight="bold")
            line: Any = {"color": colors[run.name], "ms": 2.5, "lw": 1.2}
            delta.plot(looks["step"], looks["delta_layer"], "o-", **line)
            delta.set_ylabel(rf"$\Delta H^{{{layer}}}_{{\mathrm{{Layer}}}}$ (nats)")
            perplexity.plot(looks["step"], looks["perplexity"], "o-", **line)
            perplexity.set_ylabel(r"perplexity of $\pi_\theta$")
            for panel in own:
                step_axis(panel)
                if 0 < run.internal_steps < len(run.metrics):
                    panel.axvline(run.internal_steps + 0.5, color="0.4", lw=1, ls=":")
    return figure


def _similarities(axes: Axes, looks: pd.DataFrame) -> None:
    """A line each higher layer, with a scale of their shades."""
    higher = [
        int(name.removeprefix("cos_"))
        for name in map(str, looks)
        if name.startswith("cos_") and name != "cos_final"
    ]
    if not higher:
        note(axes, "no higher layer")
        return
    places = np.unique(np.linspace(0, len(higher) - 1, min(_LINES, len(higher))).round())
    shown = [higher[place] for place in places.astype(int)]
    # Without viridis' lightest shades, which white paper swallows.
    shades = sns.color_palette("viridis", len(shown) + 2)[: len(shown)]
    for other, shade in zip(shown, shades, strict=True):
        axes.plot(looks["step"], looks[f"cos_{other}"], "o-", ms=2.5, lw=1.2, color=shade)
    figure = axes.get_figure(root=True)
    assert figure is not None
    bounds = BoundaryNorm(np.arange(len(shown) + 1) - 0.5, len(shown))
    scale = figure.colorbar(
        ScalarMappable(bounds, ListedColormap(shades)), ax=axes, ticks=range(len(shown)), aspect=15
    )
    scale.set_ticklabels([str(other) for other in shown], fontsize="x-small")
    scale.ax.set_title("$m$", fontsize="small")
    scale.ax.tick_params(length=0, which="both")
    scale.outline.set_visible(False)
