"""One response token by token: layers down, tokens across, colour for a quantity, hover for more.

Plain HTML of its own, without a script: it works in a notebook and inside a page, without a
network. Which quantity gives the colour is chosen by radio buttons that its style sheet reads.
"""

from __future__ import annotations

import html
import string
from typing import TYPE_CHECKING, Any

import numpy as np

from entropylens.errors import SettingError
from entropylens.quantities import quantities_of
from entropylens.tokens import SHOWN

if TYPE_CHECKING:
    import pandas as pd

    from entropylens.results import Analysis

__all__ = ["TOP_TOKEN", "responses_shown", "token_view"]

#: Colour by how unsure pi_l is of its top token, and read these tokens.
TOP_TOKEN = "top_token"
#: Small to large, readable in grey: cividis in nine steps, light to dark.
_SHADES = (
    "#fee838", "#e1cc55", "#c3b369", "#a69d75", "#8a8678", "#717078", "#575c6d", "#35456c",
    "#00224e",
)  # fmt: skip
#: Below zero to above it, equally strong.
_SIGNED_SHADES = (
    "#b35806", "#e08214", "#fdb863", "#fee0b6", "#f7f7f7", "#d8daeb", "#b2abd2", "#8073ac",
    "#542788",
)  # fmt: skip
_STEPS = len(_SHADES)
_ALL = (*quantities_of("both"), TOP_TOKEN)
_LETTERS = string.ascii_letters
_SIGNED = ("delta", "step", "cos")

_STYLE = """
.token-view form{margin:0 0 .4em;font-size:13px}
.token-view label{margin-right:1em;white-space:nowrap}
.token-view .cells{overflow:auto;max-height:34em}
.token-view table{border-collapse:collapse;font:11px monospace}
.token-view th{position:sticky;left:0;top:0;background:Canvas;color:CanvasText;padding:0 4px;
font-weight:normal;white-space:pre}
.token-view td{width:1.6em;min-width:1.6em;height:1.2em;padding:0 2px;white-space:pre;
max-width:5em;overflow:hidden;color:#000;text-align:left}
.token-view .scale,.token-view td span{display:none}
.token-view .scale i{display:inline-block;width:1.2em;height:.8em}
"""


def responses_shown(analysis: Analysis) -> int:
    """How many responses have tokens to show."""
    return 0 if analysis.tokens is None else int(analysis.tokens["response_id"].nunique())


