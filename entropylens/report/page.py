"""The shell of a page: one HTML file that holds its charts, token views, files and Plotly itself.

A content security policy forbids the browser to load anything from elsewhere.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from plotly.offline import get_plotlyjs

if TYPE_CHECKING:
    from entropylens.report.charts import Chart

__all__ = ["Section", "packed", "page"]

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,">
<style>{style}</style></head><body>
<header><nav aria-label="Sections">{links}<button id="theme" aria-label="Change the theme"></button>
</nav><h1>{title}</h1>{lead}</header>
<main><noscript><p>The charts and the token view need JavaScript; nothing is loaded from
elsewhere.</p></noscript>{sections}</main>
<script type="text/plain" id="held">{held}</script>
<script type="text/plain" id="plotly">{plotly}</script>
<script>{script}</script>
</body></html>
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        name: in the page's addresses.
        title: its heading.
        body: HTML.
        charts: shown below it.
    """

    name: str
    title: str
    body: str
    charts: Sequence[Chart] = field(default=())

    def html(self) -> str:
        """As the page has it."""
        charts = "".join(map(_figure, self.charts))
        return f'<section id="{self.name}"><h2>{self.title}</h2>{self.body}{charts}</section>'


def page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    *,
    views: Sequence[str] = (),
    tables: Mapping[str, str] | None = None,
) -> str:
    """One self-contained page.

    Args:
        title: of it, as text.
        lead: HTML below the title.
        sections: in their order.
        views: token views, for a section with `#response`, `#token-view` and `#told-token`.
        tables: CSV files by name, for buttons with that `data-file`.
    """
    charts = {chart.name: chart for section in sections for chart in section.charts}
    drawn = ",".join(
        f"{json.dumps(name)}:{chart.figure.to_json()}" for name, chart in charts.items()
    )
    held = f'{{"charts":{{{drawn}}},"views":{json.dumps(list(views))},"files":'
    held += f"{json.dumps(dict(tables or {}))}}}"
    return _PAGE.format(
        policy=_POLICY,
        title=html.escape(title),
        style=_asset("page.css"),
        links="".join(f'<a href="#{it.name}">{it.title}</a>' for it in sections),
        lead=lead,
        sections="".join(section.html() for section in sections),
        held=packed(held),
        plotly=_packed_plotly(),
        script=_asset("page.js"),
    )


def _figure(chart: Chart) -> str:
    label = html.escape(f"{chart.title}. Left and right arrow keys read it layer by layer.")
    return (
        f'<figure id="{chart.name}"><h3>{html.escape(chart.title)}</h3>'
        f"<figcaption>{html.escape(chart.caption)}</figcaption>"
        '<div class="legend" role="group" aria-label="Show or hide"></div>'
        f'<div class="plot" tabindex="0" role="group" aria-label="{label}"></div>'
        '<p class="told" aria-live="polite"></p></figure>'
    )


def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def packed(text: str) -> str:
    """What the page's script unpacks: gzip, as base64."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


@cache
def _packed_plotly() -> str:
    return packed(get_plotlyjs())
