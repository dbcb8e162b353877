"""What several figures of layers draw: bands, stages, mixers that are no attention, and gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from entropylens.plots.layout import mark_size, panel_inches
from entropylens.plots.style import ATTN, STAGE_SHADES, display_name
from entropylens.resampling import LEAST_PROMPTS

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["MIXERS", "band", "gaps", "mark_mixers", "stage_bands"]

Numbers = pd.Series | NDArray[Any]


def band(axes: Axes, place: Numbers, low: Numbers, high: Numbers, color: str) -> None:
    """Shade an interval along a line; a single point's is a stroke."""
    axes.fill_between(place, low, high, color=color, alpha=0.2, lw=0)
    if len(place) == 1:
        axes.vlines(place, low, high, color=color, lw=0.8)


def stage_bands(axes: Axes, analysis: Analysis) -> None:
    """Shade exploration, integration and convergence behind a panel, named above it."""
    layer = panel_inches(axes) / analysis.num_layers
    for name, shade in STAGE_SHADES.items():
        span = getattr(analysis.stages, name)
        if span is None:
            continue
        first, last = span[0] - 0.5, span[1] + 0.5
        axes.axvspan(first, last, color=shade, lw=0, zorder=0)
        room = (last - first) * layer
        # A short name at the edge may reach over its neighbour; in the middle it must fit.
        short = {"exploration": ("expl.", first, "left"), "convergence": ("conv.", last, "right")}
        text, place, align = name, (first + last) / 2, "center"
        if room < 0.065 * len(name):
            text, place, align = short.get(name, ("int." if room > 0.3 else "", place, align))
        axes.annotate(
            text, (place, 1.0), xycoords=("data", "axes fraction"), va="bottom", ha=align,
            fontsize="small", color="0.35",
        )  # fmt: skip


#: Mixers that are no attention: a mark that covers attention's, its size in points, a name.
MIXERS = {"linear_attention": ("D", 5, "linear attention"), "ssm": ("o", 6, "state space mixer")}


def mark_mixers(axes: Axes, analysis: Analysis, depth: NDArray[Any], values: NDArray[Any]) -> None:
    """Draw hollow marks over the points of layers whose mixer is no attention.

    Args:
        axes: the panel.
        analysis: the model.
        depth, values: [L] where the points of attention are.
    """
    mixers = np.array(analysis.mixers)
    for kind, (marker, points, label) in MIXERS.items():
        those = mixers == kind
        if those.any():
            axes.plot(
                depth[those], values[those], marker, mfc="white", mec=ATTN, label=label,
                ms=mark_size(axes, points, analysis.num_layers),
            )  # fmt: skip


def gaps(analysis: Analysis, *columns: str) -> list[str]:
    """What these columns of `layers` lack, for a footnote: one line, or none."""
    found = []
    for column in columns:
        count = int(analysis.layers[column].isna().sum())
        if count:
            module = "mixer" if "attn" in column else "FFN"
            found.append(f"no {module} in {count} of {analysis.num_layers} layers")
    if analysis.num_prompts < LEAST_PROMPTS and f"{columns[0]}_low" in analysis.layers:
        found.append(f"no intervals under {LEAST_PROMPTS} prompts")
    return [f"{display_name(analysis.model)}: {', '.join(found)}."] if found else []
