"""Figure 2: entropy along the stream, H^{l-1} -> A^l -> F^l -> H^l, with pi_theta marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from entropylens.plots.style import ATTN, FFN, STREAM, figure_rows, layer_axis, mark_mixers

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["flow"]


def flow(analyses: Sequence[Analysis]) -> Figure:
    """Entropy of every internal policy in the order in which the stream meets them (Fig. 2).

    Args:
        analyses: the models, side by side.
    """
    with figure_rows(analyses, 1, height=3.0) as (figure, columns):
        for analysis, (axes,) in zip(analyses, columns, strict=True):
            prefix = "" if "raw" in analysis.readings else "normed_"
            frame = analysis.layers
            layer = frame["layer"].to_numpy(float)
            stream = frame[f"{prefix}entropy_layer"].to_numpy()
            first = stream[0] - frame[f"{prefix}delta_layer"].to_numpy()[0]
            attn, ffn = (
                frame[f"{prefix}entropy_{module}"].to_numpy() for module in ("attn", "ffn")
            )
            depth = np.stack([layer - 2 / 3, layer - 1 / 3, layer], axis=1).ravel()
            path = np.stack([attn, ffn, stream], axis=1).ravel()
            there = np.isfinite(path)  # a layer may have no attention or no FFN
            axes.plot([0, *depth[there]], [first, *path[there]], color="0.8", lw=0.8, zorder=1)
            axes.plot(
                [0, *layer], [first, *stream], "o-", color=STREAM, ms=3, label="$H^l$ (layer)"
            )
            axes.plot(layer - 2 / 3, attn, "^", color=ATTN, ms=4, label="$A^l$ (attention)")
            mark_mixers(axes, analysis, layer - 2 / 3, attn)
            axes.plot(layer - 1 / 3, ffn, "s", color=FFN, ms=3.5, label="$F^l$ (FFN)")
            axes.plot(
                [analysis.num_layers], [analysis.policy_entropy], "*",
                color="black", ms=11, mec="white", label=r"$\pi_\theta$",
            )  # fmt: skip
            layer_axis(axes, analysis.num_layers)
            axes.set_xlim(-0.6, analysis.num_layers + 0.9)
        columns[0][0].set_ylabel("policy entropy (nats)")
        columns[-1][0].legend(loc="best", fontsize="small")
    return figure