def token_view(
    analysis: Analysis,
    response: int = 1,
    quantity: str | None = None,
    *,
    most: int | None = SHOWN.positions,
) -> str:
    """A response as an HTML table: rows are layers from L down to 1, columns its tokens.

    Hovering a cell tells the token, every kept quantity, the top tokens of pi_l with their
    probabilities, and the produced token's rank.

    Args:
        analysis: its tokens are shown; what they are told is what was kept.
        response: which one of those kept, from 1.
        quantity: gives the colour at first, a kept one or `top_token`; by default the first kept.
        most: tokens to show; None for all.

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
    choices = [*known, *((TOP_TOKEN,) if "top_probs" in tokens else ())]
    responses = tokens["response_id"].unique()
    if not 1 <= response <= len(responses):
        raise SettingError(
            f"no response {response} among the kept ones", f"choose 1 to {len(responses)}"
        )
    shown = quantity or choices[0]
    if shown not in choices:
        raise SettingError(f"{shown!r} was not kept", f"choose one of {', '.join(choices)}")
    frame = tokens[tokens["response_id"] == responses[response - 1]]
    of_all = frame["position"].max()
    if most is not None:
        frame = frame[frame["position"] <= most]
    scales = [_Scale(name, frame) for name in choices]
    classes = [" ".join(each) for each in zip(*(scale.classes for scale in scales), strict=True)]
    records = frame.to_dict("records")
    words = [_on_one_line(_word(row)) for row in records if row["layer"] == 1]
    rows: dict[int, list[str]] = {}
    for row, shades in zip(records, classes, strict=True):
        rows.setdefault(row["layer"], []).append(_cell(row, shades, known))
    body = "".join(
        f"<tr><th>{layer}</th>{''.join(rows[layer])}</tr>" for layer in sorted(rows, reverse=True)
    )
    head = "".join(f"<th>{word}</th>" for word in words)
    cut = f", its first {len(words)} of {of_all} tokens" if len(words) < of_all else ""
    return (
        f'<div class="token-view"><style>{_STYLE}{"".join(scale.rules for scale in scales)}'
        f'</style><form method="dialog">response {response}{cut}; colour: '
        f"{''.join(scale.choice(shown) for scale in scales)}<br>"
        f"{''.join(scale.legend for scale in scales)}</form>"
        f'<div class="cells"><table><thead><tr><th>layer</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></div>"
    )


class _Scale:
    """One way to colour the cells: its classes `<letter><step>` and the rules that show them."""

    def __init__(self, name: str, frame: pd.DataFrame) -> None:
        # The same in every view of a page: what one's style sheet says holds for all of them.
        self.name, self.letter = name, _LETTERS[_ALL.index(name)]
        signed = any(part in _SIGNED for part in name.split("_"))
        self.shades = _SIGNED_SHADES if signed else _SHADES
        if name == TOP_TOKEN:  # sure ones are light, as those of low entropy
            values = 1 - np.array([row[0] for row in frame["top_probs"]], float)
        else:
            values = frame[name].to_numpy(float)
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
        if signed:
            high = max(abs(low), abs(high))
            low = -high
        self.low, self.high = low, high
        steps = np.floor((values - low) / ((high - low) or 1.0) * _STEPS)
        self.classes = [
            f"{self.letter}{int(min(step, _STEPS - 1))}" if np.isfinite(step) else ""
            for step in steps
        ]

    @property
    def _chosen(self) -> str:
        return f'.token-view:has(input[value="{self.name}"]:checked)'

    @property
    def rules(self) -> str:
        """What the style sheet says where this one is chosen."""
        lines = [f"{self._chosen} .scale-{self.letter}{{display:inline}}"]
        for step, shade in enumerate(self.shades):
            text = ";color:#fff" if _is_dark(shade) else ""
            lines.append(f"{self._chosen} .{self.letter}{step}{{background:{shade}{text}}}")
        if self.name == TOP_TOKEN:
            lines.append(f"{self._chosen} td span{{display:inline}}")
        return "\n".join(lines) + "\n"

    def choice(self, shown: str) -> str:
        """Its radio button."""
        checked = " checked" if self.name == shown else ""
        return (
            f'<label><input type="radio" name="colour" value="{self.name}"{checked}> '
            f"{self.name}</label>"
        )

    @property
    def legend(self) -> str:
        """What the colours mean, shown where this one is chosen."""
        what = "unsure of the top token" if self.name == TOP_TOKEN else self.name
        swatches = "".join(f'<i style="background:{shade}"></i>' for shade in self.shades)
        return (
            f'<span class="scale scale-{self.letter}">{what}: {self.low:.3g} {swatches} '
            f"{self.high:.3g}</span>"
        )


def _is_dark(shade: str) -> bool:
    """Whether white is read better on it than black, by their contrast (WCAG 2)."""
    parts = [int(shade[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (it / 12.92 if it <= 0.04 else ((it + 0.055) / 1.055) ** 2.4 for it in parts)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05


def _on_one_line(text: str) -> str:
    return html.escape(text.replace("\r", "\u240d").replace("\n", "\u21b5").replace("\t", "\u21e5"))


def _word(row: dict[Any, Any]) -> str:
    return str(row.get("token", row["token_id"]))


def _cell(row: dict[Any, Any], shades: str, known: list[str]) -> str:
    told = [f"layer {row['layer']}, position {row['position']}: {_word(row)!r}"]
    told += [f"{name} {row[name]:.4g}" for name in known]
    text = ""
    if "top_probs" in row:
        tops = list(map(str, row.get("top_tokens", row["top_token_ids"])))
        pairs = zip(tops, row["top_probs"], strict=True)
        told += [f"{place}. {top!r} {prob:.3f}" for place, (top, prob) in enumerate(pairs, 1)]
        told.append(f"rank of the produced token: {row['rank']}")
        text = f"<span>{_on_one_line(tops[0])}</span>"
    title = html.escape("\n".join(told), quote=True)
    return f'<td class="{shades}" title="{title}">{text}</td>'
