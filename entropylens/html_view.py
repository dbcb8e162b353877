"""How results show themselves in a notebook: HTML and inline SVG, nothing loaded from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from entropylens.doubts import what_would_change

if TYPE_CHECKING:
    from entropylens.recommend import Recommendation
    from entropylens.results import Analysis
    from entropylens.stages import Stages

__all__ = [
    "HtmlView",
    "analysis_html",
    "doubt_table",
    "recommendation_html",
    "spark_line",
    "stage_bar",
]

_WIDTH, _HEIGHT = 260, 28
#: Colour of each stage, and of what is written on it.
_STAGES = {
    "exploration": ("#e69f00", "black"),
    "integration": ("#b0b0b0", "black"),
    "convergence": ("#0072b2", "white"),
}
#: The spark lines, and what each is called.
_LINES = {
    "entropy_layer": "H(H<sup>l</sup>)",
    "entropy_attn": "H(A<sup>l</sup>)",
    "entropy_ffn": "H(F<sup>l</sup>)",
    "delta_layer": "&Delta;H layer",
    "delta_attn": "&Delta;H attention",
    "delta_ffn": "&Delta;H FFN",
    "nll_layer": "NLL of &pi;<sub>l</sub>",
    "cos_attn": "cos attention",
    "cos_ffn": "cos FFN",
}
_STYLE = "font-size:13px;line-height:1.4;border-spacing:.8em 0;font-variant-numeric:tabular-nums"


@dataclass(frozen=True, repr=False)
class HtmlView:
    """HTML that a notebook shows.

    Args:
        html: the text.
    """

    html: str

    def __repr__(self) -> str:
        return f"<HtmlView of {len(self.html)} characters>"

    def _repr_html_(self) -> str:
        return self.html


def analysis_html(analysis: Analysis) -> str:
    """Facts, the recommendation, stage bands, a spark line a quantity, and what would change it."""
    prefix = "" if "raw" in analysis.readings else "normed_"
    frame = analysis.layers
    rows = []
    for name, label in _LINES.items():
        column = name if name.startswith("cos") else f"{prefix}{name}"
        values = frame[column].tolist()
        known = [value for value in values if math.isfinite(value)]
        span = f"{min(known):.3g} to {max(known):.3g}" if known else "not there"
        rows.append(
            f"<tr><td>{label}</td><td>{spark_line(values)}</td>"
            f'<td style="text-align:right">{span}</td></tr>'
        )
    facts = (
        f"{analysis.num_layers} layers, {analysis.num_responses} responses to "
        f"{analysis.num_prompts} prompts, {analysis.num_tokens} tokens; "
        f"&pi;<sub>&theta;</sub>: entropy {analysis.policy_entropy:.3f} nats, "
        f"perplexity {analysis.policy_perplexity:.2f}"
    )
    answers = "".join(map(recommendation_html, analysis.recommendations.values()))
    return (
        f"<div><strong>{html.escape(analysis.model)}</strong><br>{facts}{answers}"
        f"{stage_bar(analysis.stages, analysis.num_layers)}"
        f'<table style="{_STYLE}"><tr><th></th><th style="text-align:left">layer 1 to '
        f"{analysis.num_layers}</th><th>{'nats' if prefix == '' else 'nats, normed'}</th></tr>"
        f"{''.join(rows)}</table>"
        f"<details><summary>What would change this answer</summary>"
        f"{doubt_table(what_would_change(analysis))}</details></div>"
    )


def recommendation_html(found: Recommendation) -> str:
    """The layer, how far to trust it, and why."""
    layer = "no layer" if found.layer is None else f"layer {found.layer}"
    stability = "unknown" if found.stability is None else f"{found.stability:.0%}"
    literal = "none" if found.paper_rule_layer is None else str(found.paper_rule_layer)
    others = ", ".join(
        f"{'none' if it.layer is None else it.layer} ({it.share:.0%})" for it in found.alternatives
    )
    return (
        '<div style="border-left:4px solid #0072b2;padding:.3em .8em;margin:.5em 0">'
        f"<strong>Train first ({found.reading} reading): {layer}</strong><br>"
        f"applies: {found.applies}; stability: {stability}; the paper's literal rule: {literal}"
        f"{f'; alternatives: {others}' if others else ''}<br>{html.escape(found.reason)}</div>"
    )


def spark_line(values: Sequence[float]) -> str:
    """A small line over the layers, with a line at zero where values cross it; NaN leaves a gap."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    step = (_WIDTH - 4) / max(1, len(values) - 1)

    def height(value: float) -> float:
        return _HEIGHT - 3 - (value - low) / span * (_HEIGHT - 6)

    pieces: list[list[str]] = [[]]
    for place, value in enumerate(values):
        if math.isfinite(value):
            pieces[-1].append(f"{2 + place * step:.1f},{height(value):.1f}")
        elif pieces[-1]:
            pieces.append([])
    zero = ""
    if low < 0 < high:
        zero = (
            f'<line x1="0" x2="{_WIDTH}" y1="{height(0):.1f}" y2="{height(0):.1f}" '
            'stroke="currentColor" stroke-width=".5" opacity=".5"/>'
        )
    lines = "".join(
        f'<polyline points="{" ".join(piece)}" fill="none" stroke="#0072b2" stroke-width="1.5"/>'
        if len(piece) > 1
        else f'<circle cx="{piece[0].split(",")[0]}" cy="{piece[0].split(",")[1]}" r="1.5" '
        'fill="#0072b2"/>'
        for piece in pieces
        if piece
    )
    told = "; ".join(f"{place}: {value:.4g}" for place, value in enumerate(values, start=1))
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img"><title>{told}</title>{zero}{lines}'
        "</svg>"
    )


def stage_bar(stages: Stages, num_layers: int) -> str:
    """A bar of the layers, each stage in its colour and named where it is wide enough."""
    parts, told = [], []
    for name, (color, ink) in _STAGES.items():
        span = getattr(stages, name)
        if span is None:
            continue
        width = (span[1] - span[0] + 1) / num_layers * _WIDTH
        start = (span[0] - 1) / num_layers * _WIDTH
        label = name if width > 70 else name[:3] if width > 22 else ""
        parts.append(
            f'<rect x="{start:.1f}" width="{width:.1f}" height="16" fill="{color}">'
            f"<title>{name}: layers {span[0]} to {span[1]}</title></rect>"
            f'<text x="{start + width / 2:.1f}" y="12" font-size="10" text-anchor="middle" '
            f'fill="{ink}">{label}</text>'
        )
        told.append(f"{name}: layers {span[0]} to {span[1]}")
    return (
        f'<svg width="{_WIDTH}" height="16" role="img" aria-label="{"; ".join(told)}">'
        f"{''.join(parts)}</svg>"
    )


def doubt_table(frame: pd.DataFrame) -> str:
    """What `what_would_change` found."""
    rows = "".join(
        f"<tr><td>{choice}</td><td>{html.escape(str(value))}</td>"
        f'<td style="text-align:right">{"none" if layer is pd.NA else layer}</td>'
        f"<td>{'same' if same else '<strong>other</strong>'}</td></tr>"
        for choice, value, layer, same in frame.itertuples(index=False)
    )
    return (
        f'<table style="{_STYLE}"><tr><th>choice</th><th></th><th>layer</th><th></th></tr>'
        f"{rows}</table>"
    )
