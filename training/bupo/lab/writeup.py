"""LAB.md: the laboratory's numbers in words that claim no more than its intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bupo.lab import answers, pictures, questions
from bupo.lab.arms import BUPO, GRPO, INTER_GRPO
from bupo.lab.findings import Findings
from bupo.lab.markdown import filled, points, signed, table
from bupo.lab.results import AVERAGE, Contrast, contrast, contrasts
from entropylens.files import write_text
from entropylens.plots.change import change
from entropylens.plots.dynamics import dynamics
from entropylens.plots.features import features
from entropylens.plots.style import save
from entropylens.results import Analysis

__all__ = ["PAGE", "figures", "page", "write_up"]

PAGE = "LAB.md"
#: Arms whose Pass@K is drawn.
BASELINES = (GRPO, BUPO, "PPO", "RLOO", "REINFORCE++")


def write_up(found: Findings, directory: Path) -> Path:
    """Write LAB.md and its figures/.

    Args:
        found: the numbers.
        directory: where.
    """
    for name, figure in figures(found).items():
        save(figure, directory / "figures" / name)
    write_text(directory / PAGE, page(found))
    return directory / PAGE


def figures(found: Findings) -> dict[str, Figure]:
    """The pictures of LAB.md, by file name; the numbers are the paper's."""
    internal = found.curves[found.curves["arm"] == INTER_GRPO]
    drawn = {
        "profile": change([_in_reading(found, it.analysis) for it in found.inspections.values()]),
        "figure4": dynamics([found.mean_run(it) for it in answers.throughout(found)]),
        "figure5": features([found.mean_run(it) for it in (INTER_GRPO, BUPO, GRPO)]),
        "figure6": pictures.by_k(found.outcomes, BASELINES),
        "figure7": dynamics([found.mean_run(it) for it in (GRPO, BUPO)]),
        "arms": pictures.by_arm(found.outcomes),
        "layers": pictures.by_layer(
            found.outcomes, found.of_layers,
            {start: it.probe for start, it in found.inspections.items()}, found.layer,
        ),
        "collapse": pictures.collapse(internal, found.plan.course.kl_bound),
    }  # fmt: skip
    if found.twins:
        rewards = {name: it.curve("bupo/reward") for name, it in found.twins.items()}
        drawn["twins"] = pictures.reward_curves(rewards)
    return drawn


def _in_reading(found: Findings, analysis: Analysis) -> Analysis:
    """The analysis in the reading that names BuPO's layer."""
    return analysis if found.reading == "given" else replace(analysis, reading=found.reading)


def page(found: Findings) -> str:
    """LAB.md."""
    parts = [
        _title(found), _subject(found), _rates(found), _outcomes(found), _contrasts(found),
        answers.similarity(found), answers.collapse(found), answers.layers(found),
        answers.automatic(found), answers.cost(found),
        _race(found), _twins(found), _claims(found), _limits(found),
    ]  # fmt: skip
    return filled("\n".join(it for it in parts if it)) + "\n"


def _title(found: Findings) -> str:
    plan, course = found.plan, found.plan.course
    command = "make lab" if plan.intervals else "make lab-quick"
    return f"""# BuPO against its baselines, on a CPU

Written by `{command}`. A model with Qwen3's architecture ({plan.lessons[0].layers} layers, d
{plan.lessons[0].width}) learns to add three numbers step by step from demonstrations, and goes on
by reinforcement learning: {course.steps} steps of {course.prompts} problems with {course.samples}
answers each, {course.rates.updates} updates a step. {len(found.outcomes)} runs; arms that are
compared share start, problems and draws. What counts is the last step's weights on problems whose
first two numbers no training problem has: {plan.problems} problems, {plan.samples} answers each.
BuPO trains layer {found.layer} for {plan.internal_steps} steps first. Everything was fixed before
the first step; learning rates were chosen on a development split with seeds of their own.
"""


def _subject(found: Findings) -> str:
    rows = []
    for start, it in found.inspections.items():
        frame = it.analysis.layers
        raw, normed = (it.analysis.recommend(reading=name) for name in ("raw", "normed"))
        rows.append(
            {
                "start": start, "accuracy (%)": points(found.teaching[start]),
                "H(pi_l), nats": " ".join(f"{value:.2f}" for value in frame["entropy_layer"]),
                "raw rule": f"{raw.layer} ({raw.applies})",
                "normed rule": f"{normed.layer} ({normed.applies}, {normed.stability:.2f})",
            }
        )  # fmt: skip
    chosen = (
        f"Layer {found.layer} was given beforehand."
        if found.reading == "given"
        else f"BuPO's layer is that of the {found.reading} reading, {found.layer}."
    )
    aside = (
        " The raw reading, which is what training optimizes, finds no boundary: it names the last "
        "inner layer and says itself that the rule does not apply."
        if found.reading == "normed"
        else ""
    )
    columns = ["start", "layer", "cosine", "cosine_low", "cosine_high", "norm_ratio", "nll_layer"]
    probes = pd.concat(
        [it.probe.layers.assign(start=start) for start, it in found.inspections.items()]
    )[columns]
    return f"""## The subject
{table(pd.DataFrame(rows))}
Neither flat nor one-hot, or it would not have been used. {chosen}{aside} Below, how far each
layer's InterGRPO gradient points where GRPO's does, before any training (95 %).
{table(probes)}
![Entropy change of attention and FFN, Figure 3](figures/profile.png)
"""


def _rates(found: Findings) -> str:
    if found.grid.empty:
        return ""
    means = found.grid.groupby(["arm", "lr"], sort=False)[AVERAGE].mean().map(points)
    frame = means.unstack("arm").reset_index().rename(columns={AVERAGE: "Avg@K"})
    return f"""## Learning rates

Avg@K (%) on the development split. pi_theta's by GRPO: {found.rates.lr:g}; with it, pi_l's by
BuPO: {found.rates.internal_lr:g}.
{table(frame)}"""


def _outcomes(found: Findings) -> str:
    last = f"pass@{max(found.plan.samples, 1)}"
    rows = []
    for name, runs in found.outcomes.groupby("arm", sort=False):
        rows.append(
            {
                "arm": name, "runs": len(runs), "Avg@K (%)": points(runs[AVERAGE].mean()),
                "least": points(runs[AVERAGE].min()), "most": points(runs[AVERAGE].max()),
                f"Pass@{found.plan.samples} (%)": points(runs[last].mean()),
                "internal steps": f"{runs['internal_steps'].mean():.3g}",
            }
        )  # fmt: skip
    return f"""## Outcomes
{table(pd.DataFrame(rows))}
![Avg@K of every run](figures/arms.png) ![Pass@K, Figure 6](figures/figure6.png)

![Training dynamics, Figure 7](figures/figure7.png)
"""


def verdict(it: Contrast) -> str:
    """A contrast in words."""
    said = f"{it.arm} - {it.reference}: {signed(it.difference)} points over {it.pairs} pairs"
    if math.isnan(it.half_width):
        return f"{said}; too few for an interval."
    low, high = it.difference - it.half_width, it.difference + it.half_width
    if it.shown:
        return f"{said}, 95 % half-width {points(it.half_width)}: a difference."
    return (
        f"{said}, 95 % half-width {points(it.half_width)}: no difference is shown, and none from "
        f"{signed(low)} to {signed(high)} is excluded."
    )


def asked(found: Findings) -> Iterator[tuple[str, str, str]]:
    """The contrasts beside the primary one: all arms against GRPO, BuPO's controls against BuPO."""
    for arm in found.arms:
        if arm.name not in (GRPO, BUPO):
            yield arm.name, GRPO, AVERAGE
    for arm in found.arms:
        if arm.layer is not None and arm.name != BUPO:
            yield arm.name, BUPO, AVERAGE
    yield BUPO, GRPO, f"pass@{found.plan.samples}"


