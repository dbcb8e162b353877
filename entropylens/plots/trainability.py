"""What the paper has not: how well each layer's policy knows the text that would train it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from entropylens.plots.style import FFN, STREAM, figure_rows, layer_axis

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["trainability"]


def trainability(
    analyses: Sequence[Analysis], probes: Mapping[str, pd.DataFrame] | None = None
) -> Figure:
    """NLL of the produced tokens under pi_l, agreement with pi_theta, and gradient cosine.

    A dashed line stands at ln V, the NLL of a policy that knows nothing.

    Args:
        analyses: the models, side by side.
        probes: by model, what `train --probe-layers` writes (`layer, cosine, cosine_low,
            cosine_high`); without it the last row is left out.
    """
    probes = probes or {}
    rows = 3 if any(one.model in probes for one in analyses) else 2
    with figure_rows(analyses, rows, height=1.8) as (figure, columns):
        for analysis, axes in zip(analyses, columns, strict=True):
            prefix = "" if "raw" in analysis.readings else "normed_"
            frame = analysis.layers
            axes[0].semilogy(
                frame["layer"], frame[f"{prefix}nll_layer"], "o-", color=STREAM, ms=3, lw=1.2
            )
            axes[0].axhline(
                np.log(analysis.vocab_size), color="0.5", lw=1, ls="--", label=r"$\ln V$"
            )
            axes[1].plot(
                frame["layer"], frame[f"{prefix}agree_layer"], "o-", color=STREAM, ms=3, lw=1.2
            )
            axes[1].set_ylim(-0.03, 1.03)
            if rows == 3 and analysis.model in probes:
                probe = probes[analysis.model]
                axes[2].axhline(0, color="black", lw=0.7)
                axes[2].fill_between(
                    probe["layer"], probe["cosine_low"], probe["cosine_high"],
                    color=FFN, alpha=0.25, lw=0,
                )  # fmt: skip
                axes[2].plot(probe["layer"], probe["cosine"], "o-", color=FFN, ms=3, lw=1.2)
            for place, panel in enumerate(axes):
                layer_axis(panel, analysis.num_layers, label=place == rows - 1)
        columns[0][0].set_ylabel(r"NLL of $\pi_l$ (nats)")
        columns[0][1].set_ylabel(r"top token is $\pi_\theta$'s")
        if rows == 3:
            columns[0][2].set_ylabel("gradient cosine")
        columns[-1][0].legend(loc="best", fontsize="small")
    return figure
