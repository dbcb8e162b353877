"""Figure 3: entropy change of attention (above) and FFN (below), with the same-norm control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from entropylens.plots.style import (
    ATTN,
    CONTROL,
    FFN,
    figure_rows,
    layer_axis,
    mark_mixers,
    stage_bands,
)

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["change"]


def change(analyses: Sequence[Analysis]) -> Figure:
    """Delta H of each module with 95 % bands; grey is what vector norms alone give (Fig. 3).

    Args:
        analyses: the models, side by side.
    """
    with figure_rows(analyses, 2, height=2.1) as (figure, columns):
        for analysis, panels in zip(analyses, columns, strict=True):
            prefix = "" if "raw" in analysis.readings else "normed_"
            frame = analysis.layers
            for axes, module, color in zip(panels, ("attn", "ffn"), (ATTN, FFN), strict=True):
                name = f"{prefix}delta_{module}"
                if module == "ffn":
                    stage_bands(axes, analysis, names=True)
                axes.axhline(0, color="black", lw=0.7)
                if f"control_{name}" in frame:
                    axes.plot(
                        frame["layer"], frame[f"control_{name}"], "--", color=CONTROL, lw=1.4,
                        label="same norms, random directions",
                    )  # fmt: skip
                axes.fill_between(
                    frame["layer"], frame[f"{name}_low"], frame[f"{name}_high"],
                    color=color, alpha=0.25, lw=0,
                )  # fmt: skip
                axes.plot(frame["layer"], frame[name], "o-", color=color, ms=3, lw=1.2)
                if module == "attn":
                    depth = frame["layer"].to_numpy(float)
                    mark_mixers(axes, analysis, depth, frame[name].to_numpy())
                    if {"linear_attention", "ssm"} & set(analysis.mixers):
                        axes.legend(loc="best", fontsize="small")
                layer_axis(axes, analysis.num_layers, label=module == "ffn")
            layer = analysis.recommendation.layer
            if layer is not None:
                panels[1].axvline(layer, color="black", lw=1, ls=":", label=f"layer {layer} first")
        columns[0][0].set_ylabel(r"$\Delta H_{\mathrm{ATTN}}$ (nats)")
        columns[0][1].set_ylabel(r"$\Delta H_{\mathrm{FFN}}$ (nats)")
        if columns[-1][1].get_legend_handles_labels()[0]:
            columns[-1][1].legend(loc="best", fontsize="small")
    return figure
