"""What would change a recommendation: the same data under another rule, reading or bound."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from entropylens.recommend import paper_rule_layer

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["BOUNDS", "what_would_change"]

#: Bounds on "about zero" that the literal rule is tried with, in nats.
BOUNDS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)


def what_would_change(analysis: Analysis) -> pd.DataFrame:
    """The answer under each other choice that one could have made.

    Args:
        analysis: what was measured.

    Returns:
        One row a choice: `choice` (rule | bound | reading | task | prompts), `value`, `layer`
        (<NA> for none), `same` (whether that is the answer given).
    """
    given = analysis.recommendation
    reading = given.reading
    rows: list[tuple[str, str, int | None]] = [("rule", "stages (the answer)", given.layer)]
    rows.append(("rule", "the paper's, literally", given.paper_rule_layer))
    name = "delta_ffn" if reading == "raw" else "normed_delta_ffn"
    means = analysis.layers[name].to_numpy(float)
    rows += [
        ("bound", f"last FFN above {bound:g} nats", paper_rule_layer(means, bound))
        for bound in BOUNDS
    ]
    for other, found in analysis.recommendations.items():
        if other != reading:
            rows.append(("reading", other, found.layer))
    rows += [("task", task, found.layer) for task, found in analysis.by_task.items()]
    for count in _halves(analysis.num_prompts):
        rows.append(("prompts", f"the first {count}", _of_first(analysis, count)))
    frame = pd.DataFrame(rows, columns=["choice", "value", "layer"]).astype({"layer": "Int64"})
    answer = given.layer if given.layer is not None else -1
    frame["same"] = frame["layer"].fillna(-1) == answer
    return frame


def _halves(count: int) -> list[int]:
    """A quarter and a half of the prompts, where that leaves enough to resample."""
    return [part for part in (count // 4, count // 2) if part >= 3]


def _of_first(analysis: Analysis, count: int) -> int | None:
    prompts = analysis.responses["prompt_id"].drop_duplicates().iloc[:count]
    those = analysis.responses[analysis.responses["prompt_id"].isin(prompts)]
    part = replace(analysis, responses=those, tokens=None)
    return part.recommend(reading=analysis.recommendation.reading).layer
