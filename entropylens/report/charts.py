"""The page's charts: analyses in, a Plotly figure out; of one model by module, of several by model.

Each trace carries its layers as customdata, and traces that belong together share a legend group:
the page's script reads both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from entropylens.plots.marks import MIXERS
from entropylens.plots.style import ATTN, FFN, STREAM, model_colors
from entropylens.quantities import prefix_of

if TYPE_CHECKING:
    from entropylens.contrast import ModelContrast
    from entropylens.results import Analysis

__all__ = ["Chart", "charts_of", "difference_chart"]

#: Light enough to leave lines readable on a dark and on a light ground.
_SHADES = {
    "exploration": "rgba(230,159,0,.2)",
    "integration": "rgba(150,150,150,.12)",
    "convergence": "rgba(0,114,178,.18)",
}
_GREY = "#949494"
_HEIGHTS = {1: 380, 2: 520, 3: 700}
#: Room between panels, as a share of the figure.
_BETWEEN = 0.06


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Args:
        name: in the page's addresses.
        title: above it.
        caption: what it shows.
        figure: for Plotly.
    """

    name: str
    title: str
    caption: str
    figure: go.Figure


def charts_of(models: Mapping[str, Analysis]) -> list[Chart]:
    """All charts, for each reading that was measured (all models have the same).

    Args:
        models: by the name that the page gives each.
    """
    first = next(iter(models.values()))
    found = []
    for reading in first.readings:
        named = "" if len(first.readings) == 1 else f", {reading} reading"
        tag = prefix_of(reading)
        found += [
            Chart(
                f"{tag}change",
                f"Entropy change of attention and FFN{named}",
                "How much entropy each module adds or takes, with 95 % bands (Fig. 3). "
                + _under_change(models, reading),
                _change(models, reading),
            ),
            Chart(
                f"{tag}flow",
                f"Policy entropy along depth{named}",
                "Entropy of the policy of every layer, and the model's own at the end (Fig. 2).",
                _flow(models, reading),
            ),
        ]
    found.append(
        Chart(
            "cosine",
            "Residual cosine similarity",
            "What each module writes against the stream it is added to: below zero it suppresses "
            "features, near zero it writes new ones (Fig. 8).",
            _panels(models, {"cos_attn": "attention", "cos_ffn": "FFN"}),
        )
    )
    prefix = prefix_of(first.readings[0])
    found.append(
        Chart(
            "trainability",
            "How well each layer's policy knows the text",
            "NLL of the produced token under pi_l, and how often its top token is the model's.",
            _panels(
                models,
                {f"{prefix}nll_layer": "NLL (nats)", f"{prefix}agree_layer": "top token agrees"},
            ),
        )
    )
    found.append(
        Chart(
            "scale",
            "RMS of the states",
            "Raw entropy depends on the scale of the state that it is read from.",
            _panels(models, {"rms_layer": "H^l", "rms_attn": "A^l", "rms_ffn": "F^l"}, log=True),
        )
    )
    return found


def difference_chart(contrasts: Sequence[ModelContrast], names: Sequence[str]) -> Chart:
    """Per-layer differences of each model to the first, with 95 % bands.

    Args:
        contrasts: of one reading, and of models of one depth.
        names: all models of the page, which share their colours.
    """
    reading = contrasts[0].reading
    figure, colors = go.Figure(), model_colors(names)
    panels = {"attn": "attention", "ffn": "FFN", "layer": "layer"}
    for contrast in contrasts:
        for row, module in enumerate(panels, start=1):
            quantity = f"{prefix_of(reading)}delta_{module}"
            frame = contrast.frame[contrast.frame["quantity"] == quantity]
            label = f"{contrast.second} - {contrast.first}"
            color = colors[contrast.second]
            layers = frame["layer"].to_numpy()
            _band(figure, row, label, layers, frame["low"], frame["high"], color)
            _line(
                figure, row, label, layers, layers, frame["difference"], color,
                shown=row == 1, told=f"{label} {quantity}",
            )  # fmt: skip
    _finish(figure, [f"{name} (nats)" for name in panels.values()], "layer", unified=True)
    return Chart(
        f"{prefix_of(reading)}difference",
        f"Differences layer by layer, {reading} reading",
        "Entropy changes, less those of the first model, with 95 % bands over prompts.",
        figure,
    )


def _under_change(models: Mapping[str, Analysis], reading: str) -> str:
    if len(models) > 1:
        return "One colour a model."
    control = "" if reading == "normed" else " Dashed grey: random vectors of the same norms."
    return f"Shades: exploration (orange), integration (grey), convergence (blue).{control}"


