"""Two analyses against each other: how far a profile moves, layer by layer and at its boundaries.

The paper finds that further training has "limited impact on internal reasoning patterns" (B.1);
here that is a number with its interval. Two models are compared on their own responses, or, where
the same ones were read by both, on the same.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entropylens.errors import SettingError
from entropylens.files import make_directory, write_text
from entropylens.quantities import DELTAS, prefix_of
from entropylens.resampling import RELIABLE_PROMPTS, Difference, difference, prompt_sums
from entropylens.results import Analysis
from entropylens.stages import cut_weights

__all__ = ["Impact", "ModelContrast", "contrast", "impact_of"]

Array = NDArray[Any]

#: Resamples whose cuts are weighed for the shift of a boundary.
CUT_RESAMPLES = 400


@dataclass(frozen=True)
class Impact:
    """How far the FFNs' profile of the second model lies from that of the first.

    Args:
        size: ||second - first|| / ||first|| over the layers, sampling noise taken off.
        low, high: its 95 % interval; NaN under 3 prompts.
        correlation: of the two profiles over layers.
        turned: layers whose change has the other sign.
    """

    size: float
    low: float
    high: float
    correlation: float
    turned: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ModelContrast:
    """The second analysis less the first, in one reading.

    Args:
        first, second: names.
        reading: raw | normed.
        text: what both read: "the same responses", "own responses to the same prompts" or
            "own responses to different prompts".
        num_prompts: of the smaller one.
        same_tokenizer: None where one of them did not say.
        frame: one row a quantity and layer: `quantity` (delta_layer, delta_attn, delta_ffn),
            `layer, first, second, difference, low, high` (nats, 95 %); empty where the models
            are of different depth.
        boundaries: one row a boundary: `boundary` (last exploring layer, last before
            convergence), `first, second` (layers; 0 is none), `shift` (second - first, in layers
            or, where the depths differ, in percent of depth: `unit`), `low, high` (95 %).
        impact: None where the models are of different depth, or have layers without an FFN.
    """

    first: str
    second: str
    reading: str
    text: str
    num_prompts: int
    same_tokenizer: bool | None
    frame: pd.DataFrame
    boundaries: pd.DataFrame
    impact: Impact | None

    def to_frame(self) -> pd.DataFrame:
        """`frame`."""
        return self.frame

    @property
    def sentences(self) -> tuple[str, ...]:
        """The same in words, and what it does not say."""
        told = [f"{self.second} against {self.first}, {self.reading} reading, on {self.text}:"]
        if self.impact is not None:
            found = self.impact
            span = ""
            if math.isfinite(found.low):
                span = f" ({found.low:.1%} to {found.high:.1%})"
            told[0] += (
                f" the FFNs' entropy changes move by {found.size:.1%} of their size{span}; "
                f"correlation {found.correlation:.3f}, other sign in {len(found.turned)} layers"
                f"{f' {list(found.turned)}' if found.turned else ''}."
            )
        elif self.frame.empty:
            told[0] += " they are of different depth, so no layer has a counterpart."
        else:
            told[0] += " not every layer has an FFN, so there is no profile to compare."
        for row in self.boundaries.to_dict("records"):
            told.append(
                f"The {row['boundary']}: {_layer(row['first'])} and {_layer(row['second'])}, "
                f"a shift of {row['shift']:+.3g} {row['unit']} ({row['low']:+.3g} to "
                f"{row['high']:+.3g})."
            )
        if self.num_prompts < RELIABLE_PROMPTS:
            told.append(
                f"{self.num_prompts} prompts are too few for these intervals: take at least "
                f"{RELIABLE_PROMPTS}."
            )
        if self.text == "the same responses" and self.same_tokenizer is False:
            told.append(
                "Their tokenizers differ: the same token ids are not the same text to both."
            )
        return tuple(told)

    def save(self, directory: str | Path) -> None:
        """Write differences.csv, boundaries.csv and contrast.json.

        Raises:
            OutputDirectoryError: the directory cannot be written.
        """
        path = make_directory(Path(directory))
        frames = {"differences": self.frame, "boundaries": self.boundaries}
        for name, frame in frames.items():
            write_text(path / f"{name}.csv", frame.to_csv(index=False))
        names = ("first", "second", "reading", "text", "num_prompts", "same_tokenizer")
        told: dict[str, Any] = {name: getattr(self, name) for name in names}
        told["impact"] = None if self.impact is None else _without_nan(asdict(self.impact))
        told["sentences"] = self.sentences
        write_text(path / "contrast.json", json.dumps(told, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> ModelContrast:
        """Read what `save` wrote."""
        path = Path(directory)
        told = json.loads((path / "contrast.json").read_text(encoding="utf-8"))
        del told["sentences"]
        impact = told.pop("impact")
        if impact is not None:
            ends = {name: math.nan for name in ("low", "high") if impact[name] is None}
            impact = Impact(**impact | ends | {"turned": tuple(impact["turned"])})
        frame, boundaries = (
            pd.read_csv(path / f"{name}.csv") for name in ("differences", "boundaries")
        )
        return cls(**told, frame=frame, boundaries=boundaries, impact=impact)


def contrast(
    first: Analysis,
    second: Analysis,
    names: tuple[str, str] | None = None,
    *,
    reading: str | None = None,
    seed: int = 0,
) -> ModelContrast:
    """How the second analysis differs from the first.

    Args:
        first, second: of any two models, or of one model on two texts.
        names: what to call them; by default their models.
        reading: by default raw where it was measured.
        seed: of the resamples. Prompts that both have are drawn together.

    Raises:
        SettingError: a reading that one of them lacks.
    """
    reading = reading or first.readings[0]
    for analysis in (first, second):
        if reading not in analysis.readings:
            raise SettingError(
                f"{analysis.model!r} was not measured in the {reading} reading",
                "analyze both with the same --reading",
            )
    one, other = names or (first.model, second.model)
    shared = _keys(first, "prompt_id") == _keys(second, "prompt_id")
    frame = pd.DataFrame(
        columns=["quantity", "layer", "first", "second", "difference", "low", "high"]
    )
    impact = None
    if first.num_layers == second.num_layers:
        columns = [prefix_of(reading) + name for name in DELTAS]
        sums = [prompt_sums(it.responses, columns) for it in (first, second)]
        found = difference(*sums, paired=shared, seed=seed)
        frame = _frame(columns, [it.means() for it in sums], found)
        place = columns.index(prefix_of(reading) + "delta_ffn")
        impact = impact_of(sums[0].means(), found, place)
    tokenizers = [it.settings.get("tokenizer") for it in (first, second)]
    return ModelContrast(
        first=one,
        second=other,
        reading=reading,
        text=_text(first, second, shared),
        num_prompts=min(first.num_prompts, second.num_prompts),
        same_tokenizer=None if None in tokenizers else tokenizers[0] == tokenizers[1],
        frame=frame,
        boundaries=_boundaries(first, second, reading, seed),
        impact=impact,
    )


def _keys(analysis: Analysis, column: str) -> frozenset[str]:
    return frozenset(analysis.responses.get(column, pd.Series(dtype=str)))


def _text(first: Analysis, second: Analysis, shared: bool) -> str:
    keys = _keys(first, "response_key")
    if keys and keys == _keys(second, "response_key"):
        return "the same responses"
    return f"own responses to {'the same' if shared else 'different'} prompts"


def _frame(columns: list[str], means: list[Array], found: Difference) -> pd.DataFrame:
    layers = np.arange(1, len(found.means) + 1)
    parts = [
        pd.DataFrame(
            {
                "quantity": column,
                "layer": layers,
                "first": means[0][:, place],
                "second": means[1][:, place],
                "difference": found.means[:, place],
                "low": found.low[:, place],
                "high": found.high[:, place],
            }
        )
        for place, column in enumerate(columns)
    ]
    return pd.concat(parts, ignore_index=True)


def impact_of(base: Array, found: Difference, place: int) -> Impact | None:
    """How far a profile moved, against its own size; None where a layer has no value.

    Args:
        base: [L, K] means of the first.
        found: the second's difference to it.
        place: of the profile among the K.
    """
    before, moved = base[:, place], found.means[:, place]
    if not np.isfinite(before + moved).all():
        return None
    noise = float(np.sum(found.errors[:, place] ** 2))
    size = float(np.linalg.norm(before)) or math.nan
    low = high = math.nan
    if np.isfinite(found.low[:, place]).all():
        # A draw has the sampling noise twice: once as drawn, once as what it is drawn from.
        drawn = np.sum(found.drawn[..., place] ** 2, axis=1) - 2 * noise
        low, high = np.quantile(np.sqrt(np.clip(drawn, 0, None)) / size, [0.025, 0.975])
    else:
        noise = 0.0
    after = before + moved
    turned = np.flatnonzero(np.sign(before) != np.sign(after)) + 1
    together = np.corrcoef(before, after)[0, 1] if len(before) > 1 else math.nan
    return Impact(
        size=math.sqrt(max(0.0, float(np.sum(moved**2)) - noise)) / size,
        low=float(low),
        high=float(high),
        correlation=float(together),
        turned=tuple(turned.tolist()),
    )


def _boundaries(first: Analysis, second: Analysis, reading: str, seed: int) -> pd.DataFrame:
    """Where exploration and integration end, and how far that shifts."""
    columns = ["boundary", "first", "second", "shift", "low", "high", "unit"]
    shares = [_cut_shares(analysis, reading, seed) for analysis in (first, second)]
    if any(it is None for it in shares):
        return pd.DataFrame(columns=columns)
    one, other = [it for it in shares if it is not None]
    stages = [analysis.recommendations[reading].stages for analysis in (first, second)]
    ends = [
        (
            0 if it.exploration is None else it.exploration[1],
            analysis.num_layers if it.convergence is None else it.convergence[0] - 1,
        )
        for it, analysis in zip(stages, (first, second), strict=True)
    ]
    scales, unit = (1.0, 1.0), "layers"
    if first.num_layers != second.num_layers:
        scales, unit = (100 / first.num_layers, 100 / second.num_layers), "% of depth"
    names = ("last exploring layer", "last layer before convergence")
    rows = []
    for place, name in enumerate(names):
        low, high = _shift_interval(one[place], other[place], scales)
        before, after = ends[0][place], ends[1][place]
        shift = after * scales[1] - before * scales[0]
        rows.append((name, before, after, shift, low, high, unit))
    return pd.DataFrame(rows, columns=columns)


def _cut_shares(analysis: Analysis, reading: str, seed: int) -> tuple[Array, Array] | None:
    """Probability of each place of the two cuts, over prompts drawn anew and the fit's weights."""
    profile = analysis.profile(reading)
    if not np.isfinite(profile.means).all():
        return None
    weights = cut_weights(profile.resampled(CUT_RESAMPLES, seed), profile.errors()).mean(0)
    return weights.sum(1), weights.sum(0)


def _shift_interval(
    first: Array, second: Array, scales: tuple[float, float]
) -> tuple[float, float]:
    """95 % of second - first, as if the two were independent (shared prompts make it narrower)."""
    before, after = np.arange(len(first)) * scales[0], np.arange(len(second)) * scales[1]
    shift = (after[None, :] - before[:, None]).ravel()
    weight = (first[:, None] * second[None, :]).ravel()
    order = np.argsort(shift)
    total = np.cumsum(weight[order])
    low, high = (
        shift[order][min(len(order) - 1, int(np.searchsorted(total, level)))]
        for level in (0.025, 0.975)
    )
    return float(low), float(high)


def _layer(layer: int) -> str:
    return "none" if layer == 0 else f"layer {layer}"


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }
