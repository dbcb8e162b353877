"""The weights of a run looked at over one text: the step-0 responses (Sec. 4, Figure 5).

Rollouts of the current policy would confound new text with new features.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bupo.drift import Drift, Start, measure_drift
from entropylens.capture import evaluating
from entropylens.errors import OutputDirectoryError, SettingError
from entropylens.files import make_directory, write_text
from entropylens.look import LOOK_FILE, Look
from entropylens.measure import BATCH_TOKENS, measure
from entropylens.memory import allocations_explained, smaller_batches
from entropylens.policy import Unembedding
from entropylens.quantities import READINGS, prefix_of
from entropylens.resampling import RESAMPLES, prompt_sums
from entropylens.responses import Limits, Response, parse_responses, read_responses
from entropylens.results import Analysis
from entropylens.rundir import fingerprint
from entropylens.sources import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FixedSet", "choose"]

RESPONSES, START = "responses.jsonl", "start.safetensors"
#: The column of responses.parquet with a response's KL(pi_theta of step 0 || pi_theta).
KL = "start_kl"
#: A set is checked against a model's own limits when a model is there.
_ANY_MODEL = Limits(vocab_size=sys.maxsize, context=None)


@dataclass(frozen=True)
class FixedSet:
    """The responses of one run, and the directory of the looks at them.

    Args:
        directory: holds responses.jsonl, start.safetensors and one `step_<N>/` a look.
        responses: the set.
    """

    directory: Path
    responses: tuple[Response, ...]

    @classmethod
    def start(
        cls, directory: str | Path, responses: Iterable[Response | Mapping[str, Any]]
    ) -> FixedSet:
        """Write the set into a directory, once; the same set may be started again.

        Args:
            directory: made if it does not exist.
            responses: Response objects, or mappings with `prompt_ids` and `response_ids`.

        Raises:
            ResponsesError: there is none, or a bad one (with its number).
            OutputDirectoryError: the directory has another set, or cannot be written.
        """
        path = make_directory(Path(directory))
        chosen = parse_responses(enumerate(responses, start=1), None, _ANY_MODEL).items
        if (path / RESPONSES).is_file():
            found = cls.open(path)
            if found.responses != chosen:
                raise OutputDirectoryError(
                    f"{str(path)!r} holds a fixed set of other responses",
                    "resume it with FixedSet.open(), or choose another directory",
                )
            return found
        lines = [json.dumps(asdict(response)) + "\n" for response in chosen]
        write_text(path / RESPONSES, "".join(lines))
        return cls(path, chosen)

    @classmethod
    def open(cls, directory: str | Path) -> FixedSet:
        """The set that a run started.

        Raises:
            OutputDirectoryError: the directory has none.
            ResponsesError: its file is damaged.
        """
        path = Path(directory)
        if not (path / RESPONSES).is_file():
            raise OutputDirectoryError(
                f"{str(path)!r} holds no fixed set ({RESPONSES} is missing)",
                "start it before training, with FixedSet.start(directory, responses)",
            )
        return cls(path, read_responses(path / RESPONSES, None, _ANY_MODEL).items)

    def look(
        self,
        model: PreTrainedModel,
        *,
        step: int,
        layer: int,
        reading: str = "raw",
        batch_tokens: int = BATCH_TOKENS,
        progress: bool = False,
    ) -> Look:
        """Analyze the weights of a step over the set; one that is there already is read.

        `step_<N>/` gets layers.csv, responses.parquet and analysis.json as from `analyze`,
        similarity.csv, and look.json last, as the sign of completion.

        Args:
            model: a loaded causal LM (or PEFT model) with the step's weights; left as it came.
            step: 0 before training; that look keeps the policy which later ones compare with.
            layer: l, from 1 to L.
            reading: raw | normed | both.
            batch_tokens: response positions whose states are held at a time.
            progress: show progress bars.

        Raises:
            SettingError: no such step, layer or reading.
            OutputDirectoryError: step 0 was not looked at, or the step with another layer or
                reading; or the directory cannot be written.
            EntropyLensError: as `analyze`.
        """
        if step < 0 or reading not in (*READINGS, "both"):
            raise SettingError(
                f"no look at step {step} with reading {reading!r}",
                "count steps from 0, and choose raw, normed or both",
            )
        place = self.directory / f"step_{step}"
        if (place / LOOK_FILE).is_file():
            return _same(Look.load(place), place, layer, reading)
        if step > 0 and not (self.directory / START).is_file():
            raise OutputDirectoryError(
                f"{str(self.directory)!r} holds no {START}: step 0 was not looked at",
                "look at step 0 before the first update; later ones are compared with it",
            )
        subject = open_model(model)
        anatomy = subject.anatomy
        if not 1 <= layer <= anatomy.num_layers:
            raise SettingError(f"layer {layer} does not exist", f"give 1 to {anatomy.num_layers}")
        start = self._start(anatomy.unembedding) if step > 0 else None
        checked = parse_responses(
            enumerate(self.responses, start=1), None, subject.limits,
            source=str(self.directory / RESPONSES),
        )  # fmt: skip
        analysis = measure(
            subject, checked, reading=reading, batch_tokens=batch_tokens, progress=progress
        )
        with allocations_explained(*smaller_batches(batch_tokens)), evaluating(subject.model):
            drift = measure_drift(
                anatomy, checked.items, layer, start, batch_tokens=batch_tokens, progress=progress
            )
        table = analysis.responses
        column = table["response_id"].map(dict(enumerate(drift.kl)))
        analysis = replace(analysis, responses=table.assign(**{KL: column}))
        look = _look(analysis, drift, step, layer)
        if drift.start is not None:
            drift.start.save(self.directory / START, self._mark)
        analysis.save(place)
        look.save(place)
        return look

    @property
    def _mark(self) -> str:
        return fingerprint({"responses": [response.key for response in self.responses]})

    def _start(self, unembedding: Unembedding) -> Start:
        """What the look at step 0 kept, for a model with this unembedding."""
        path = self.directory / START
        start = Start.load(path, self._mark, unembedding.transform)
        if start.unembedding.weight.shape != unembedding.weight.shape:
            raise SettingError(
                f"the model is of another shape than that of step 0 in {str(path)!r}",
                "look at the model that the fixed set was started with",
            )
        return start


def choose(num_available: int, count: int) -> list[int]:
    """Indices of `count` of some responses, evenly spread; all of them where there are fewer.

    Raises:
        SettingError: there is none to choose from, or none is wanted.
    """
    if num_available < 1 or count < 1:
        raise SettingError(
            f"no fixed set of {count} out of {num_available} responses", "take at least one"
        )
    count = min(count, num_available)
    return [place * num_available // count for place in range(count)]


def _same(found: Look, place: Path, layer: int, reading: str) -> Look:
    """The look that stands there, if it is the one that is asked for."""
    if (found.layer, found.reading) != (layer, reading):
        raise OutputDirectoryError(
            f"{str(place)!r} holds a look at layer {found.layer} ({found.reading}), not at layer "
            f"{layer} ({reading})",
            "keep layer and reading through a run, or start a fixed set in another directory",
        )
    return found


def _look(analysis: Analysis, drift: Drift, step: int, layer: int) -> Look:
    row = analysis.layers.set_index("layer").to_dict("index")[layer]
    prefix = prefix_of(analysis.readings[0])
    at_layer = analysis.responses[analysis.responses["layer"] == layer]
    sums = prompt_sums(at_layer, [KL])
    low, high = sums.draw(RESAMPLES, analysis.seed).studentised()
    # Nothing is estimated at step 0; and a KL is never negative.
    interval = (0.0, 0.0)
    if drift.start is None:
        interval = (float(np.maximum(low[0, 0], 0.0)), float(high[0, 0]))
    return Look(
        step=step,
        layer=layer,
        reading=analysis.reading,
        num_tokens=analysis.num_tokens,
        perplexity=analysis.policy_perplexity,
        kl=float(sums.means()[0, 0]),
        kl_interval=interval,
        entropy_layer=float(row[f"{prefix}entropy_layer"]),
        delta_layer=float(row[f"{prefix}delta_layer"]),
        nll_layer=float(row[f"{prefix}nll_layer"]),
        similarity=drift.similarity,
    )
