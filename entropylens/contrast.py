"""Two analyses against each other: how far a profile moves, layer by layer and at its boundaries.

The paper finds that further training has "limited impact on internal reasoning patterns" (B.1);
here that is a number with its interval. Two models are compared on their own responses, or, where
the same ones were read by both, on the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entropylens.boundaries import boundary_shifts
from entropylens.errors import AnalysisFilesError, SettingError
from entropylens.files import make_directory, write_text
from entropylens.quantities import DELTAS, prefix_of
from entropylens.resampling import (
    RELIABLE_PROMPTS,
    Difference,
    difference,
    prompt_sums,
)
from entropylens.results import Analysis

__all__ = ["Impact", "ModelContrast", "contrast", "impact_of"]

Array = NDArray[Any]


#: Share of draws that must have an impact, or there is no interval.
USABLE = 0.99


@dataclass(frozen=True)
class Impact:
    """How far the FFNs' profile of the second model lies from that of the first.

    Args:
        size: ||second - first|| / ||first|| over the layers, the sampling noise of both taken off
            where there are 3 prompts; NaN where nothing of the first is left then.
        low, high: its 95 % interval, prompts drawn anew; NaN where there are under 3.
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
        text: what both read: "the same responses", "own responses to the same problems", to
            "different problems", or how many are shared.
        num_prompts: of the smaller one.
        same_tokenizer: None where one of them did not say.
        frame: one row a quantity and layer: `quantity` (delta_layer, delta_attn, delta_ffn),
            `layer, first, second, difference, low, high` (nats, 95 %); empty where the models
            are of different depth.
        boundaries: one row a boundary: `boundary` (last exploring layer, last before
            convergence), `first, second` (layers; 0 is none), `shift` (second - first, in layers
            or, where the depths differ, in percent of depth: `unit`), `low, high` (95 %; NaN
            under 3 prompts); empty where a model has layers without an FFN.
        impact: over the layers with an FFN in both; None where the depths differ.
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

    def to_dict(self) -> dict[str, Any]:
        """All but `frame`, and the sentences; null for what there is not."""
        names = ("first", "second", "reading", "text", "num_prompts", "same_tokenizer")
        told: dict[str, Any] = {name: getattr(self, name) for name in names}
        told["impact"] = None if self.impact is None else _without_nan(asdict(self.impact))
        told["boundaries"] = list(map(_without_nan, self.boundaries.to_dict("records")))
        return told | {"sentences": self.sentences}

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
        else:
            told[0] += " they are of different depth, so no layer has a counterpart."
        for row in self.boundaries.to_dict("records"):
            span = ""
            if math.isfinite(row["low"]):
                span = f" ({row['low']:+.3g} to {row['high']:+.3g})"
            told.append(
                f"The {row['boundary']}: {_layer(row['first'])} and {_layer(row['second'])}, "
                f"a shift of {row['shift']:+.3g} {row['unit']}{span}."
            )
        if self.boundaries.empty:
            told.append("No boundaries: not every layer has an FFN in both.")
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
        write_text(path / "contrast.json", json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> ModelContrast:
        """Read what `save` wrote.

        Raises:
            AnalysisFilesError: there is none, or an unreadable one.
        """
        path = Path(directory)
        try:
            told = json.loads((path / "contrast.json").read_text(encoding="utf-8"))
            impact = told.pop("impact")
            if impact is not None:
                impact = {name: math.nan if it is None else it for name, it in impact.items()}
                impact = Impact(**impact | {"turned": tuple(impact["turned"])})
            frame, boundaries = (
                pd.read_csv(path / f"{name}.csv") for name in ("differences", "boundaries")
            )
            del told["sentences"]
            return cls(**told | {"frame": frame, "boundaries": boundaries, "impact": impact})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AnalysisFilesError(
                f"the comparison in {str(path)!r} cannot be read ({error})",
                "compare again: entropylens compare DIR DIR -o",
            ) from error


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
    frame = pd.DataFrame(
        columns=["quantity", "layer", "first", "second", "difference", "low", "high"]
    )
    impact = None
    unit = "problem_key" if all("problem_key" in it.responses for it in (first, second)) else None
    unit = unit or "prompt_id"
    if first.num_layers == second.num_layers:
        columns = [prefix_of(reading) + name for name in DELTAS]
        units = sorted(_keys(first, unit) | _keys(second, unit))
        sums = [
            prompt_sums(it.responses, columns, unit=unit, units=units) for it in (first, second)
        ]
        found = difference(*sums, seed=seed)
        frame = _frame(columns, found)
        impact = impact_of(found, columns.index(prefix_of(reading) + "delta_ffn"))
    tokenizers = [it.settings.get("tokenizer") for it in (first, second)]
    return ModelContrast(
        first=one,
        second=other,
        reading=reading,
        text=_text(first, second, unit),
        num_prompts=min(first.num_prompts, second.num_prompts),
        same_tokenizer=None if None in tokenizers else tokenizers[0] == tokenizers[1],
        frame=frame,
        boundaries=boundary_shifts(first, second, reading, seed),
        impact=impact,
    )


def _keys(analysis: Analysis, column: str) -> frozenset[str]:
    return frozenset(analysis.responses.get(column, pd.Series(dtype=str)))


def _text(first: Analysis, second: Analysis, unit: str) -> str:
    keys = _keys(first, "response_key")
    if keys and keys == _keys(second, "response_key"):
        return "the same responses"
    asked = [_keys(it, unit) for it in (first, second)]
    shared = len(asked[0] & asked[1])
    if asked[0] == asked[1]:
        return "own responses to the same problems"
    if shared == 0:
        return "own responses to different problems"
    return f"own responses to problems of which {shared} are shared"


def _frame(columns: list[str], found: Difference) -> pd.DataFrame:
    layers = np.arange(1, len(found.means) + 1)
    parts = [
        pd.DataFrame(
            {
                "quantity": column,
                "layer": layers,
                "first": found.base[:, place],
                "second": found.base[:, place] + found.means[:, place],
                "difference": found.means[:, place],
                "low": found.low[:, place],
                "high": found.high[:, place],
            }
        )
        for place, column in enumerate(columns)
    ]
    return pd.concat(parts, ignore_index=True)


def impact_of(found: Difference, place: int) -> Impact | None:
    """How far a profile moved, against its own size; None where no layer has it in both.

    Args:
        found: of the two.
        place: of the profile among the K.
    """
    there = np.isfinite(found.means[:, place])
    if not there.any():
        return None
    before, moved = found.base[there, place], found.means[there, place]
    low = high = math.nan
    moved_noise = base_noise = 0.0
    if np.isfinite(found.low[there, place]).all():
        moved_noise = float(np.sum(found.errors[there, place] ** 2))
        base_noise = float(np.sum(found.base_errors[there, place] ** 2))
        # A draw has the sampling noise twice: once as drawn, once as what it is drawn from.
        drawn = _ratio(
            np.sum(found.drawn[:, there, place] ** 2, axis=1) - 2 * moved_noise,
            np.sum(found.base_drawn[:, there, place] ** 2, axis=1) - 2 * base_noise,
        )
        if np.isfinite(drawn).mean() >= USABLE:
            low, high = np.nanquantile(drawn, [0.025, 0.975])
    size = _ratio(np.sum(moved**2) - moved_noise, np.sum(before**2) - base_noise)
    after = before + moved
    turned = np.flatnonzero(there)[np.sign(before) != np.sign(after)] + 1
    return Impact(
        size=float(size),
        low=float(low),
        high=float(high),
        correlation=_correlation(before, after),
        turned=tuple(turned.tolist()),
    )


def _ratio(square: Array, base: Array) -> Array:
    """sqrt(square / base), 0 where noise has eaten the one and NaN where it has the other."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = np.sqrt(np.clip(square, 0, None) / np.where(base > 0, base, np.nan))
    return ratio


def _correlation(one: Array, other: Array) -> float:
    if len(one) < 2 or not np.std(one) or not np.std(other):
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def _layer(layer: int) -> str:
    return "none" if layer == 0 else f"layer {layer}"


def _without_nan(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }
