"""LAB.md: the laboratory's numbers in words that claim no more than its intervals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bupo.lab import pictures, questions, sections
from bupo.lab.arms import BASELINES, BUPO, GRPO, INTER_GRPO, START
from bupo.lab.findings import Findings
from bupo.lab.markdown import filled, points, signed, table
from bupo.lab.results import AVERAGE, Contrast, contrast, contrasts, in_common
from entropylens.files import write_text
from entropylens.plots.change import change
from entropylens.plots.features import features
from entropylens.plots.style import save
from entropylens.recommend import Recommendation
from entropylens.results import Analysis

__all__ = ["PAGE", "figures", "page", "write_up"]

PAGE = "LAB.md"


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
    steps = found.plan.internal_steps
    drawn = {
        "profile": change([_in_reading(found, it.analysis) for it in found.inspections.values()]),
        "figure4": pictures.dynamics(found.curves, sections.throughout(found), 0),
        "figure5": features([found.mean_run(it) for it in (INTER_GRPO, BUPO, GRPO)]),
        "figure6": pictures.by_k(in_common(found.outcomes), (GRPO, BUPO, *BASELINES)),
        "figure7": pictures.dynamics(found.curves, (GRPO, BUPO), steps),
        "arms": pictures.by_arm(found.outcomes),
        "layers": pictures.by_layer(
            found.outcomes, found.of_layers,
            {start: it.probe for start, it in found.inspections.items()}, found.layer,
            intervals=found.plan.intervals,
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
        _title(found), _subject(found), _rates(found), _outcomes(found), _primary(found),
        _contrasts(found), sections.similarity(found), sections.collapse(found),
        sections.layers(found), sections.automatic(found), sections.cost(found), _race(found),
        _twins(found), _claims(found), _limits(found),
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
compared share start, problems and draws, and no two starts share a seed. What counts is the last
step's weights on {plan.problems} problems with {plan.samples} answers each; their first two numbers
were never added in training. BuPO trains layer {found.layer} for {plan.internal_steps} steps first.

Fixed before the first step: the two lessons (of six that were looked at, those whose profile shows
the clearest boundary), the layer, s_inter, and all settings but the learning rate. PPO, RLOO and
REINFORCE++ have GRPO's learning rate; PPO's critic was not tuned.
"""


def _subject(found: Findings) -> str:
    rows = []
    for start, it in found.inspections.items():
        raw, normed = (it.analysis.recommend(reading=name) for name in ("raw", "normed"))
        entropies = it.analysis.layers["entropy_layer"]
        rows.append(
            {
                "start": start, "right when teaching stopped (%)": points(found.teaching[start]),
                "H(pi_l), nats": " ".join(f"{value:.2f}" for value in entropies),
                "stages, raw": _stages(raw), "layer, raw": f"{raw.layer} ({raw.applies})",
                "stages, normed": _stages(normed),
                "layer, normed": f"{normed.layer} ({normed.applies}, {normed.stability:.2f})",
            }
        )  # fmt: skip
    chosen = f"BuPO's layer is that of the {found.reading} reading, {found.layer}."
    if found.reading == "given":
        chosen = f"Layer {found.layer} was given beforehand."
    elif found.reading == "normed":
        chosen += (
            " The raw reading, which is what training optimizes, finds no boundary that both share."
        )
    columns = ["layer", "cosine", "norm_ratio", "nll_layer"]
    if found.plan.intervals:
        columns[2:2] = ["cosine_low", "cosine_high"]
    probes = pd.concat(
        [it.probe.layers.assign(start=start) for start, it in found.inspections.items()]
    )[["start", *columns]]
    return f"""## The subject
{table(pd.DataFrame(rows))}
Neither flat nor one-hot, or it would not have been used. {chosen} Below, how far each layer's
InterGRPO gradient points where GRPO's does, before any training.
{table(probes)}
![Entropy change of attention and FFN, Figure 3](figures/profile.png)
"""


def _stages(choice: Recommendation) -> str:
    """Exploration, integration and convergence as ranges of layers."""
    spans = (choice.stages.exploration, choice.stages.integration, choice.stages.convergence)
    return " / ".join("-" if it is None else f"{it[0]}-{it[1]}" for it in spans)


def _rates(found: Findings) -> str:
    if found.grid.empty:
        return ""
    means = found.grid.groupby(["arm", "lr"], sort=False)[AVERAGE].mean().unstack("arm")
    frame = means.map(points).reset_index()
    edges = {found.plan.learning_rates[0], found.plan.learning_rates[-1]}
    at_edge = [name for name, it in found.rates.items() if it.lr in edges]
    aside = f" At the edge of the grid: {', '.join(at_edge)}." if at_edge else ""
    runs = len(found.grid) // max(1, len(means) * 2)
    return f"""## Learning rates

Avg@K (%) on the development split, {runs} runs each. Chosen: GRPO and its variants
{found.rates[GRPO].lr:g}, BuPO and its variants {found.rates[BUPO].lr:g}.{aside}
{table(frame)}"""


