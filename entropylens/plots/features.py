"""Figure 5: what training does to the features of the trained layer, over a fixed set of text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from entropylens.errors import TrainingFilesError
from entropylens.plots.style import model_colors, panels
from entropylens.training_run import TrainingRun

__all__ = ["features"]

#: Higher layers shown by a line of their own; of more, an even choice.
_LINES = 7


def features(runs: Sequence[TrainingRun]) -> Figure:
    """cos(H^l, H^m) for higher layers, Delta H of layer l, perplexity of pi_theta (Fig. 5).

    Args:
        runs: with looks at the fixed set; the first panel of each row is its similarities.

    Raises:
        TrainingFilesError: a run has no looks.
    """
    for run in runs:
        if run.looks is None:
            raise TrainingFilesError(
                f"run {run.name!r} has no looks at a fixed set",
                "train with bupo.analyze_every=K to have one every K steps",
            )
    with panels(3, rows=len(runs), width=2.9, height=2.4) as (figure, axes):
        colors = model_colors([run.name for run in runs])
        for place, (run, color) in enumerate(zip(runs, colors, strict=True)):
            similarity, delta, perplexity = axes[3 * place : 3 * place + 3]
            looks = run.looks
            assert looks is not None
            layer = int(looks["layer"].iloc[0])
            others = [
                int(name.removeprefix("cos_"))
                for name in map(str, looks)
                if name.startswith("cos_") and name != "cos_final"
            ]
            chosen = np.unique(np.linspace(0, len(others) - 1, min(_LINES, len(others))).round())
            shades = sns.color_palette("viridis", len(chosen))
            for number, shade in zip(chosen.astype(int), shades, strict=True):
                other = others[number]
                similarity.plot(
                    looks["step"], looks[f"cos_{other}"], "o-", ms=2.5, lw=1.2,
                    color=to_hex(shade),
                )  # fmt: skip
                similarity.annotate(
                    f"$m={other}$", (looks["step"].iloc[-1], looks[f"cos_{other}"].iloc[-1]),
                    xytext=(4, 0), textcoords="offset points", va="center", fontsize="x-small",
                    color=to_hex(shade),
                )  # fmt: skip
            similarity.set_ylabel(rf"$\cos(H^{{{layer}}}, H^m)$")
            similarity.set_title(run.name, loc="left", fontweight="bold")
            delta.plot(looks["step"], looks["delta_layer"], "o-", color=color, ms=2.5, lw=1.2)
            delta.set_ylabel(rf"$\Delta H^{{{layer}}}_{{\mathrm{{Layer}}}}$ (nats)")
            perplexity.plot(looks["step"], looks["perplexity"], "o-", color=color, ms=2.5, lw=1.2)
            perplexity.set_ylabel(r"perplexity of $\pi_\theta$")
            for panel in (similarity, delta, perplexity):
                panel.set_xlabel("step")
                if 0 < run.internal_steps < len(run.metrics):
                    panel.axvline(run.internal_steps + 0.5, color="0.4", lw=1, ls=":")
    return figure
