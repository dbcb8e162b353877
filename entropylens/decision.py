"""Decision: a recommendation, whether it is sure enough, and all that it rests on."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from entropylens.errors import AnalysisFilesError
from entropylens.files import make_directory, write_text
from entropylens.looks import FIRST_LOOK, Look
from entropylens.profile import Profile, floor_of
from entropylens.quantities import prefix_of
from entropylens.recommend import Alternative, Recommendation
from entropylens.resampling import RESAMPLES, prompt_sums
from entropylens.stages import STAGES, Stages

__all__ = ["FILE_NAME", "SCHEMA_VERSION", "Decision", "profile_of"]

SCHEMA_VERSION = 1
FILE_NAME = "recommendation.json"


@dataclass(frozen=True, eq=False, repr=False)
class Decision:
    """The layer to train first, read from the FFNs alone, and whether that is sure.

    Args:
        recommendation: the answer: of the raw reading, unless only the normed one was asked for.
        decided: whether it is as sure as was asked for; None where nothing was asked.
        until_sure: how probable the answer had to be, or None.
        looks: one row a look, with the fields of `looks.Look`.
        readings: the recommendation of each reading made; where the raw one says nothing, the
            normed one stands beside it, made on fewer positions.
        measured: what each reading's rests on: one row a response and layer, as
            `FFNMeter.measure` gives it.
        positions: of each reading, how many positions of a response were read at most; None for
            all.
        products: products of a state with E_u, as a share of those that `analyze` would need for
            all `num_prompts` (in its raw reading).
        num_prompts: at hand, looked at or not.
        model, revision, num_layers, vocab_size, dtype, kernel, seed, versions: as of an Analysis.
        settings: what else was chosen.
    """

    recommendation: Recommendation
    decided: bool | None
    until_sure: float | None
    looks: pd.DataFrame
    readings: Mapping[str, Recommendation]
    measured: Mapping[str, pd.DataFrame]
    positions: Mapping[str, int | None]
    products: float
    num_prompts: int
    model: str
    revision: str | None
    num_layers: int
    vocab_size: int
    dtype: str
    kernel: str
    seed: int
    versions: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layer(self) -> int | None:
        """The recommended layer, decided or not."""
        return self.recommendation.layer

    @property
    def prompts(self) -> int:
        """Prompts looked at."""
        return int(self.measured[self.recommendation.reading]["prompt_id"].nunique())

    @property
    def sentence(self) -> str:
        """What was decided, in plain words."""
        seen = f"{self.prompts} of {self.num_prompts} prompts"
        cost = f"{self.products:.1%} of the products of a full analysis"
        if self.decided is None:
            return f"Read on {seen}, with {cost}."
        if self.decided and math.isnan(float(self.looks["stability"].iloc[-1])):
            return f"Decided after {seen}, with {cost}: no prompt could change it."
        if self.decided:
            return (
                f"Decided after {seen}, with {cost}: {_named(self.layer)}, at least "
                f"{self.until_sure:g} sure."
            )
        others = [f"{_named(it.layer)} {it.share:.0%}" for it in self.recommendation.alternatives]
        stability = self.recommendation.stability
        share = "" if stability is None else f", {stability:.0%}"
        rest = f" (then {', '.join(others)})" if others else ""
        return (
            f"Undecided after {seen}, with {cost}; so far: {_named(self.layer)}{share}{rest}, not "
            f"{self.until_sure:g} sure. {self.open_question}"
        )

    @property
    def open_question(self) -> str:
        """Why it is undecided; empty where it is not."""
        if self.decided is not False:
            return ""
        last = self.looks.iloc[-1]
        if self.prompts < FIRST_LOOK:
            return f"Fewer than {FIRST_LOOK} prompts decide nothing: give more."
        if last["agreement"] >= last["bound"]:
            return (
                "Other prompts would say the same; open is where exploration ends in a profile "
                "that is gradual in itself."
            )
        needed = self.recommendation.prompts_needed
        enough = f": about {needed} would do" if needed is not None else ""
        return (
            f"Open is what other prompts would say ({last['agreement']:.0%} of resamples name "
            f"this, {last['bound']:.1%} must){enough}."
        )

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer: token means of what was read, and 95 % intervals of the changes."""
        frame = pd.DataFrame({"layer": range(1, self.num_layers + 1)})
        for reading, rows in self.measured.items():
            names = [name for name in rows.columns if name.endswith("delta_ffn")]
            sums = prompt_sums(rows, names)
            frame[names] = sums.means()
            low, high = sums.draw(RESAMPLES, self.seed).studentised()
            name, widest = f"{prefix_of(reading)}delta_ffn", math.log(self.vocab_size)
            place = names.index(name)
            frame[f"{name}_low"] = low[:, place].clip(-widest, widest)
            frame[f"{name}_high"] = high[:, place].clip(-widest, widest)
        return frame

    def to_frame(self) -> pd.DataFrame:
        """The same as `layers`."""
        return self.layers

    def profile(self, reading: str | None = None) -> Profile:
        """The FFNs' entropy changes with their errors, as the rule reads them."""
        reading = reading or self.recommendation.reading
        return profile_of(self.measured[reading], reading, self.dtype)

    def __repr__(self) -> str:
        answer = {None: "", True: "decided, ", False: "undecided, "}[self.decided]
        return (
            f"<Decision on {self.model}: {answer}{self.prompts} of {self.num_prompts} prompts; "
            f"train first: {_named(self.layer)}>"
        )

    def _repr_html_(self) -> str:
        from entropylens.html_view import recommendation_html

        answers = "".join(map(recommendation_html, self.readings.values()))
        return f"<div>{html.escape(self.sentence)}{answers}</div>"

    def to_dict(self) -> dict[str, Any]:
        """What recommendation.json holds."""
        answer = {None: "read", True: "decided", False: "undecided"}[self.decided]
        return {
            "schema_version": SCHEMA_VERSION,
            "answer": answer,
            "decided": self.decided,
            "until_sure": self.until_sure,
            "sentence": self.sentence,
            **_recommendation_dict(self.recommendation),
            "readings": {name: _recommendation_dict(it) for name, it in self.readings.items()},
            "looks": [_plain(row) for row in self.looks.to_dict("records")],
            "products": self.products,
            "positions": dict(self.positions),
            "prompts_at_hand": self.num_prompts,
            "model": self.model,
            "revision": self.revision,
            "num_layers": self.num_layers,
            "vocab_size": self.vocab_size,
            "dtype": self.dtype,
            "kernel": self.kernel,
            "seed": self.seed,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    def save(self, directory: str | Path) -> None:
        """Write recommendation.json, with what every response says, whole.

        Raises:
            OutputDirectoryError: the directory cannot be written.
        """
        path = make_directory(Path(directory))
        content = self.to_dict()
        content["measured"] = {name: _records(rows) for name, rows in self.measured.items()}
        write_text(path / FILE_NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> Decision:
        """Read what `save` wrote.

        Raises:
            AnalysisFilesError: none, an unreadable one, or one of a newer version.
        """
        path = Path(directory) / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["schema_version"]
            if version > SCHEMA_VERSION:
                raise AnalysisFilesError(
                    f"{str(path)!r} was written with schema_version {version}; this entropylens "
                    f"reads up to {SCHEMA_VERSION}",
                    "upgrade entropylens: pip install -U entropylens",
                )
            readings = {
                name: _recommendation_of(saved) for name, saved in content["readings"].items()
            }
            looks = pd.DataFrame(content["looks"], columns=list(Look._fields))
            floats = ["stability", "agreement", "bound"]
            return cls(
                recommendation=readings[content["reading"]],
                looks=looks.astype({"layer": "Int64", **dict.fromkeys(floats, "float64")}),
                readings=readings,
                measured={name: _rows(saved) for name, saved in content["measured"].items()},
                num_prompts=content["prompts_at_hand"],
                **{name: content[name] for name in _SAVED_FIELDS},
            )
        except FileNotFoundError as error:
            raise AnalysisFilesError(
                f"{str(path.parent)!r} holds no {FILE_NAME}",
                "name a directory that `entropylens recommend MODEL -o` wrote",
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AnalysisFilesError(
                f"{str(path)!r} cannot be read ({error})",
                "run `entropylens recommend MODEL` again with -o and --force",
            ) from error


_SAVED_FIELDS = (
    *("decided", "until_sure", "positions", "products", "model", "revision", "num_layers"),
    *("vocab_size", "dtype", "kernel", "seed", "versions", "settings"),
)


def profile_of(rows: pd.DataFrame, reading: str, dtype: str) -> Profile:
    """The profile that some responses' rows give, as `Analysis.profile` has it."""
    sums = prompt_sums(rows, [f"{prefix_of(reading)}delta_ffn"])
    control = None
    if reading == "raw":
        control = prompt_sums(rows, ["control_delta_ffn"]).means()[:, 0]
    return Profile(sums.means()[:, 0], sums, floor_of(dtype), control)


def _named(layer: int | None) -> str:
    return "no layer" if layer is None else f"layer {layer}"


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row as JSON has it: missing is null."""
    return {
        str(name): None if pd.isna(value) else getattr(value, "item", lambda it=value: it)()
        for name, value in row.items()
    }


def _recommendation_dict(found: Recommendation) -> dict[str, Any]:
    return found.to_dict() | {"stages": found.stages.to_dict()}


def _recommendation_of(saved: Mapping[str, Any]) -> Recommendation:
    """What `_recommendation_dict` was made of."""
    fields = {name: saved[name] for name in Recommendation.__dataclass_fields__}
    if fields["sensitivity"] is not None:
        low, high = fields["sensitivity"]
        fields["sensitivity"] = (low, math.inf if high is None else high)
    fields["alternatives"] = tuple(Alternative(**other) for other in fields["alternatives"])
    spans = {name: next(map(tuple, fields["stages"][name]), None) for name in STAGES}
    fields["stages"] = Stages(**spans)
    return Recommendation(**fields)


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """One object a response; quantities are lists over the layers, null where there is no FFN."""
    quantities = [name for name in rows.columns if name.endswith("delta_ffn")]
    found = []
    for _, of_response in rows.groupby("response_id", sort=True):
        record = _plain(of_response.iloc[0].drop(["layer", *quantities]).to_dict())
        for name in quantities:
            values = of_response[name].astype(object)
            record[name] = values.where(of_response[name].notna(), None).tolist()
        found.append(record)
    return found


def _rows(records: list[dict[str, Any]]) -> pd.DataFrame:
    """What `_records` was made of."""
    frame = pd.DataFrame(records)
    quantities = [name for name in frame.columns if name.endswith("delta_ffn")]
    layers = np.array([range(1, len(values) + 1) for values in frame[quantities[0]]])
    frame.insert(4, "layer", list(layers))
    frame = frame.explode(["layer", *quantities], ignore_index=True)
    return frame.astype({"layer": "int64", **dict.fromkeys(quantities, "float64")})
