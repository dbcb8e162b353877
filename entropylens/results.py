"""Analysis: what was measured, frozen, with its frames, its recommendation and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from entropylens.errors import AnalysisFilesError, SettingError
from entropylens.files import make_directory, write_text, write_whole
from entropylens.profile import Profile, floor_of
from entropylens.quantities import DELTAS, READINGS, prefix_of, quantities_of
from entropylens.recommend import Recommendation, recommend
from entropylens.resampling import RESAMPLES, prompt_sums
from entropylens.response_table import gap_of, numbered_on, per_response
from entropylens.stages import Stages

if TYPE_CHECKING:
    from entropylens.html_view import HtmlView
    from entropylens.plots import Plots

__all__ = ["SCHEMA_VERSION", "Analysis"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class Analysis:
    """Policies of every layer and module of one model over its responses.

    Args:
        model: its name or path.
        revision: the Hub commit, or None.
        num_layers: L.
        vocab_size: V.
        dtype: of the model's states.
        reading: raw | normed | both.
        kernel: which body reduced the logits (triton, compiled, eager).
        mixers: one a layer: attention | linear_attention | ssm | none.
        responses: one row a response and layer: `response_id, prompt_id, problem_key,
            response_key, task, layer, num_tokens, truncated, policy_entropy, policy_nll` and the
            mean over the response's tokens of every quantity. The keys are digests: of the prompt
            as token ids, of the problem before any template, and of the whole response.
        skipped: bad responses left out.
        seed: of resamples and control.
        versions: of the packages that made it.
        tokens: one row a response, position and layer, where they were kept: `response_id,
            position` (from 1), `layer, token_id, token`, the chosen quantities, the top tokens
            of pi_l with their probabilities, and the produced token's `rank` under pi_l; else
            None.
        settings: what else was chosen, such as the sampling; nothing depends on them here.
    """

    model: str
    revision: str | None
    num_layers: int
    vocab_size: int
    dtype: str
    reading: str
    kernel: str
    mixers: tuple[str, ...]
    responses: pd.DataFrame
    skipped: int
    seed: int
    versions: Mapping[str, str]
    tokens: pd.DataFrame | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_responses(self) -> int:
        """Responses measured."""
        return len(self._per_response)

    @property
    def num_prompts(self) -> int:
        """Independent prompts among them."""
        return int(self._per_response["prompt_id"].nunique())

    @property
    def num_tokens(self) -> int:
        """Generated tokens measured."""
        return int(self._per_response["num_tokens"].sum())

    @property
    def policy_entropy(self) -> float:
        """Mean H(pi_theta) over tokens, in nats."""
        return self._token_mean("policy_entropy")

    @property
    def policy_nll(self) -> float:
        """Mean -log pi_theta(token) over tokens, in nats."""
        return self._token_mean("policy_nll")

    @property
    def policy_perplexity(self) -> float:
        """exp(policy_nll)."""
        return math.exp(min(self.policy_nll, 700.0))

    @cached_property
    def _per_response(self) -> pd.DataFrame:
        return per_response(self.responses)

    def _token_mean(self, column: str) -> float:
        frame = self._per_response
        return float(np.average(frame[column], weights=frame["num_tokens"]))

    @property
    def readings(self) -> tuple[str, ...]:
        """The readings measured, raw first."""
        return READINGS if self.reading == "both" else (self.reading,)

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row a layer: token means, and 95 % intervals of the entropy changes (nats).

        Intervals resample prompts (studentised); under 20 prompts they are unreliable.
        """
        names = quantities_of(self.reading)
        sums = prompt_sums(self.responses, names)
        frame = pd.DataFrame(sums.means(), columns=list(names))
        frame.insert(0, "layer", range(1, self.num_layers + 1))
        frame.insert(1, "mixer", list(self.mixers))
        deltas = [prefix_of(reading) + name for reading in self.readings for name in DELTAS]
        low, high = prompt_sums(self.responses, deltas).draw(RESAMPLES, self.seed).studentised()
        widest = math.log(self.vocab_size)  # no entropy changes by more
        for place, name in enumerate(deltas):
            frame[f"{name}_low"] = low[:, place].clip(-widest, widest)
            frame[f"{name}_high"] = high[:, place].clip(-widest, widest)
        return frame

    def to_frame(self) -> pd.DataFrame:
        """The same as `layers`."""
        return self.layers

    @cached_property
    def recommendations(self) -> Mapping[str, Recommendation]:
        """One a reading, by its name."""
        return {reading: self.recommend(reading=reading) for reading in self.readings}

    @property
    def recommendation(self) -> Recommendation:
        """The raw reading's, which is what training optimizes; else the normed one's."""
        return self.recommendations[self.readings[0]]

    @property
    def stages(self) -> Stages:
        """Exploration, integration, convergence of the FFNs."""
        return self.recommendation.stages

    def recommend(
        self, rule: str = "stages", *, reading: str | None = None, task: str | None = None
    ) -> Recommendation:
        """The layer to train first.

        Args:
            rule: "stages" (ordered fit), or "paper" (last positive layer below L, literally).
            reading: raw | normed; by default raw where it was measured.
            task: one dataset alone; by default all.

        Raises:
            SettingError: an unknown rule, or a reading or task that was not measured.
        """
        reading = reading or self.readings[0]
        for what, value, known in (
            ("rule", rule, ("stages", "paper")),
            ("reading", reading, self.readings),
            ("task", task, (None, *self.tasks)),
        ):
            if value not in known:
                choices = ", ".join(str(choice) for choice in known)
                raise SettingError(f"no {what} {value!r} here", f"choose one of {choices}")
        frame = self.responses if task is None else self.responses[self.responses["task"] == task]
        found = recommend(
            self._profile_of(frame, reading), reading=reading, rule=rule, seed=self.seed
        )
        if self.num_layers < 2:
            return found
        return found.with_note(self._how_well(found.layer, reading, frame))

    def profile(self, reading: str | None = None) -> Profile:
        """The FFNs' entropy changes with their errors, as the rule reads them."""
        return self._profile_of(self.responses, reading or self.readings[0])

    def _profile_of(self, frame: pd.DataFrame, reading: str) -> Profile:
        name = prefix_of(reading) + "delta_ffn"
        sums = prompt_sums(frame, [name])
        control = None
        if reading == "raw":
            control = prompt_sums(frame, ["control_delta_ffn"]).means()[:, 0]
        return Profile(
            means=sums.means()[:, 0],
            sums=sums,
            floor=floor_of(self.dtype),
            control=control,
        )

    def _how_well(self, layer: int | None, reading: str, frame: pd.DataFrame) -> str:
        """How well pi_l knows the text, in a sentence."""
        names = [f"{prefix_of(reading)}nll_layer", f"{prefix_of(reading)}agree_layer"]
        known = prompt_sums(frame, names).means()
        uniform = math.log(self.vocab_size)
        place = layer if layer is not None else int(np.argmin(known[:-1, 0])) + 1
        nll, agree = known[place - 1]
        who = f"pi_{place}" if layer is not None else f"The best inner policy, pi_{place},"
        verdict = (
            "worse than a uniform guess" if nll > uniform else f"uniform would be {uniform:.1f}"
        )
        return (
            f"{who} gives the produced tokens an NLL of {nll:.1f} nats ({verdict}) and shares the "
            f"model's top token at {agree:.1%} of positions."
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The datasets that the responses came from, in order."""
        return tuple(self._per_response["task"].unique())

    @cached_property
    def by_task(self) -> Mapping[str, Recommendation]:
        """The recommendation of each task, where there are several."""
        if len(self.tasks) < 2:
            return {}
        return {task: self.recommend(task=task) for task in self.tasks}

    @property
    def tasks_agree(self) -> bool | None:
        """Whether all tasks name the same layer; None for a single task."""
        if not self.by_task:
            return None
        return len({found.layer for found in self.by_task.values()}) == 1

    @property
    def plot(self) -> Plots:
        """The figures of this analysis: `analysis.plot.<TAB>`."""
        from entropylens.plots import Plots

        return Plots(self)

    def what_would_change(self) -> pd.DataFrame:
        """The answer under other rules, bounds, readings, tasks and fewer prompts."""
        from entropylens.doubts import what_would_change

        return what_would_change(self)

    def token_view(self, response: int = 1, quantity: str | None = None) -> HtmlView:
        """One response token by token, to look at in a notebook; see `token_view.token_view`."""
        from entropylens.html_view import HtmlView
        from entropylens.token_view import token_view

        return HtmlView(token_view(self, response, quantity))

    def __repr__(self) -> str:
        layer = self.recommendation.layer
        return (
            f"<Analysis of {self.model}: {self.num_layers} layers, {self.num_responses} responses, "
            f"{self.num_tokens} tokens; train first: {layer or 'no layer'}>"
        )

    def _repr_html_(self) -> str:
        from entropylens.html_view import analysis_html

        return analysis_html(self)

    def to_dict(self) -> dict[str, Any]:
        """What analysis.json holds."""
        recommendation = self.recommendation.to_dict()
        recommendation["readings"] = {
            reading: found.to_dict() | {"stages": found.stages.to_dict()}
            for reading, found in self.recommendations.items()
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "revision": self.revision,
            "num_layers": self.num_layers,
            "vocab_size": self.vocab_size,
            "mixers": list(self.mixers),
            "num_responses": self.num_responses,
            "num_prompts": self.num_prompts,
            "num_tokens": self.num_tokens,
            "skipped": self.skipped,
            "dtype": self.dtype,
            "reading": self.reading,
            "kernel": self.kernel,
            "seed": self.seed,
            "policy_entropy": self.policy_entropy,
            "policy_nll": self.policy_nll,
            "policy_perplexity": self.policy_perplexity,
            "stages": self.stages.to_dict(),
            "recommendation": recommendation,
            "tasks": {
                task: {"layer": found.layer, "stability": found.stability, "applies": found.applies}
                for task, found in self.by_task.items()
            },
            "tasks_agree": self.tasks_agree,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    @classmethod
    def merge(cls, analyses: Sequence[Analysis]) -> Analysis:
        """One analysis of the responses of several of the same model, such as shards of a set.

        Responses are numbered on through; a prompt that occurs in several stays one prompt.

        Raises:
            SettingError: they are of different models, readings or dtypes, or there is none.
        """
        if not analyses:
            raise SettingError("there is nothing to merge", "pass at least one analysis")
        first = analyses[0]
        for other in analyses[1:]:
            for name in ("model", "revision", "num_layers", "vocab_size", "dtype", "reading"):
                ours, theirs = getattr(first, name), getattr(other, name)
                if ours != theirs:
                    raise SettingError(
                        f"analyses of different {name} do not merge ({ours!r} and {theirs!r})",
                        "merge analyses of one model with the same settings",
                    )
        counts = [analysis.num_responses for analysis in analyses]
        starts = [sum(counts[:place]) for place in range(len(counts))]
        tables = [analysis.responses for analysis in analyses]
        kernels = dict.fromkeys(analysis.kernel for analysis in analyses)
        kept = [analysis.tokens for analysis in analyses]
        columns = {None if it is None else tuple(it.columns) for it in kept}
        if len(columns) > 1:
            raise SettingError(
                "analyses that keep different tokens do not merge",
                "run them with the same keep_tokens and top_tokens",
            )
        return replace(
            first,
            kernel=", ".join(kernels),
            responses=numbered_on(tables, tables, starts),
            skipped=sum(analysis.skipped for analysis in analyses),
            settings={
                name: value
                for name, value in first.settings.items()
                if all(it.settings.get(name) == value for it in analyses)
            },
            tokens=None
            if first.tokens is None
            else numbered_on([it for it in kept if it is not None], tables, starts),
        )

    def save(self, directory: str | Path) -> None:
        """Write layers.csv, responses.parquet, tokens.parquet and analysis.json, each whole.

        Raises:
            OutputDirectoryError: the directory cannot be written.
        """
        path = make_directory(Path(directory))
        write_whole(
            path / "responses.parquet", lambda aside: self.responses.to_parquet(aside, index=False)
        )
        if self.tokens is not None:
            kept = self.tokens
            write_whole(path / "tokens.parquet", lambda aside: kept.to_parquet(aside, index=False))
        write_whole(path / "layers.csv", lambda aside: self.layers.to_csv(aside, index=False))
        write_text(path / "analysis.json", json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> Analysis:
        """Read what `save` wrote.

        Raises:
            AnalysisFilesError: no analysis, an unreadable one, or one of a newer version.
        """
        path = Path(directory)
        try:
            content = json.loads((path / "analysis.json").read_text(encoding="utf-8"))
            version = content["schema_version"]
            if version > SCHEMA_VERSION:
                raise AnalysisFilesError(
                    f"{str(path)!r} was written with schema_version {version}; this entropylens "
                    f"reads up to {SCHEMA_VERSION}",
                    "upgrade entropylens: pip install -U entropylens",
                )
            fields = {name: content[name] for name in _SAVED_FIELDS}
            fields["settings"] = content.get("settings", {})
            responses = pd.read_parquet(path / "responses.parquet")
            kept = path / "tokens.parquet"
            tokens = pd.read_parquet(kept) if kept.is_file() else None
            gap = gap_of(responses, fields["reading"], fields["num_layers"])
        except FileNotFoundError as error:
            raise AnalysisFilesError(
                f"{str(path)!r} holds no finished analysis "
                f"({Path(error.filename or 'responses.parquet').name} is missing)",
                "name a directory that `entropylens analyze -o` wrote",
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AnalysisFilesError(
                f"the analysis in {str(path)!r} cannot be read ({error})",
                "run `entropylens analyze` again with -o and --force",
            ) from error
        if gap is not None or len(per_response(responses)) != content["num_responses"]:
            raise AnalysisFilesError(
                f"responses.parquet in {str(path)!r} is damaged ({gap or 'responses are missing'})",
                "run `entropylens analyze` again with -o and --force",
            )
        fields["mixers"] = tuple(fields["mixers"])
        return cls(**fields, responses=responses, tokens=tokens)


_SAVED_FIELDS = (
    *("model", "revision", "num_layers", "vocab_size", "dtype", "reading", "kernel", "mixers"),
    *("skipped", "seed", "versions"),
)
