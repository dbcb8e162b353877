"""Figure 2: entropy along the stream, H^{l-1} -> A^l -> F^l -> H^l, with pi_theta marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from entropylens.plots.layout import footnote, layer_axis, legend_above, mark_size, model_panels
from entropylens.plots.marks import gaps, mark_mixers
from entropylens.plots.style import ATTN, FFN, STREAM

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["flow"]


def flow(analyses: Sequence[Analysis], *, width: float | None = None) -> Figure:
    """Entropy of every internal policy in the order in which the stream meets them (Fig. 2).

    Args:
        analyses: the models, side by side.
        width: of the figure in inches; by default as wide as the models need.
    """
    with model_panels(analyses, ["policy entropy (nats)"], height=3.0, width=width) as made:
        figure, columns = made
        missing = []
        for analysis, (axes,) in zip(analyses, columns, strict=True):
            prefix = "" if "raw" in analysis.readings else "normed_"
            frame = analysis.layers
            layer = frame["layer"].to_numpy(float)
            stream = frame[f"{prefix}entropy_layer"].to_numpy()
            first = stream[0] - frame[f"{prefix}delta_layer"].to_numpy()[0]
            names = [f"{prefix}entropy_{module}" for module in ("attn", "ffn")]
            attn, ffn = (frame[name].to_numpy() for name in names)
            depth = np.stack([layer - 2 / 3, layer - 1 / 3, layer], axis=1).ravel()
            path = np.stack([attn, ffn, stream], axis=1).ravel()
            there = np.isfinite(path)  # a layer may have no attention or no FFN
            size = mark_size(axes, 1, analysis.num_layers)
            axes.plot([0, *depth[there]], [first, *path[there]], color="0.8", lw=0.8, zorder=1)
            axes.plot(
                [0, *layer], [first, *stream], "o-", color=STREAM, ms=3 * size,
                label="$H^l$ (layer)",
            )  # fmt: skip
            axes.plot(layer - 2 / 3, attn, "^", color=ATTN, ms=4 * size, label="$A^l$ (attention)")
            mark_mixers(axes, analysis, layer - 2 / 3, attn)
            axes.plot(layer - 1 / 3, ffn, "s", color=FFN, ms=3.5 * size, label="$F^l$ (FFN)")
            axes.plot(
                [analysis.num_layers], [analysis.policy_entropy], "*", color="black", ms=11,
                mec="white", label=r"$\pi_\theta$", clip_on=False, zorder=3,
            )  # fmt: skip
            missing += gaps(analysis, *names)
            layer_axis(axes, analysis.num_layers, first=-0.6)
        legend_above(figure)
        footnote(figure, missing)
    return figure
