"""One self-contained HTML page: the recommendation, the figures, the table."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from entropylens.recommend import Recommendation
    from entropylens.results import Analysis

__all__ = ["report_page"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }}
table {{ border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 1px 8px; text-align: right; border-bottom: 1px solid #eee; }}
img {{ max-width: 100%; }} .wide {{ overflow-x: auto; }}
.answer {{ background: #f4f6f8; padding: .6rem 1rem; border-left: 4px solid #0072b2; }}
</style></head><body>
<h1>{title}</h1>
<p>{facts}</p>
{answers}
{figures}
<h2>Layers</h2>
<p>Entropies in nats, means over generated tokens; _low and _high are 95 % intervals.</p>
<div class="wide">{table}</div>
</body></html>
"""

#: What each figure shows, below it.
_CAPTIONS = {
    "figure1c_stages": "Entropy change of every FFN in its stage's colour (Fig. 1c).",
    "figure2_flow": "Entropy of every internal policy along depth (Fig. 2 of the paper).",
    "figure3_change": "Entropy change of attention and FFN with 95 % bands; grey is what random "
    "vectors of the same norms give (Fig. 3).",
    "figure8_cosine": "Residual cosine similarity (Fig. 8).",
    "trainability": "How well each layer's policy knows the produced text: its NLL, and how often "
    "its top token is pi_theta's.",
}


def report_page(analysis: Analysis, pictures: Mapping[str, Figure]) -> str:
    """The page as HTML text; nothing in it is loaded from elsewhere.

    Args:
        analysis: what is reported.
        pictures: its figures by name, as plots.FIGURES names them.
    """
    facts = (
        f"{analysis.num_layers} layers, {analysis.num_responses} responses to "
        f"{analysis.num_prompts} prompts, {analysis.num_tokens} generated tokens, "
        f"{analysis.dtype}, {analysis.kernel} kernel. pi_theta: entropy "
        f"{analysis.policy_entropy:.3f} nats, NLL {analysis.policy_nll:.3f} nats, perplexity "
        f"{analysis.policy_perplexity:.3f}."
    )
    figures = "\n".join(
        f'<figure><img alt="{name}" src="data:image/png;base64,{_png(figure)}">'
        f"<figcaption>{html.escape(_CAPTIONS[name])}</figcaption></figure>"
        for name, figure in pictures.items()
    )
    return _PAGE.format(
        title=html.escape(f"Internal policies of {analysis.model}"),
        facts=html.escape(facts),
        answers="\n".join(map(_answer, analysis.recommendations.values())) + _tasks(analysis),
        figures=figures,
        table=analysis.layers.to_html(index=False, float_format=lambda value: f"{value:.4g}"),
    )


def _answer(found: Recommendation) -> str:
    layer = "no layer" if found.layer is None else f"layer {found.layer}"
    stability = "unknown" if found.stability is None else f"{found.stability:.0%}"
    literal = "none" if found.paper_rule_layer is None else str(found.paper_rule_layer)
    return (
        f'<div class="answer"><strong>Train first ({found.reading} reading): {layer}</strong><br>'
        f"rule applies: {found.applies}; stability: {stability}; the paper's literal rule: "
        f"{literal}<br>{html.escape(found.reason)}</div>"
    )


def _tasks(analysis: Analysis) -> str:
    if not analysis.by_task:
        return ""
    named = "; ".join(
        f"{html.escape(task)}: {'no layer' if found.layer is None else f'layer {found.layer}'}"
        for task, found in analysis.by_task.items()
    )
    return f"<p>Tasks agree: {'yes' if analysis.tasks_agree else 'no'} ({named})</p>"


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
