"""What the paper has not: how well each layer's policy knows the text that would train it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from entropylens.plots.layout import layer_axis, legend_above, mark_size, model_panels, note
from entropylens.plots.marks import band
from entropylens.plots.style import FFN, STREAM

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["trainability"]


def trainability(
    analyses: Sequence[Analysis],
    probes: Mapping[str, pd.DataFrame] | None = None,
    *,
    width: float | None = None,
) -> Figure:
    """NLL of the produced tokens under pi_l, agreement with pi_theta, and gradient cosine.

    A dashed line stands at ln V, the NLL of a policy that knows nothing.

    Args:
        analyses: the models, side by side.
        probes: by model, what `train --probe-layers` writes (`layer, cosine, cosine_low,
            cosine_high`); where no model has one the last row is left out.
        width: of the figure in inches; by default as wide as the models need.
    """
    probes = probes or {}
    labels = [r"NLL of $\pi_l$ (nats)", r"top token is $\pi_\theta$'s"]
    if any(one.model in probes for one in analyses):
        labels.append("gradient cosine")
    with model_panels(analyses, labels, height=1.8, width=width) as (figure, columns):
        for analysis, axes in zip(analyses, columns, strict=True):
            prefix = "" if "raw" in analysis.readings else "normed_"
            frame = analysis.layers
            size = mark_size(axes[0], 3, analysis.num_layers)
            axes[0].semilogy(
                frame["layer"], frame[f"{prefix}nll_layer"], "o-", color=STREAM, ms=size, lw=1.2
            )
            axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[0].yaxis.set_major_formatter("{x:g}")
            axes[0].yaxis.set_minor_formatter(NullFormatter())
            axes[0].axhline(
                np.log(analysis.vocab_size), color="0.3", lw=1, ls="--", label=r"$\ln V$"
            )
            axes[1].plot(
                frame["layer"], frame[f"{prefix}agree_layer"], "o-", color=STREAM, ms=size, lw=1.2
            )
            axes[1].set_ylim(-0.03, 1.03)
            for panel in axes:
                layer_axis(panel, analysis.num_layers)
            for panel in axes[2:]:
                if analysis.model not in probes:
                    note(panel, "no layer probe")
                    continue
                probe = probes[analysis.model]
                panel.axhline(0, color="black", lw=0.7)
                band(panel, probe["layer"], probe["cosine_low"], probe["cosine_high"], FFN)
                panel.plot(probe["layer"], probe["cosine"], "o-", color=FFN, ms=size, lw=1.2)
        legend_above(figure)
    return figure
