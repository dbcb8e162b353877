"""Pieces of HTML that several pages have."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["download", "settings_list", "table"]


def table(frame: pd.DataFrame) -> str:
    """A table that the page's script makes sortable."""
    shown = frame.to_html(
        index=False, border=0, na_rep="", float_format=lambda value: f"{value:.5g}"
    )
    return f'<div class="wide" tabindex="0" role="region" aria-label="Table">{shown}</div>'


def download(file: str) -> str:
    """A button that saves one of the page's tables."""
    return f'<p><button data-file="{html.escape(file)}">download {html.escape(file)}</button></p>'


def settings_list(analysis: Analysis) -> str:
    """How an analysis was made: what it is of, every setting, every version."""
    content = analysis.to_dict()
    told = {"recommendation", "stages", "tasks", "tasks_agree", "settings", "versions"}
    facts = {name: value for name, value in content.items() if name not in told}
    return (
        f"{_facts_list(facts)}<h3>How it was run</h3>{_facts_list(content['settings'])}"
        f"<h3>Versions</h3>{_facts_list(content['versions'])}"
    )


def _facts_list(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(_text(value))}</dd>"
        for name, value in facts.items()
    )
    return f"<dl>{rows}</dl>"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