def _outcomes(found: Findings) -> str:
    last = _last_pass(found)
    rows = []
    for name, runs in in_common(found.outcomes).groupby("arm", sort=False):
        rows.append(
            {
                "arm": name, "runs": len(runs), "Avg@K (%)": points(runs[AVERAGE].mean()),
                "least": points(runs[AVERAGE].min()), "most": points(runs[AVERAGE].max()),
                f"P{last[1:]} (%)": points(runs[last].mean()),
                "internal steps": f"{runs['internal_steps'].mean():.3g}",
            }
        )  # fmt: skip
    return f"""## Outcomes

Over the starts and seeds that all arms have.
{table(pd.DataFrame(rows))}
![Avg@K of every run](figures/arms.png) ![Pass@K, Figure 6](figures/figure6.png)

![Training dynamics, Figure 7](figures/figure7.png)
"""


def _last_pass(found: Findings) -> str:
    """The column of Pass@K with the largest K."""
    return [str(it) for it in found.outcomes if str(it).startswith("pass@")][-1]


def verdict(it: Contrast) -> str:
    """A contrast in words."""
    said = f"{it.arm} against {it.reference}: {signed(it.difference)} points, {it.pairs} pairs"
    if math.isnan(it.half_width):
        return f"{said}; too few for an interval."
    low, high = it.difference - it.half_width, it.difference + it.half_width
    if it.shown:
        return f"{said}, 95 % half-width {points(it.half_width)}: a difference."
    return (
        f"{said}, 95 % half-width {points(it.half_width)}: no difference is shown, and none from "
        f"{signed(low)} to {signed(high)} is excluded."
    )


def _primary(found: Findings) -> str:
    frame = found.outcomes
    primary = contrast(frame, BUPO, GRPO)
    by_start = "; ".join(
        f"{start} {signed(contrast(frame[frame['start'] == start], BUPO, GRPO).difference)}"
        for start in found.inspections
    )
    if not found.plan.intervals:
        return f"""## BuPO against GRPO

{signed(primary.difference)} points ({by_start}), {primary.pairs} pairs. So few tell nothing.
"""
    return f"""## The primary contrast

**{verdict(primary)}** By start: {by_start}. The interval is over seeds, for these starts alone.
"""


def families(found: Findings) -> dict[str, list[tuple[str, str, str]]]:
    """The contrasts beside the primary one, by question; Holm's correction is within each."""
    layers = [it for it in found.of_layers.values() if it != BUPO]
    throughout = sections.throughout(found)[1:]
    others = {GRPO, BUPO, START, *BASELINES, *layers, *throughout}
    controls = [it.name for it in found.arms if it.name not in others]
    return {
        "Baselines": [(it, GRPO, AVERAGE) for it in BASELINES],
        "Does a short internal phase change where GRPO ends, and do the controls do the same?": [
            *((it, GRPO, AVERAGE) for it in controls),
            *((it, BUPO, AVERAGE) for it in controls),
            (BUPO, GRPO, _last_pass(found)),
        ],
        "Does the layer matter?": [(it, BUPO, AVERAGE) for it in layers],
        "Where does InterGRPO without an end end?": [(it, GRPO, AVERAGE) for it in throughout],
    }


def _contrasts(found: Findings) -> str:
    parts = ["## Other contrasts", ""]
    if found.plan.intervals:
        parts += [
            "Points of Avg@K (or Pass@K), paired by start and seed; half-widths at 95 % each, p by "
            "Student's t, with Holm's correction within each table.",
            "",
        ]
    for question, asked in families(found).items():
        frame = contrasts(found.outcomes, asked)
        shown = frame[["arm", "reference", "metric", "pairs"]].assign(
            difference=frame["difference"].map(signed)
        )
        parts += [f"### {question}", ""]
        if found.plan.intervals:
            told = frame[frame["p_holm"] < 0.05]
            differ = "; ".join(
                f"{it['arm']} against {it['reference']} ({it['metric']}) {signed(it['difference'])}"
                for it in told.to_dict("records")
            )
            parts += [f"A difference is shown for: {differ or 'none of them'}."]
            shown = shown.assign(
                half_width=frame["half_width"].map(points),
                p=frame["p"].map("{:.3f}".format),
                p_holm=frame["p_holm"].map("{:.3f}".format),
            )
        parts.append(table(shown))
    return "\n".join(parts)


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
    same = int((apart < 1e-9).cumprod().sum())
    return f"""## The same run through veRL

BuPO's first run by `entropylens train` (Ray, FSDP2) and in this process: the mean reward is equal
in the first {same} steps, its mean distance over all {len(apart)} is {apart.mean():.3f}, and over
the last ten steps it is {first.tail(10).mean():.3f} and {second.tail(10).mean():.3f}.

![Reward in this process and through veRL](figures/twins.png)
"""


def _claims(found: Findings) -> str:
    primary = contrast(found.outcomes, BUPO, GRPO)
    alike = sections.like_later(found).set_index("arm")[["runs", "rises", "above"]].loc[BUPO]
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
pretrained knowledge to integrate and no long reasoning to explore. Two starts are two models: what
differs between them is not averaged away, and a layer's number here says nothing about a layer of
a large model. What is compared is how the objectives act, at this size, with everything else equal.
"""
