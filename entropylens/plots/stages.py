"""Figure 1c: the stages of the FFN, from data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from entropylens.plots.style import STAGE_COLORS, figure_rows, layer_axis

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["stages"]


def stages(analyses: Sequence[Analysis]) -> Figure:
    """Delta H of every FFN as a bar in its stage's colour, with 95 % (Fig. 1c, Eq. 14).

    Args:
        analyses: the models, side by side.
    """
    with figure_rows(analyses, 1, height=2.2) as (figure, columns):
        for analysis, (axes,) in zip(analyses, columns, strict=True):
            prefix = "" if "raw" in analysis.readings else "normed_"
            frame = analysis.layers.set_index("layer")
            name = f"{prefix}delta_ffn"
            for stage, color in STAGE_COLORS.items():
                span = getattr(analysis.stages, stage)
                if span is None:
                    continue
                those = frame.loc[span[0] : span[1]]
                axes.bar(
                    those.index, those[name], color=color, width=0.85, label=stage,
                    yerr=(those[name] - those[f"{name}_low"], those[f"{name}_high"] - those[name]),
                    error_kw={"elinewidth": 0.8, "ecolor": "0.25"},
                )  # fmt: skip
            axes.axhline(0, color="black", lw=0.7)
            layer_axis(axes, analysis.num_layers)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best", fontsize="small")
            else:
                axes.plot(frame.index, frame[name], "o", color="0.4", ms=3)
                axes.annotate("no stages", (0.98, 0.95), xycoords="axes fraction", ha="right")
        columns[0][0].set_ylabel(r"$\Delta H_{\mathrm{FFN}}$ (nats)")
    return figure
