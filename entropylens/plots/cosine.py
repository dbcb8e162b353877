"""Figure 8: residual cosine similarity, what each module writes against the stream (B.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from entropylens.plots.style import ATTN, FFN, figure_rows, layer_axis, mark_mixers

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["cosine"]


def cosine(analyses: Sequence[Analysis]) -> Figure:
    """cos(A^l, H^{l-1}) and cos(F^l, H^{l-1} + A^l); below zero a module suppresses (Fig. 8).

    Args:
        analyses: the models, side by side.
    """
    with figure_rows(analyses, 1, height=2.6) as (figure, columns):
        for analysis, (axes,) in zip(analyses, columns, strict=True):
            frame = analysis.layers
            axes.axhline(0, color="black", lw=0.7)
            axes.plot(
                frame["layer"], frame["cos_attn"], "^-", color=ATTN, ms=4, lw=1.2,
                label=r"$\cos(A^l, H^{l-1})$",
            )  # fmt: skip
            axes.plot(
                frame["layer"], frame["cos_ffn"], "s-", color=FFN, ms=3.5, lw=1.2,
                label=r"$\cos(F^l, H^{l-1} + A^l)$",
            )  # fmt: skip
            depth = frame["layer"].to_numpy(float)
            mark_mixers(axes, analysis, depth, frame["cos_attn"].to_numpy())
            layer_axis(axes, analysis.num_layers)
        columns[0][0].set_ylabel("cosine similarity")
        columns[-1][0].legend(loc="best", fontsize="small")
    return figure
