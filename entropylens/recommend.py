"""Which layer to train first: the rule of Sec. 5 with what can be said for and against it.

The paper takes "the last FFN layer with a positive exploration signal". Read literally that
follows any stray positive layer; here it is the end of the exploration stage, found as
`stages.cut_weights` describes, on prompts drawn anew many times. Never the final layer L: its
policy is not an inner one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entropylens.profile import Profile
from entropylens.reasons import (
    SETTLED,
    control_sentence,
    doubts,
    fit_of,
    literal_opening,
    opening,
    prompts_sentence,
)
from entropylens.resampling import RELIABLE_PROMPTS
from entropylens.stages import Stages, cut_weights, layer_shares, stages_of

__all__ = ["Alternative", "Recommendation", "paper_rule_layer", "recommend"]

Array = NDArray[Any]

RESAMPLES = 400
#: Resamples of each step of the search for how many prompts would do.
SEARCH_RESAMPLES = 30
#: Alternatives with a smaller share are not named.
SMALLEST_SHARE = 0.05
#: A typical layer's error over its change, from which on a profile is more than noise.
CLEAR_NOISE = 0.25


@dataclass(frozen=True)
class Alternative:
    """Another answer (None: no layer) and the share of resamples that gave it."""

    layer: int | None
    share: float


@dataclass(frozen=True)
class Recommendation:
    """The layer to train first, and how far to trust it. The fields answer different questions.

    Args:
        layer: 1..L-1, or None where the rule names none.
        rule: "stages" (ordered fit) or "paper" (the literal rule).
        applies: does the profile fit the rule: yes | weakly | no.
        stability: share of resamples with this answer, "none" included, where each resample
            splits its vote by the weights of its fit; None with one prompt.
        sensitivity: bounds (low, high) in nats on "about zero" between which the literal rule
            gives this answer (no upper end where it is "no layer"), or None where no bound does.
        paper_rule_layer: the last layer below L with a positive change, or None.
        alternatives: other answers with their shares, most frequent first.
        reason: the same in plain words.
        reading: raw or normed.
        stages: exploration, integration, convergence.
        num_prompts: independent prompts behind it, or None.
        prompts_needed: how many would settle it; None if it is settled or more would not help.
    """

    layer: int | None
    rule: str
    applies: str
    stability: float | None
    sensitivity: tuple[float, float] | None
    paper_rule_layer: int | None
    alternatives: tuple[Alternative, ...]
    reason: str
    reading: str
    stages: Stages
    num_prompts: int | None
    prompts_needed: int | None

    def with_note(self, note: str) -> Recommendation:
        """The same with one more sentence in its reason."""
        return replace(self, reason=f"{self.reason} {note}")

    def to_dict(self) -> dict[str, Any]:
        """As analysis.json has it (the stages apart)."""
        return {
            "layer": self.layer,
            "rule": self.rule,
            "reading": self.reading,
            "applies": self.applies,
            "stability": self.stability,
            "sensitivity": self.sensitivity
            and [bound if math.isfinite(bound) else None for bound in self.sensitivity],
            "paper_rule_layer": self.paper_rule_layer,
            "alternatives": [
                {"layer": other.layer, "share": other.share} for other in self.alternatives
            ],
            "num_prompts": self.num_prompts,
            "prompts_needed": self.prompts_needed,
            "reason": self.reason,
        }

    def _repr_html_(self) -> str:
        from entropylens.html_view import recommendation_html

        return recommendation_html(self)

    def to_frame(self) -> pd.DataFrame:
        """One row an answer: `layer, share, chosen`; no layer is <NA>."""
        answers = [(self.layer, self.stability, True)]
        answers += [(other.layer, other.share, False) for other in self.alternatives]
        frame = pd.DataFrame(answers, columns=["layer", "share", "chosen"])
        return frame.astype({"layer": "Int64", "share": "float64"})


def recommend(
    profile: Profile,
    *,
    reading: str = "raw",
    rule: str = "stages",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Recommendation:
    """Name the layer to train first (Sec. 5, training setup).

    Args:
        profile: FFN entropy changes with their errors.
        reading: which reading they are of.
        rule: "stages", or "paper" for the literal last positive layer below L.
        seed: of the resamples.
        resamples: how often prompts are drawn anew.
    """
    if not np.isfinite(profile.means).all():
        return _without_every_ffn(profile, reading, rule)
    literal = paper_rule_layer(profile.means)
    draws = profile.resampled(resamples, seed)
    weights = cut_weights(draws, profile.errors()).mean(0)
    shares = layer_shares(weights)
    layer = max(shares, key=lambda answer: shares[answer])
    stages = _stages(weights, layer)
    if rule == "paper":
        shares = _shares([paper_rule_layer(draw) for draw in draws])
        layer = literal
    known_error = profile.num_prompts is None or profile.num_prompts > 1
    stability = min(1.0, shares.get(layer, 0.0)) if known_error else None
    others = {
        other: share
        for other, share in sorted(shares.items(), key=lambda item: -item[1])
        if other != layer and share >= SMALLEST_SHARE
    }
    applies, why = fit_of(profile, stages, layer, stability)
    needed = _prompts_needed(profile, layer, stability, seed) if rule == "stages" else None
    sentences = [
        opening(layer, stages, profile) if rule == "stages" else literal_opening(literal),
        *why,
        *doubts(layer, literal, stability, others, profile),
        *(prompts_sentence(profile, stability, needed) if rule == "stages" else ()),
        *control_sentence(profile, layer),
    ]
    return Recommendation(
        layer=layer,
        rule=rule,
        applies=applies,
        stability=stability,
        sensitivity=_sensitivity(profile.means, layer),
        paper_rule_layer=literal,
        alternatives=tuple(Alternative(other, share) for other, share in others.items()),
        reason=" ".join(sentences),
        reading=reading,
        stages=stages,
        num_prompts=profile.num_prompts,
        prompts_needed=needed,
    )


def _without_every_ffn(profile: Profile, reading: str, rule: str) -> Recommendation:
    """The rule compares the FFNs of all layers (Sec. 5): it says nothing where some have none."""
    missing = (np.flatnonzero(~np.isfinite(profile.means)) + 1).tolist()
    which = "no layer" if len(missing) == profile.num_layers else f"not every layer ({missing} not)"
    return Recommendation(
        layer=None,
        rule=rule,
        applies="no",
        stability=None,
        sensitivity=None,
        paper_rule_layer=paper_rule_layer(np.nan_to_num(profile.means, nan=-math.inf)),
        alternatives=(),
        reason=f"No layer: {which} has an FFN, and the rule is about those of all layers, so it "
        "has nothing to say.",
        reading=reading,
        stages=Stages(None, None, None),
        num_prompts=profile.num_prompts,
        prompts_needed=None,
    )


def paper_rule_layer(deltas: Array, bound: float = 0.0) -> int | None:
    """The literal rule: the last layer below L whose FFN entropy change is above the bound."""
    above = np.flatnonzero(np.asarray(deltas)[:-1] > bound)
    return int(above[-1]) + 1 if len(above) else None


def _shares(answers: list[int | None]) -> dict[int | None, float]:
    return {answer: answers.count(answer) / len(answers) for answer in set(answers)}


def _stages(weights: Array, layer: int | None) -> Stages:
    """The likeliest cuts among those that give this layer."""
    last = len(weights) - 1
    cuts = [0] if layer is None else [layer, last] if layer == last - 1 else [layer]
    first, second = max(
        ((b1, int(np.argmax(weights[b1]))) for b1 in cuts), key=lambda cut: weights[cut]
    )
    return stages_of(first, max(first, second), last)


def _sensitivity(means: Array, layer: int | None) -> tuple[float, float] | None:
    if layer is None:
        return float(means[:-1].max(initial=0.0)), math.inf
    low = max(0.0, float(means[layer:-1].max(initial=0.0)))
    high = float(means[layer - 1])
    return (low, high) if low < high else None


def _prompts_needed(
    profile: Profile, layer: int | None, stability: float | None, seed: int
) -> int | None:
    """The fewest prompts, in doublings, at which the answer would be settled, if any."""
    prompts = profile.num_prompts
    if prompts is None:
        return None
    if prompts < 2:
        return RELIABLE_PROMPTS
    if stability is not None and stability >= SETTLED:
        return RELIABLE_PROMPTS if prompts < RELIABLE_PROMPTS else None
    for doublings in range(1, 8):
        factor = 2.0**doublings
        draws = profile.resampled(SEARCH_RESAMPLES, seed, more_prompts=factor)
        shares = layer_shares(cut_weights(draws, profile.errors() / np.sqrt(factor)).mean(0))
        if max(shares.values()) >= SETTLED:
            return max(RELIABLE_PROMPTS, int(prompts * factor))
    # Still open: because the profile seen is mostly noise, or because it is gradual in itself.
    noise = float(np.median(profile.errors()) / max(np.median(np.abs(profile.means)), 1e-12))
    return math.ceil(prompts * (noise / CLEAR_NOISE) ** 2) if noise > CLEAR_NOISE else None
