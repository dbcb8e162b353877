"""Figure 3: entropy change of attention (above) and FFN (below), with the same-norm control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from entropylens.plots.layout import footnote, layer_axis, legend_above, mark_size, model_panels
from entropylens.plots.marks import band, gaps, mark_mixers, stage_bands
from entropylens.plots.style import ATTN, CONTROL, FFN

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["change"]

_LABELS = (r"$\Delta H_{\mathrm{ATTN}}$ (nats)", r"$\Delta H_{\mathrm{FFN}}$ (nats)")


def change(analyses: Sequence[Analysis], *, width: float | None = None) -> Figure:
    """Delta H of each module with 95 % bands; grey is what vector norms alone give (Fig. 3).

    Args:
        analyses: the models, side by side.
        width: of the figure in inches; by default as wide as the models need.
    """
    with model_panels(analyses, _LABELS, height=2.1, width=width) as (figure, columns):
        lines = []
        for analysis, panels in zip(analyses, columns, strict=True):
            prefix = "" if "raw" in analysis.readings else "normed_"
            size = mark_size(panels[0], 3, analysis.num_layers)
            for axes, module, color in zip(panels, ("attn", "ffn"), (ATTN, FFN), strict=True):
                layer_axis(axes, analysis.num_layers)
                name = f"{prefix}delta_{module}"
                if module == "ffn":
                    stage_bands(axes, analysis)
                axes.axhline(0, color="black", lw=0.7)
                # Lines go on over layers that have no such module.
                frame = analysis.layers.dropna(subset=name)
                if f"control_{name}" in frame:
                    axes.plot(
                        frame["layer"], frame[f"control_{name}"], "--", color=CONTROL, lw=1.4,
                        label="same norms, random directions",
                    )  # fmt: skip
                band(axes, frame["layer"], frame[f"{name}_low"], frame[f"{name}_high"], color)
                axes.plot(frame["layer"], frame[name], "o-", color=color, ms=size, lw=1.2)
                if module == "attn":
                    whole = analysis.layers
                    depth = whole["layer"].to_numpy(float)
                    mark_mixers(axes, analysis, depth, whole[name].to_numpy())
            layer = analysis.recommendation.layer
            if layer is not None:
                left = layer > analysis.num_layers / 2
                panels[1].axvline(layer, color="black", lw=1, ls=":")
                panels[1].annotate(
                    f"layer {layer} first", (layer, 0.03), xycoords=("data", "axes fraction"),
                    xytext=(-3 if left else 3, 0), textcoords="offset points", fontsize="small",
                    ha="right" if left else "left",
                )  # fmt: skip
            lines += gaps(analysis, f"{prefix}delta_attn", f"{prefix}delta_ffn")
        legend_above(figure)
        footnote(figure, lines)
    return figure
