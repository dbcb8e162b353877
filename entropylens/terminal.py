"""What the command line prints: the table of layers and the recommendation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from entropylens.recommend import Recommendation
    from entropylens.results import Analysis
    from entropylens.scores import Evaluation

__all__ = ["layer_table", "recommendation_text", "score_table", "summary"]

_LEVELS = " ▁▂▃▄▅▆▇█"
_HALF = 2
_STAGE_STYLES = {"exploration": "yellow", "integration": "dim", "convergence": "blue"}


def summary(analysis: Analysis) -> RenderableType:
    """The table and every reading's recommendation."""
    skipped = f" ({analysis.skipped} bad ones skipped)" if analysis.skipped else ""
    facts = (
        f"{analysis.model}: {analysis.num_responses} responses{skipped}, "
        f"{analysis.num_tokens} tokens\npi_theta: entropy {analysis.policy_entropy:.3f} nats, "
        f"NLL {analysis.policy_nll:.3f} nats, perplexity {analysis.policy_perplexity:.2f}\n"
    )
    how = analysis.settings
    if how.get("precision") == "fast":
        facts += (
            f"fast: means move by at most {how['precision_error']:.4f} nats (tried on "
            f"{how['precision_positions']} positions); {how['precision_exact_sites']} sites exact\n"
        )
    parts: list[RenderableType] = [Text(facts), layer_table(analysis)]
    parts += [recommendation_text(found) for found in analysis.recommendations.values()]
    if analysis.by_task:
        named = ", ".join(f"{task}: {_layer(found)}" for task, found in analysis.by_task.items())
        parts.append(Text(f"Tasks agree: {'yes' if analysis.tasks_agree else 'no'} ({named})"))
    return Group(*parts)


def layer_table(analysis: Analysis) -> Table:
    """Layer, the three entropies and the three changes as numbers and small bars, stage."""
    prefix = "" if "raw" in analysis.readings else "normed_"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for name in ("H(H)", "H(A)", "H(F)", "dH layer", "dH attn", "dH FFN"):
        table.add_column(name, justify="left", no_wrap=True)
    table.add_column("stage")
    frame = analysis.layers
    entropies = [f"{prefix}entropy_{site}" for site in ("layer", "attn", "ffn")]
    deltas = [f"{prefix}delta_{site}" for site in ("layer", "attn", "ffn")]
    highest = float(np.nanmax(frame[entropies].to_numpy()))
    largest = {name: float(frame[name].abs().max()) for name in deltas}
    for row in frame.to_dict("records"):
        stage = analysis.stages.of(row["layer"])
        table.add_row(
            str(row["layer"]),
            *(_entropy(row[name], highest) for name in entropies),
            *(_change(row[name], largest[name]) for name in deltas),
            Text(stage or "", style=_STAGE_STYLES.get(stage or "", "")),
        )
    return table


def recommendation_text(found: Recommendation) -> Text:
    """The answer, its separate qualities, and the reason in plain words."""
    text = Text(f"\nTrain first ({found.reading} reading): ")
    text.append(_layer(found), style="bold")
    stability = "unknown" if found.stability is None else f"{found.stability:.0%}"
    literal = "none" if found.paper_rule_layer is None else f"layer {found.paper_rule_layer}"
    text.append(
        f"\n  rule applies: {found.applies}   stability: {stability}   "
        f"holds for bounds: {_bounds(found)}   paper's literal rule: {literal}\n  {found.reason}"
    )
    return text


def _layer(found: Recommendation) -> str:
    return "no layer" if found.layer is None else f"layer {found.layer}"


def _bounds(found: Recommendation) -> str:
    if found.sensitivity is None:
        return "none"
    low, high = found.sensitivity
    return f"above {low:.2g} nats" if high == float("inf") else f"{low:.2g} to {high:.2g} nats"


def _entropy(value: float, highest: float) -> str:
    return "    -" if math.isnan(value) else f"{value:5.2f} {_level(value, highest)}"


def _change(value: float, largest: float) -> str:
    return "     -" if math.isnan(value) else f"{value:+6.2f} {_signed_bar(value, largest)}"


def _level(value: float, highest: float) -> str:
    share = value / highest if highest > 0 else 0.0
    return _LEVELS[max(0, min(len(_LEVELS) - 1, round(share * (len(_LEVELS) - 1))))]


def _signed_bar(value: float, largest: float) -> str:
    """A bar to the left of the bar's middle below zero, to its right above."""
    length = round(abs(value) / largest * _HALF) if largest > 0 else 0
    bar = "█" * length
    return f"{bar:>{_HALF}}│{'':{_HALF}}" if value < 0 else f"{'':{_HALF}}│{bar:<{_HALF}}"


def score_table(evaluation: Evaluation) -> RenderableType:
    """Percentages of every benchmark, with the interval over problems."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("benchmark", "metric", "%", "95 % (other problems)", "95 % (other answers)"):
        table.add_column(name, justify="right" if name == "%" else "left", no_wrap=True)
    notes = []
    scores = evaluation.scores
    for benchmark, rows in scores.groupby("benchmark", sort=False):
        for row in rows.to_dict("records"):
            k = "K" if row["k"] is None or row["k"] is pd.NA else row["k"]
            table.add_row(
                str(benchmark),
                row["metric"].replace("k", str(k)),
                f"{100 * row['value']:.2f}",
                _ends(row["low"], row["high"]),
                _ends(row["sampling_low"], row["sampling_high"]),
            )
        notes.append(_note(str(benchmark), rows.iloc[0]))
    return Group(table, Text("\n" + "\n".join(notes)))


def _ends(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{100 * low:.2f} to {100 * high:.2f}"


def _note(benchmark: str, row: pd.Series) -> str:
    few = "; fewer than 5 solved: the values say little" if row["few_solved"] else ""
    return (
        f"{benchmark}: {row['problems']} problems, {row['solved']} solved; of the answers "
        f"{row['truncated']:.1%} cut off, {row['no_answer']:.1%} without an answer, "
        f"{row['unjudged']:.1%} given up by the judge ({row['grader']}); "
        f"{row['mean_tokens']:.0f} tokens each{few}"
    )