def _change(models: Mapping[str, Analysis], reading: str) -> go.Figure:
    prefix, alone = prefix_of(reading), len(models) == 1
    figure = go.Figure()
    colors = model_colors(list(models))
    for name, analysis in models.items():
        frame, depth = analysis.layers, _depth(models, analysis)
        for row, module in enumerate(("attn", "ffn"), start=1):
            column = f"{prefix}delta_{module}"
            color = colors[name] if not alone else ATTN if module == "attn" else FFN
            label = name if not alone else "attention" if module == "attn" else "FFN"
            control = f"control_{column}"
            if alone and control in frame:
                _column(
                    figure, row, "same norms", models, name, control, _GREY, dash="dash",
                    shown=row == 1,
                )  # fmt: skip
            _band(figure, row, label, depth, frame[f"{column}_low"], frame[f"{column}_high"], color)
            _column(figure, row, label, models, name, column, color, shown=alone or row == 1)
    if alone:
        (analysis,) = models.values()
        _shade_stages(figure, analysis, reading, 2)
    titles = [f"ΔH {module} (nats)" for module in ("attention", "FFN")]
    _finish(figure, titles, *_axis_of(models))
    return figure


def _flow(models: Mapping[str, Analysis], reading: str) -> go.Figure:
    prefix, alone = prefix_of(reading), len(models) == 1
    figure = go.Figure()
    colors = model_colors(list(models))
    for name, analysis in models.items():
        frame, depth = analysis.layers, _depth(models, analysis)
        layers = frame["layer"].to_numpy()
        stream = frame[f"{prefix}entropy_layer"]
        if alone:
            sites = (("attn", "A^l (attention)", ATTN, 2 / 3), ("ffn", "F^l (FFN)", FFN, 1 / 3))
            for module, label, color, before in sites:
                column = f"{prefix}entropy_{module}"
                _column(
                    figure, 1, label, models, name, column, color, before=before, mode="markers"
                )
        start = stream.iloc[0] - frame[f"{prefix}delta_layer"].iloc[0]
        _line(
            figure, 1, "H^l (layer)" if alone else name, [0.0, *depth], [0, *layers],
            [start, *stream], STREAM if alone else colors[name],
        )  # fmt: skip
        _line(
            figure, 1, "pi_theta" if alone else name, [depth[-1]], [analysis.num_layers],
            [analysis.policy_entropy], "#c44e9b" if alone else colors[name], mode="markers",
            symbol="star", shown=alone,
        )  # fmt: skip
    title, _ = _axis_of(models)
    _finish(figure, ["policy entropy (nats)"], title, unified=False)
    return figure


def _panels(
    models: Mapping[str, Analysis], columns: Mapping[str, str], *, log: bool = False
) -> go.Figure:
    """One panel a column, or all in one where there is one model and one unit."""
    alone = len(models) == 1
    together = alone and (log or all(name.startswith("cos") for name in columns))
    figure = go.Figure()
    colors = model_colors(list(models))
    by_module = {"attn": ATTN, "ffn": FFN, "layer": STREAM}
    for name in models:
        for row, (column, label) in enumerate(columns.items(), start=1):
            color = by_module[column.rsplit("_", 1)[1]] if alone else colors[name]
            _column(
                figure, 1 if together else row, label if alone else name, models, name, column,
                color, shown=alone or row == 1,
            )  # fmt: skip
    unit = "RMS" if log else "cosine similarity"
    _finish(figure, [unit] if together else list(columns.values()), *_axis_of(models))
    if log:
        figure.update_yaxes(type="log")
    return figure


def _depth(models: Mapping[str, Analysis], analysis: Analysis) -> Any:
    """[L] layers, or their share of depth where the models are of different depth."""
    layers = np.arange(1, analysis.num_layers + 1, dtype=float)
    return layers if _one_depth(models) else layers / analysis.num_layers


def _places(analysis: Analysis, column: str) -> list[str]:
    """[L] what a point is of: its layer, and a mixer that is no attention."""
    kinds = analysis.mixers if "attn" in column else ("attention",) * analysis.num_layers
    return [
        f"layer {layer}, {MIXERS[kind][2]}" if kind in MIXERS else f"layer {layer}"
        for layer, kind in enumerate(kinds, start=1)
    ]


def _one_depth(models: Mapping[str, Analysis]) -> bool:
    return len({analysis.num_layers for analysis in models.values()}) == 1


def _axis_of(models: Mapping[str, Analysis]) -> tuple[str, bool]:
    """The depth axis' title, and whether one hover label can tell all models."""
    return ("layer", True) if _one_depth(models) else ("layer / L", False)


