"""How panels are arranged in a figure: in rows, on a page, with axes, legend and footnote."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entropylens.plots.style import display_name, settings

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = [
    "footnote",
    "layer_axis",
    "legend_above",
    "mark_size",
    "model_panels",
    "note",
    "page_width",
    "panel_inches",
    "panels",
    "step_axis",
]

#: A page of one and of two columns, in inches.
_PAGE_INCHES = {1: 3.35, 2: 6.9}
#: Widths of panels, in inches: of a model by itself; and the least that a page leaves to a model
#: and to another panel.
_MODEL_INCHES, _LEAST_MODEL, _LEAST_PANEL = 5.5, 2.2, 1.6
#: Models beside each other where no page says how many.
_MODELS_A_ROW = 3
#: Panels of a page may be lower than by themselves, but no lower than this share; and of those
#: below each other that stand beside each other elsewhere.
_LOWEST, _STACKED = 0.65, 0.75
#: Layers that stand this many points apart leave a mark its size.
_FREE_POINTS = 8.5
#: Space of a row of models for the titles.
_TITLE_INCHES = 0.5


def page_width(columns: int | None) -> float | None:
    """Inches of a figure over 1 or 2 columns of a paper's page; None for as wide as it likes."""
    return None if columns is None else _PAGE_INCHES[columns]


class _Shown(Figure):
    """A figure that shows itself in a notebook, with or without `%matplotlib inline`."""

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, "Figure", 1)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


@contextmanager
def panels(
    count: int, *, per_row: int, size: tuple[float, float], width: float | None = None
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of panels in rows, in the house style.

    Args:
        count: panels.
        per_row: how many beside each other; on a narrow page a part of it.
        size: of one panel, in inches.
        width: of the whole figure, in inches; by default as many as the panels take.
    """
    with mpl.rc_context(settings(width)):
        if width is not None:
            fit = max(1, int(width / _LEAST_PANEL))
            per_row = max(it for it in range(1, per_row + 1) if per_row % it == 0 and it <= fit)
        each = size[0] if width is None else width / per_row
        rows = -(-count // per_row)
        most = _STACKED if per_row == 1 < rows else 1.0
        height = size[1] * min(most, max(_LOWEST, each / size[0]))
        figure = _Shown(figsize=(each * per_row, height * rows), layout="constrained")
        yield figure, [figure.add_subplot(rows, per_row, place + 1) for place in range(count)]


@contextmanager
def model_panels(
    analyses: Sequence[Analysis], labels: Sequence[str], *, height: float, width: float | None
) -> Iterator[tuple[Figure, list[list[Axes]]]]:
    """A figure with a column of panels for each analysis, its name above, in the house style.

    Panels of a kind have one scale in all models. Many models stand in several rows.

    Args:
        analyses: the models, left to right.
        labels: of the y axes, one a panel from top to bottom.
        height: of one panel, in inches.
        width: of the whole figure, in inches; by default as many as the panels take.
    """
    with mpl.rc_context(settings(width)):
        count, rows = len(analyses), len(labels)
        fit = _MODELS_A_ROW if width is None else max(1, int(width / _LEAST_MODEL))
        blocks = -(-count // fit)
        per_row = -(-count // blocks)
        each = _MODEL_INCHES if width is None else width / per_row
        height *= min(1.0, max(_LOWEST, each / _MODEL_INCHES))
        figure = _Shown(
            figsize=(each * per_row, (height * rows + _TITLE_INCHES) * blocks),
            layout="constrained",
        )
        grid = figure.add_gridspec(blocks * rows, per_row)
        found: list[list[Axes]] = []
        for place, analysis in enumerate(analyses):
            block, column = divmod(place, per_row)
            own: list[Axes] = []
            for row, label in enumerate(labels):
                axes = figure.add_subplot(
                    grid[block * rows + row, column],
                    sharex=own[0] if own else None,
                    sharey=found[0][row] if found else None,
                )
                axes.tick_params(labelleft=column == 0, labelbottom=row == rows - 1)
                if column == 0:
                    axes.set_ylabel(label)
                own.append(axes)
            own[0].set_title(display_name(analysis.model), loc="left", fontweight="bold")
            own[-1].set_xlabel("layer")
            found.append(own)
        yield figure, found


def legend_above(figure: Figure) -> None:
    """One legend for all panels, where it covers no data; equal labels once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    inches = [0.5 + 0.062 * len(label.replace("$", "")) for label in entries]
    width = figure.get_size_inches()[0]
    columns = len(entries)
    if sum(inches) > width:
        rows = -(-columns // max(1, int(width / max(inches))))
        columns = -(-columns // rows)
    figure.legend(
        [*entries.values()], [*entries], loc="outside upper center", fontsize="small",
        ncols=columns,
    )  # fmt: skip


def footnote(figure: Figure, lines: Sequence[str]) -> None:
    """Say below all panels what they do not show."""
    if lines:
        fit = int(figure.get_size_inches()[0] / 0.06)
        text = "\n".join(textwrap.fill(line, fit) for line in lines)
        figure.supxlabel(text, x=0.01, ha="left", fontsize="x-small", color="0.35")


def note(axes: Axes, text: str) -> None:
    """Say in an empty panel why it is."""
    axes.annotate(
        text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", fontsize="small",
        color="0.35",
    )  # fmt: skip


def panel_inches(axes: Axes) -> float:
    """Width of a panel, about: the layout that settles it comes last."""
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None
    assert place is not None
    return float(figure.get_size_inches()[0] / place.get_gridspec().ncols - 0.6)


def layer_axis(axes: Axes, num_layers: int, first: float = 0.4) -> None:
    """Whole layers up to L below the panel.

    Args:
        first: where the axis begins.
    """
    axes.set_xlim(first, num_layers + 0.6)
    bins = min(12, max(4, int(4 * panel_inches(axes))))
    axes.xaxis.set_major_locator(_whole(bins))


def _whole(bins: int) -> MaxNLocator:
    return MaxNLocator(bins, integer=True, min_n_ticks=1, steps=[1, 2, 4, 5, 10])


def mark_size(axes: Axes, points: float, num_layers: int) -> float:
    """Size of a mark, in points: smaller where layers stand close."""
    apart = 72 * panel_inches(axes) / num_layers
    return points * float(min(1.0, (apart / _FREE_POINTS) ** 0.75))


def step_axis(axes: Axes) -> None:
    """Whole steps below the panel."""
    axes.xaxis.set_major_locator(_whole(5))
    axes.set_xlabel("step")
