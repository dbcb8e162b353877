"""One self-contained HTML page: the answer, the figures, the tokens, the table, the settings."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from entropylens.html_view import doubt_table, recommendation_html, stage_bar
from entropylens.plots.style import display_name
from entropylens.report.charts import charts_of
from entropylens.report.page import Section, packed, page
from entropylens.report.parts import download, settings_list, table
from entropylens.token_view import responses_shown, token_view
from entropylens.tokens import SHOWN

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["report_page"]

#: Responses whose tokens the page shows, and bytes that these may take, packed.
MOST_RESPONSES = 3
MOST_BYTES = 3_600_000


def report_page(analysis: Analysis) -> str:
    """The page of one analysis as HTML text; nothing in it is loaded from elsewhere.

    Args:
        analysis: what is reported.
    """
    views = _views(analysis)
    sections = [
        Section("answer", "Which layer to train first", _answer(analysis)),
        Section("figures", "Figures", "", charts_of({analysis.model: analysis})),
        Section("tokens", "Token by token", _tokens(len(views))),
        Section(
            "layers",
            "Layers",
            '<p class="soft">Entropies in nats, means over generated tokens; _low and _high are '
            f"95 % intervals.</p>{download('layers.csv')}{table(analysis.layers)}",
        ),
        Section("settings", "Settings and versions", settings_list(analysis)),
    ]
    return page(
        f"Internal policies of {display_name(analysis.model)}",
        f"<p>{html.escape(_facts(analysis))}</p>",
        sections,
        views=views,
        tables={"layers.csv": analysis.layers.to_csv(index=False)},
    )


def _views(analysis: Analysis) -> list[str]:
    """Token views of the first responses; of as many tokens as a page of 6 MB has room for."""
    count = min(MOST_RESPONSES, responses_shown(analysis))
    most = SHOWN.positions or 0
    while True:
        views = [token_view(analysis, response, most=most) for response in range(1, count + 1)]
        if sum(map(len, map(packed, views))) <= MOST_BYTES or most < 2:
            return views
        most //= 2


def _facts(analysis: Analysis) -> str:
    return (
        f"{analysis.num_layers} layers, {analysis.num_responses} responses to "
        f"{analysis.num_prompts} prompts, {analysis.num_tokens} generated tokens. The model's own "
        f"policy: entropy {analysis.policy_entropy:.3f} nats, NLL {analysis.policy_nll:.3f} nats, "
        f"perplexity {analysis.policy_perplexity:.3f}."
    )


def _answer(analysis: Analysis) -> str:
    answers = "".join(map(recommendation_html, analysis.recommendations.values()))
    agree = ""
    if analysis.by_task:
        named = "; ".join(
            f"{html.escape(task)}: {'no layer' if found.layer is None else f'layer {found.layer}'}"
            for task, found in analysis.by_task.items()
        )
        agree = f"<p>Tasks agree: {'yes' if analysis.tasks_agree else 'no'} ({named})</p>"
    return (
        f"{answers}{stage_bar(analysis.stages, analysis.num_layers)}{agree}"
        "<details><summary>What would change this answer</summary>"
        f"{doubt_table(analysis.what_would_change())}</details>"
    )


def _tokens(count: int) -> str:
    if not count:
        return (
            '<p class="soft">This analysis kept no tokens; analyze without --top-tokens 0 to see '
            "the first responses here.</p>"
        )
    options = "".join(f'<option value="{it}">{it}</option>' for it in range(1, count + 1))
    return (
        '<p class="soft">Rows are layers, columns the produced tokens. Point at a cell, or go '
        "there with the arrow keys.</p>"
        f'<p><label>Response <select id="response">{options}</select></label></p>'
        '<div id="token-view"></div><div id="told-token" aria-live="polite"></div>'
    )