def _column(
    figure: go.Figure,
    row: int,
    label: str,
    models: Mapping[str, Analysis],
    name: str,
    column: str,
    color: str,
    *,
    before: float = 0.0,
    **look: Any,
) -> None:
    """Draw a column of a model's layers, `before` layers to the left."""
    analysis = models[name]
    frame = analysis.layers
    told = column if len(models) == 1 else f"{name} {column}"
    _line(
        figure, row, label, _depth(models, analysis) - before, frame["layer"], frame[column], color,
        told=told, places=_places(analysis, column), **look,
    )  # fmt: skip


def _line(
    figure: go.Figure,
    row: int,
    name: str,
    x: Any,
    layers: Any,
    y: Any,
    color: str,
    *,
    mode: str = "lines+markers",
    dash: str | None = None,
    symbol: str | None = None,
    shown: bool = True,
    told: str | None = None,
    places: Sequence[str] | None = None,
) -> None:
    trace = go.Scatter(
        x=np.asarray(x, float).tolist(), y=_known(y), customdata=np.asarray(layers).tolist(),
        name=name, legendgroup=name, showlegend=shown, mode=mode, connectgaps=True,
        meta=told or name,
        line={"color": color, "dash": dash, "width": 1.8},
        marker={"color": color, "symbol": symbol, "size": 12 if symbol else 5},
        text=places or [f"layer {layer}" for layer in layers],
        hovertemplate="%{y:.4f} (%{text})",
    )  # fmt: skip
    figure.add_trace(trace.update(xaxis="x", yaxis=_y_axis(row)))


def _band(
    figure: go.Figure, row: int, name: str, x: Any, low: pd.Series, high: pd.Series, color: str
) -> None:
    there = np.isfinite(low.to_numpy(float)) & np.isfinite(high.to_numpy(float))
    if not there.any():
        return
    at, below, above = (np.asarray(it, float)[there] for it in (x, low, high))
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    trace = go.Scatter(
        x=[*at, *at[::-1]], y=[*above, *below[::-1]], fill="toself", mode="lines", name=name,
        legendgroup=name, showlegend=False, hoverinfo="skip", line={"width": 0},
        fillcolor=f"rgba({red},{green},{blue},.25)",
    )  # fmt: skip
    figure.add_trace(trace.update(xaxis="x", yaxis=_y_axis(row)))


def _known(values: Any) -> list[float | None]:
    return [float(it) if np.isfinite(it) else None for it in np.asarray(values, float)]


def _y_axis(row: int) -> str:
    """Panels stand below each other, from row 1 on, over one x axis."""
    return "y" if row == 1 else f"y{row}"


def _shade_stages(figure: go.Figure, analysis: Analysis, reading: str, row: int) -> None:
    found = analysis.recommendations[reading]
    place = {"xref": "x", "yref": f"{_y_axis(row)} domain", "y0": 0, "y1": 1, "layer": "below"}
    for name, shade in _SHADES.items():
        span = getattr(found.stages, name)
        if span is not None:
            figure.add_shape(
                type="rect", x0=span[0] - 0.5, x1=span[1] + 0.5, fillcolor=shade, line_width=0,
                **place,
            )  # fmt: skip
    if found.layer is not None:
        figure.add_shape(
            type="line", x0=found.layer, x1=found.layer, line={"dash": "dot", "color": _GREY},
            **place,
        )  # fmt: skip
        figure.add_annotation(
            x=found.layer, y=1, xref="x", yref=place["yref"], showarrow=False, yanchor="bottom",
            text=f"layer {found.layer} first",
        )  # fmt: skip


def _finish(figure: go.Figure, titles: Sequence[str], depth: str, unified: bool) -> None:
    """Lay out the panels, titled from top to bottom, over one axis of depth."""
    count = len(titles)
    each = (1 - _BETWEEN * (count - 1)) / count
    figure.update_layout(
        template="none", showlegend=False, height=_HEIGHTS[count], hoversubplots="axis",
        margin={"l": 62, "r": 14, "t": 20, "b": 44}, hoverdistance=-1,
        hovermode="x unified" if unified else "closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        dragmode="zoom", font={"family": "system-ui, sans-serif", "size": 12},
        xaxis={
            "title": {"text": depth}, "anchor": _y_axis(count), "showline": True,
            "zeroline": False, "automargin": True,
        },
    )  # fmt: skip
    for row, title in enumerate(titles, start=1):
        top = 1 - (row - 1) * (each + _BETWEEN)
        axis = {
            "title": {"text": title}, "domain": [max(0.0, top - each), top], "anchor": "x",
            "zeroline": True, "zerolinecolor": _GREY, "automargin": True,
        }  # fmt: skip
        figure.update_layout({f"yaxis{'' if row == 1 else row}": axis})
