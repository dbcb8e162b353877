"""The sections of LAB.md that answer the laboratory's questions."""

from __future__ import annotations

import json
import math

import pandas as pd

from bupo.lab import questions
from bupo.lab.arms import AUTOMATIC, BUPO, GRPO, INTER_GRPO
from bupo.lab.findings import Findings
from bupo.lab.markdown import points, signed, table
from bupo.lab.run import PHASE

__all__ = [
    "automatic",
    "collapse",
    "cost",
    "layers",
    "like_later",
    "similarity",
    "throughout",
]

#: Bounds of `internal_steps=auto` that are compared, nats a token.
BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def similarity(found: Findings) -> str:
    """The similarity of H^l to the later layers (Fig. 5a), in three arms."""
    frame = like_later(found)
    titles = {"above": "rises more than in GRPO"}
    return f"""## Does internal optimization make H^{found.layer} more like the later layers?

cos(H^{found.layer}, H^L) over the first step's answers, means over runs: at step 0, at s_inter =
{found.plan.internal_steps} (or the next look) and at the last step; in how many runs it is higher
at s_inter than at step 0, and in how many it has risen more by then than in GRPO's run with the
same start and seed.
{table(frame, titles)}
![Similarity, entropy change and perplexity, Figure 5](figures/figure5.png)
"""


def like_later(found: Findings) -> pd.DataFrame:
    """See `questions.similarity`."""
    names = [INTER_GRPO, BUPO, GRPO]
    return questions.similarity(found.curves, names, GRPO, found.plan.internal_steps)


def throughout(found: Findings) -> list[str]:
    """GRPO, and the arms that never leave the internal phase."""
    return [GRPO, *(it.name for it in found.arms if it.name.startswith(INTER_GRPO))]


def collapse(found: Findings) -> str:
    """Whether and when those arms collapse (Fig. 4)."""
    frame = questions.collapses(found.curves, throughout(found))
    rows = []
    for name, runs in frame.groupby("arm", sort=False):
        steps = sorted(runs["step"].dropna().astype(int))
        rows.append(
            {
                "arm": name, "runs": len(runs), "collapsed": len(steps),
                "at step": ", ".join(map(str, steps)),
                "held-out Avg@1 at step 0 (%)": points(runs["first"].mean()),
                "at the end (%)": points(runs["last"].mean()),
            }
        )  # fmt: skip
    return f"""## Does InterGRPO alone collapse, and when?

Collapsed: fewer than half as many held-out problems right as at step 0, in two looks running.
{table(pd.DataFrame(rows))}
![Training dynamics, Figure 4](figures/figure4.png) ![Collapse](figures/collapse.png)
"""


def layers(found: Findings) -> str:
    """BuPO at each layer, and what foretold it."""
    frame = questions.layers(found.outcomes, found.of_layers)
    ranked = questions.ranking(frame, found.inspections)
    for name in (*found.inspections, "all"):
        frame[name] = frame[name].map(points)
    return f"""## What ranks the layers?

Avg@K (%) of BuPO at each layer, over the seeds that all layers have.
{table(frame)}
Which layer did best, and where three that were named beforehand stand among the {len(frame)} (1 is
the best): by the paper's rule read literally, by the normed reading, and by the greatest gradient
cosine; Spearman's rank correlation of cosines and outcomes. With
{frame["runs"].iloc[0] // len(found.inspections)} runs a layer and start these ranks are noisy.
{table(ranked)}
![Layers](figures/layers.png)
"""


def automatic(found: Findings) -> str:
    """Where `internal_steps: auto` stops, and where other bounds would."""
    course = found.plan.course
    rows = []
    fall = questions.collapses(found.curves, [INTER_GRPO]).set_index(["start", "seed"])["step"]
    for job in found.jobs:
        if job.arm.name == AUTOMATIC and job.finished:
            told = json.loads((job.directory / PHASE).read_text(encoding="utf-8"))
            at, why = told["ended"]
            end = fall.get((job.start.name, job.seed), math.nan)
            rows.append(
                {
                    "start": job.start.name, "seed": job.seed, "internal steps": at, "why": why,
                    "InterGRPO throughout collapses at": end,
                }
            )  # fmt: skip
    frame = questions.calibration(found.curves[found.curves["arm"] == INTER_GRPO], BOUNDS)
    fit = frame[(frame["stopped"] == frame["runs"]) & (frame["change"] >= 0)]["kl_bound"]
    largest = "none of them" if fit.empty else f"{fit.max():g}"
    for name in ("change", "worst"):
        frame[name] = frame[name].map(signed)
    curves = found.curves[found.curves["arm"] == GRPO]
    moved = curves.groupby(["start", "seed"])[questions.KL].last().mean()
    return f"""## Does `internal_steps: auto` stop before the collapse?

With a bound of {course.kl_bound:g} nats, a look every {course.look_every} steps, and no limit but
the run's end:
{table(pd.DataFrame(rows))}
What bounds on the KL alone would have done to the runs of InterGRPO throughout: how many they stop,
at which step (median), and the change of held-out Avg@1 up to there (points; mean and worst). The
largest bound that ends every run before its mean has fallen: {largest}. GRPO's own
runs end at {moved:.2g} nats.
{table(frame)}"""


def cost(found: Findings) -> str:
    """An internal step's cost beside a full one's."""
    names = list(found.of_layers.values())
    ratios = questions.cost(found.curves[found.curves["arm"].isin(names)])
    by_arm = ratios.groupby(level=0).agg(["median", "min", "max"])
    depth = found.plan.lessons[0].layers
    rows = [
        {"layer": layer, "l / L": layer / depth} | by_arm.loc[name].to_dict()
        for layer, name in found.of_layers.items()
        if name in by_arm.index
    ]
    return f"""## Is the internal step cheaper?

Seconds of an internal step's updates over a full step's: median, least and most of the runs.
{table(pd.DataFrame(rows))}"""
