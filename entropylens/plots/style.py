"""The look shared by all figures, applied to a figure alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from entropylens.files import make_directory, write_whole

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = [
    "ATTN",
    "CONTROL",
    "FFN",
    "STREAM",
    "figure_rows",
    "layer_axis",
    "mark_mixers",
    "save",
    "stage_bands",
]

_COLORS = sns.color_palette("colorblind").as_hex()
STREAM, ATTN, FFN = _COLORS[7], _COLORS[0], _COLORS[3]
CONTROL = "0.6"
_STAGE_SHADES = {"exploration": "#fdf0d9", "integration": "#f1f1f1", "convergence": "#dfeaf4"}

_SETTINGS: Any = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper"),
    "pdf.fonttype": 42,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 150,
}


@contextmanager
def figure_rows(
    analyses: Sequence[Analysis], rows: int, *, width: float = 5.5, height: float = 2.4
) -> Iterator[tuple[Figure, list[list[Axes]]]]:
    """A figure with one column of `rows` panels an analysis, its name above, in the house style.

    Args:
        analyses: the models, left to right.
        rows: panels a model.
        width, height: of one panel, in inches.
    """
    with mpl.rc_context(_SETTINGS):
        columns = len(analyses)
        figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row")
        for column, analysis in enumerate(analyses):
            grid[0][column].set_title(Path(analysis.model).name, loc="left", fontweight="bold")
        yield figure, [[grid[row][column] for row in range(rows)] for column in range(columns)]


def layer_axis(axes: Axes, num_layers: int, label: bool = True) -> None:
    """Whole layers from 1 to L below the panel."""
    axes.set_xlim(0.4, num_layers + 0.9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    if label:
        axes.set_xlabel("layer")


def stage_bands(axes: Axes, analysis: Analysis, names: bool) -> None:
    """Shade exploration, integration and convergence behind a panel, named above it."""
    for name, shade in _STAGE_SHADES.items():
        span = getattr(analysis.stages, name)
        if span is None:
            continue
        axes.axvspan(span[0] - 0.5, span[1] + 0.5, color=shade, lw=0, zorder=0)
        if names:
            axes.annotate(
                name if span[1] - span[0] >= analysis.num_layers / 6 else name[:3],
                (float(np.mean(span)), 1.0),
                xycoords=("data", "axes fraction"),
                va="bottom",
                ha="center",
                fontsize="small",
                color="0.35",
            )


#: What a layer mixes tokens with where it is no attention, and its mark.
_MIXERS = {"linear_attention": ("D", "linear attention"), "ssm": ("v", "state space mixer")}


def mark_mixers(
    axes: Axes, analysis: Analysis, depth: NDArray[Any], values: NDArray[Any], size: float = 5
) -> None:
    """Draw hollow marks over the points of layers whose mixer is no attention.

    Args:
        axes: the panel.
        analysis: the model.
        depth, values: [L] where the points of attention are.
        size: of the marks, in points.
    """
    mixers = np.array(analysis.mixers)
    for kind, (marker, label) in _MIXERS.items():
        those = mixers == kind
        if those.any():
            axes.plot(
                depth[those], values[those], marker, mfc="white", mec=ATTN, ms=size, label=label
            )


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.pdf, whole, and return their paths."""
    make_directory(stem.parent)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    with mpl.rc_context(_SETTINGS):
        for path in paths:
            write_whole(path, lambda aside: figure.savefig(aside, dpi=200))
    return paths
