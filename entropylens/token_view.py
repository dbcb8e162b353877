"""One response token by token: layers down, tokens across, colour for a quantity, hover for more.

Plain HTML of its own: it works in a notebook and inside a page, without a network.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from entropylens.errors import SettingError
from entropylens.quantities import quantities_of

if TYPE_CHECKING:
    import pandas as pd

    from entropylens.results import Analysis

__all__ = ["token_view"]

#: Tokens shown of a response.
MOST_TOKENS = 256
#: Light to dark, readable in grey: cividis in nine steps.
_SHADES = (
    "#fee838", "#e1cc55", "#c3b369", "#a69d75", "#8a8678", "#717078", "#575c6d", "#35456c",
    "#00224e",
)  # fmt: skip


def token_view(
    analysis: Analysis, response: int = 1, quantity: str | None = None, *, most: int = MOST_TOKENS
) -> str:
    """A response as an HTML table: rows are layers from L down to 1, columns its tokens.

    Hovering a cell tells the token, every kept quantity, the top tokens of pi_l with their
    probabilities, and the produced token's rank among them.

    Args:
        analysis: measured with `keep_tokens`, and `top_tokens` for what hovering tells.
        response: which one, from 1.
        quantity: a kept one that gives the colour, or `top_token` to read the top tokens; by
            default the first kept.
        most: tokens to show.

    Raises:
        SettingError: no tokens were kept, no such response, or no such quantity.
    """
    tokens = analysis.tokens
    if tokens is None:
        raise SettingError(
            "this analysis kept no tokens",
            "analyze with keep_tokens=['entropy_layer'], top_tokens=5",
        )
    known = [name for name in quantities_of(analysis.reading) if name in tokens]
    responses = tokens["response_id"].unique()
    if not 1 <= response <= len(responses):
        raise SettingError(
            f"no response {response} among the kept ones", f"choose 1 to {len(responses)}"
        )
    shown: str = quantity or (known[0] if known else "top_token")
    if shown not in (*known, *(("top_token",) if "top_probs" in tokens else ())):
        raise SettingError(
            f"{shown!r} was not kept", f"choose one of {', '.join(known) or 'top_token'}"
        )
    frame = tokens[tokens["response_id"] == responses[response - 1]]
    frame = frame[frame["position"] <= most]
    colours = _shades(frame, shown)
    produced = frame[frame["layer"] == 1]
    words = [_word(row) for row in produced.to_dict("records")]
    head = "".join(f"<th>{_on_one_line(word)}</th>" for word in words)
    rows = []
    for layer in sorted(frame["layer"].unique(), reverse=True):
        those = frame[frame["layer"] == layer]
        cells = "".join(
            _cell(row, colours[index], shown, known)
            for index, row in zip(those.index, those.to_dict("records"), strict=True)
        )
        rows.append(f"<tr><th>{layer}</th>{cells}</tr>")
    cut = "" if len(words) < most else f", the first {most} tokens"
    legend = f"response {response}{cut}; colour: {shown}"
    if shown != "top_token":
        values = frame[shown]
        legend += f", {values.min():.3g} (light) to {values.max():.3g} (dark)"
    return (
        '<div class="token-view" style="overflow:auto;max-height:32em">'
        "<style>.token-view table{border-collapse:collapse;font:11px monospace}"
        ".token-view th{position:sticky;left:0;top:0;background:Canvas;padding:0 4px;"
        "font-weight:normal;white-space:pre}"
        ".token-view td{width:1.6em;min-width:1.6em;height:1.2em;"
        "padding:0 2px;white-space:pre;max-width:5em;overflow:hidden}</style>"
        f"<table><caption style='text-align:left'>{html.escape(legend)}</caption>"
        f"<thead><tr><th>layer</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shades(frame: pd.DataFrame, quantity: str) -> dict[Any, str]:
    if quantity == "top_token":
        values = frame["top_probs"].map(lambda it: float(it[0]))
        values = 1 - values  # sure ones are light, as those of low entropy
    else:
        values = frame[quantity].astype(float)
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    span = (high - low) or 1.0
    return {
        index: "#ffffff"
        if not math.isfinite(value)
        else _SHADES[min(len(_SHADES) - 1, int((value - low) / span * len(_SHADES)))]
        for index, value in values.items()
    }


def _on_one_line(text: str) -> str:
    return html.escape(text.replace("\r", "\u240d").replace("\n", "\u21b5").replace("\t", "\u21e5"))


def _word(row: dict[Any, Any]) -> str:
    return str(row.get("token", row["token_id"]))


def _cell(row: dict[Any, Any], shade: str, quantity: str, known: list[str]) -> str:
    told = [f"layer {row['layer']}, position {row['position']}: {_word(row)!r}"]
    told += [f"{name} {row[name]:.4g}" for name in known]
    text = ""
    if "top_probs" in row:
        ids = [int(it) for it in row["top_token_ids"]]
        tops = list(map(str, row.get("top_tokens", ids)))
        pairs = zip(tops, row["top_probs"], strict=True)
        told += [f"{place}. {top!r} {prob:.3f}" for place, (top, prob) in enumerate(pairs, 1)]
        rank = ids.index(row["token_id"]) + 1 if row["token_id"] in ids else None
        told.append(f"rank of the produced token: {rank or f'over {len(ids)}'}")
        if quantity == "top_token":
            text = tops[0]
    dark = shade in _SHADES[4:]
    colour = f"background:{shade};color:{'#fff' if dark else '#000'}"
    title = html.escape("\n".join(told), quote=True)
    return f'<td style="{colour}" title="{title}">{_on_one_line(text)}</td>'
