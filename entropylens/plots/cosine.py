"""Figure 8: residual cosine similarity, what each module writes against the stream (B.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from entropylens.plots.layout import footnote, layer_axis, legend_above, mark_size, model_panels
from entropylens.plots.marks import gaps, mark_mixers
from entropylens.plots.style import ATTN, FFN

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["cosine"]


def cosine(analyses: Sequence[Analysis], *, width: float | None = None) -> Figure:
    """cos(A^l, H^{l-1}) and cos(F^l, H^{l-1} + A^l); below zero a module suppresses (Fig. 8).

    Args:
        analyses: the models, side by side.
        width: of the figure in inches; by default as wide as the models need.
    """
    lines = (
        ("cos_attn", "^-", ATTN, r"$\cos(A^l, H^{l-1})$"),
        ("cos_ffn", "s-", FFN, r"$\cos(F^l, H^{l-1} + A^l)$"),
    )
    with model_panels(analyses, ["cosine similarity"], height=2.6, width=width) as made:
        figure, columns = made
        missing = []
        for analysis, (axes,) in zip(analyses, columns, strict=True):
            axes.axhline(0, color="black", lw=0.7)
            for name, mark, color, label in lines:
                # Lines go on over layers that have no such module.
                frame = analysis.layers.dropna(subset=name)
                axes.plot(
                    frame["layer"], frame[name], mark, color=color, lw=1.2, label=label,
                    ms=mark_size(axes, 4, analysis.num_layers),
                )  # fmt: skip
            whole = analysis.layers
            mark_mixers(
                axes, analysis, whole["layer"].to_numpy(float), whole["cos_attn"].to_numpy()
            )
            missing += gaps(analysis, "cos_attn", "cos_ffn")
            layer_axis(axes, analysis.num_layers)
        legend_above(figure)
        footnote(figure, missing)
    return figure
