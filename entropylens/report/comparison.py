"""One page for several analyses: answers beside each other, differences, curves in one chart."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from entropylens.html_view import recommendation_html, stage_bar
from entropylens.report.charts import charts_of, difference_chart
from entropylens.report.page import Section, page
from entropylens.report.parts import download, settings_list, table

if TYPE_CHECKING:
    from entropylens.contrast import ModelContrast
    from entropylens.results import Analysis

__all__ = ["comparison_page"]


def comparison_page(models: Mapping[str, Analysis], contrasts: Sequence[ModelContrast]) -> str:
    """The page as HTML text; nothing in it is loaded from elsewhere.

    Args:
        models: at least two, by name; all of the same readings.
        contrasts: of the first with each other, in each reading.
    """
    layers = pd.concat(
        [analysis.layers.assign(model=name) for name, analysis in models.items()],
        ignore_index=True,
    )
    layers.insert(0, "model", layers.pop("model"))
    differences = pd.concat(
        [it.frame.assign(model=it.second) for it in contrasts], ignore_index=True
    )
    readings = list(dict.fromkeys(it.reading for it in contrasts))
    deep = {
        reading: [it for it in contrasts if it.reading == reading and not it.frame.empty]
        for reading in readings
    }
    charts = [difference_chart(those, list(models)) for those in deep.values() if those]
    sentences = "".join(f"<p>{' '.join(map(html.escape, it.sentences))}</p>" for it in contrasts)
    answers = "".join(
        f"<h3>{html.escape(name)}</h3>"
        + "".join(map(recommendation_html, analysis.recommendations.values()))
        + stage_bar(analysis.stages, analysis.num_layers)
        for name, analysis in models.items()
    )
    settings = "".join(
        f"<details><summary>{html.escape(name)}</summary>{settings_list(analysis)}</details>"
        for name, analysis in models.items()
    )
    sections = [
        Section(
            "difference-section",
            "How they differ",
            sentences,
            charts,
        ),
        Section("answers", "Which layer to train first", answers),
        Section("figures", "Figures", "", charts_of(models)),
        Section(
            "layers",
            "Layers",
            "".join(map(download, ["layers.csv", *["differences.csv"] * bool(charts)]))
            + table(layers),
        ),
        Section("settings", "Settings and versions", settings),
    ]
    return page(
        f"Internal policies of {', '.join(models)}",
        "",
        sections,
        tables={
            "layers.csv": layers.to_csv(index=False),
            "differences.csv": differences.to_csv(index=False),
        },
    )