def _contrasts(found: Findings) -> str:
    primary = contrast(found.outcomes, BUPO, GRPO)
    frame = contrasts(found.outcomes, asked(found))
    shown = frame[["arm", "reference", "metric", "pairs"]].assign(
        difference=frame["difference"].map(signed)
    )
    if not found.plan.intervals:
        return f"""## Contrasts

Differences in points; a seed or two tell nothing about them. BuPO - GRPO:
{signed(primary.difference)} over {primary.pairs} pairs.
{table(shown)}"""
    shown = shown.assign(
        half_width=frame["half_width"].map(points),
        p=frame["p"].map("{:.3f}".format),
        p_holm=frame["p_holm"].map("{:.3f}".format),
    )
    told = frame[frame["p_holm"] < 0.05]
    differ = "; ".join(
        f"{it['arm']} - {it['reference']} ({it['metric']}) {signed(it['difference'])}"
        for it in told.to_dict("records")
    )
    return f"""## The primary contrast

**{verdict(primary)}**

## Other contrasts

A difference is shown between: {differ or "none of them"}.

Points of Avg@K (or Pass@K), paired by start and seed; half-widths at 95 % each, p by Student's t,
with Holm's correction over the table.
{table(shown)}"""


def _race(found: Findings) -> str:
    if not found.races:
        return ""
    parts = ["## The layer race (`--layer race:...`)", ""]
    for start, it in found.races.items():
        parts += [f"{start}: {it.reason}", table(it.to_frame())]
    return "\n".join(parts)


def _twins(found: Findings) -> str:
    if not found.twins:
        return ""
    first, second = (it.curve("bupo/reward") for it in found.twins.values())
    apart = (first - second).abs()
    same = int((apart.reindex(range(1, len(apart) + 1)) < 1e-9).cumprod().sum())
    return f"""## The same run through veRL

The first run of BuPO with one rate, by `entropylens train` (Ray, FSDP2) and in this process:
the reward of the first {same} steps is the same to the last answer, the mean distance over all
{len(apart)} is {apart.mean():.3f}, and the last ten steps' means are
{first.tail(10).mean():.3f} and {second.tail(10).mean():.3f}.

![Reward in this process and through veRL](figures/twins.png)
"""


def _claims(found: Findings) -> str:
    primary = contrast(found.outcomes, BUPO, GRPO)
    alike = answers.like_later(found).set_index("arm").loc[BUPO]
    fall = questions.collapses(found.curves, [INTER_GRPO])
    fell = int(fall["step"].notna().sum())
    if not found.plan.intervals:
        return ""
    better = "not shown"
    if primary.shown:
        better = "shown on this task" if primary.difference > 0 else "contradicted on this task"
    rows = [
        (
            "internal optimization makes H^l more like the later layers (Fig. 5a)",
            f"it rises in {alike['rises']} of {alike['runs']} runs of BuPO, and more than in GRPO "
            f"in {alike['above']}",
        ),
        ("InterGRPO alone collapses (Fig. 4)", f"in {fell} of {len(fall)} runs"),
        (
            "BuPO ends above GRPO (Table 1)",
            f"{better}: {signed(primary.difference)} points, 95 % half-width "
            f"{points(primary.half_width)}",
        ),
    ]
    frame = pd.DataFrame(rows, columns=["the paper", "here"])
    return f"""## What was confirmed, and what was not
{table(frame)}"""


def _limits(found: Findings) -> str:
    depth = found.plan.lessons[0].layers
    return f"""## What a tiny model cannot say

It has {depth} layers, 32 tokens and one task, which it learned from demonstrations; there is no
pretrained knowledge to integrate and no long reasoning to explore. Its profile is not that of a
large model, and a layer's number here says nothing about a layer there. What carries over is how
the objectives act on features, and what a comparison needs before its difference means anything.
"""
