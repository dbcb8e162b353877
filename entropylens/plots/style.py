"""The look shared by all figures, applied to a figure alone."""

from __future__ import annotations

import zlib
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
    "STAGE_COLORS",
    "STREAM",
    "display_name",
    "figure_rows",
    "layer_axis",
    "mark_mixers",
    "model_colors",
    "panels",
    "save",
    "stage_bands",
]

_COLORS = sns.color_palette("colorblind").as_hex()
STREAM, ATTN, FFN = _COLORS[7], _COLORS[0], _COLORS[3]
CONTROL = "0.6"
#: Darker than the shades behind a panel, for bars; and apart from each other in grey.
STAGE_COLORS = {"exploration": "#e69f00", "integration": "#bbbbbb", "convergence": "#0072b2"}
_STAGE_SHADES = {"exploration": "#fdf0d9", "integration": "#f1f1f1", "convergence": "#dfeaf4"}

#: A page of one and of two columns, in inches.
COLUMN_INCHES = {1: 3.35, 2: 6.9}

_SETTINGS: Any = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper"),
    "pdf.fonttype": 42,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 150,
}


#: Models whose Hub names are not what the paper calls them.
_PAPER_NAMES = {
    "OctoThinker-3B-Long-Base": "Llama-OctoThinker-3B-Base",
    "OctoThinker-8B-Long-Base": "Llama-OctoThinker-8B-Base",
    "deepseek-math-7b-base": "DeepSeek-Math-7B-Base",
}


def display_name(model: str) -> str:
    """What the paper calls a model: its Hub name without the owner, mostly."""
    name = Path(model).name
    return _PAPER_NAMES.get(name, name)


def model_colors(names: Sequence[str]) -> list[str]:
    """A colour for each name: the same in every figure, unless two of one figure would be alike."""
    palette = [_COLORS[place] for place in (0, 1, 2, 3, 4, 5, 8, 9)]
    taken: dict[int, str] = {}
    found = []
    for name in names:
        place = zlib.crc32(name.encode()) % len(palette)
        for _ in palette:
            if taken.setdefault(place, name) == name:
                break
            place = (place + 1) % len(palette)
        found.append(palette[place])
    return found


@contextmanager
def panels(
    columns: int, *, rows: int = 1, width: float = 3.0, height: float = 2.4, sharey: bool = False
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of panels in rows, in the house style.

    Args:
        columns: panels a row.
        rows: how many rows.
        width, height: of one panel, in inches.
        sharey: one scale for all.
    """
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
        yield figure, [axes for row in grid for axes in row]


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
            grid[0][column].set_title(display_name(analysis.model), loc="left", fontweight="bold")
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


def save(figure: Figure, stem: Path, columns: int | None = None) -> list[Path]:
    """Write `stem`.png and `stem`.pdf, whole, and return their paths.

    Args:
        figure: what to write.
        stem: where, without the suffix.
        columns: fit it to this many columns of a paper's page (1 or 2), its height in proportion
            but no lower than it must be.
    """
    if columns is not None:
        width, height = figure.get_size_inches()
        wanted = COLUMN_INCHES[columns]
        figure.set_size_inches(wanted, max(height * wanted / width, min(height, 0.6 * wanted)))
    make_directory(stem.parent)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    with mpl.rc_context(_SETTINGS):
        for path in paths:
            write_whole(path, lambda aside: figure.savefig(aside, dpi=200))
    return paths
