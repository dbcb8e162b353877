"""Figure 1c: the stages of the FFN, from data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from entropylens.plots.layout import footnote, layer_axis, legend_above, model_panels
from entropylens.plots.marks import gaps
from entropylens.plots.style import STAGE_BARS

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["stages"]


def stages(analyses: Sequence[Analysis], *, width: float | None = None) -> Figure:
    """Delta H of every FFN as a bar in its stage's colour, with 95 % (Fig. 1c, Eq. 14).

    Args:
        analyses: the models, side by side.
        width: of the figure in inches; by default as wide as the models need.
    """
    labels = [r"$\Delta H_{\mathrm{FFN}}$ (nats)"]
    with model_panels(analyses, labels, height=2.2, width=width) as (figure, columns):
        missing = []
        for analysis, (axes,) in zip(analyses, columns, strict=True):
            prefix = "" if "raw" in analysis.readings else "normed_"
            frame = analysis.layers.set_index("layer")
            name = f"{prefix}delta_ffn"
            spans = {stage: getattr(analysis.stages, stage) for stage in STAGE_BARS}
            for stage, span in spans.items():
                if span is None:
                    continue
                those = frame.loc[span[0] : span[1]]
                axes.bar(
                    those.index, those[name], width=0.8, lw=0.5, label=stage,
                    yerr=(those[name] - those[f"{name}_low"], those[f"{name}_high"] - those[name]),
                    error_kw={"elinewidth": 0.8, "ecolor": "0.25"}, **STAGE_BARS[stage],
                )  # fmt: skip
            axes.axhline(0, color="black", lw=0.7)
            layer_axis(axes, analysis.num_layers)
            if not any(spans.values()):
                axes.plot(frame.index, frame[name], "o", color="0.4", ms=3, label="no stages")
            missing += gaps(analysis, name)
        legend_above(figure)
        footnote(figure, missing)
    return figure
