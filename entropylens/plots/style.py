"""The look shared by all figures, applied to a figure alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure

from entropylens.files import make_directory, write_whole

__all__ = [
    "ATTN",
    "CONTROL",
    "FFN",
    "STAGE_BARS",
    "STAGE_SHADES",
    "STREAM",
    "display_name",
    "model_colors",
    "save",
    "settings",
]

_COLORS = sns.color_palette("colorblind").as_hex()
STREAM, ATTN, FFN = _COLORS[7], _COLORS[0], _COLORS[3]
CONTROL = "0.6"
#: Of bars: darker than the shades behind a panel, and told apart in grey by hatch and lightness.
STAGE_BARS: Mapping[str, Mapping[str, Any]] = {
    "exploration": {"facecolor": "#e69f00", "edgecolor": "#e69f00"},
    "integration": {"facecolor": "white", "edgecolor": "0.45", "hatch": "//////"},
    "convergence": {"facecolor": "#00588a", "edgecolor": "#00588a"},
}
STAGE_SHADES = {"exploration": "#fbe6c5", "integration": "#f7f7f7", "convergence": "#c9dcec"}

#: Comes with matplotlib: a figure looks the same on every machine.
_FONTS = ["DejaVu Sans"]


def settings(width: float | None) -> Any:
    """Matplotlib's settings for a figure; on a page (of this width in inches) fonts are smaller."""
    return {
        **sns.axes_style("ticks"),
        **sns.plotting_context("paper", font_scale=1.0 if width is None else 0.85),
        "font.sans-serif": _FONTS,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
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


def model_colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name: the same in every figure, unless two of one figure would be alike."""
    palette = [_COLORS[place] for place in (0, 1, 2, 3, 4, 5, 9)]  # no yellow, no grey
    taken: dict[int, str] = {}
    found = {}
    for name in names:
        place = zlib.crc32(name.encode()) % len(palette)
        for _ in palette:
            if taken.setdefault(place, name) == name:
                break
            place = (place + 1) % len(palette)
        found[name] = palette[place]
    return found


def saved_as(stem: Path) -> list[Path]:
    """The files that `save` writes."""
    return [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.pdf, whole, and return their paths.

    Args:
        figure: what to write.
        stem: where, without the suffix.
    """
    make_directory(stem.parent)
    paths = saved_as(stem)
    # Fonts are embedded as TrueType, which journals take and editors can edit.
    with mpl.rc_context({"pdf.fonttype": 42, "font.sans-serif": _FONTS}):
        for path in paths:
            write_whole(path, lambda aside: figure.savefig(aside, dpi=200))
    return paths
