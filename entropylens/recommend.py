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

from entropylens.resampling import LEAST_PROMPTS, RELIABLE_PROMPTS, PromptSums
from entropylens.stages import Stages, cut_weights, stages_of

__all__ = ["Alternative", "Profile", "Recommendation", "paper_rule_layer", "recommend"]

Array = NDArray[Any]

RESAMPLES = 400
#: Resamples of each step of the search for how many prompts would do.
SEARCH_RESAMPLES = 30
#: From here on a recommendation counts as settled.
SETTLED = 0.9
#: Alternatives with a smaller share are not named.
SMALLEST_SHARE = 0.05
#: So many negative layers in a row are no noise around zero (1 in 128).
LONG_RUN = 7
#: A typical layer's error over its change, from which on a profile is more than noise.
CLEAR_NOISE = 0.25


@dataclass(frozen=True)
class Profile:
    """Entropy changes of the FFNs of one model, with their errors.

    Args:
        means: [L] delta_ffn in nats.
        sums: the same by prompt (K = 1), or None where only the profile is known.
        floor: [L] or a number, the error of the numbers themselves (dtype), in nats.
        control: [L] what random vectors of the same norms give, or None.
    """

    means: Array
    sums: PromptSums | None = None
    floor: Array | float = 1e-4
    control: Array | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.means)

    @property
    def num_prompts(self) -> int | None:
        """Prompts behind it, or None."""
        return None if self.sums is None else self.sums.num_prompts

    def errors(self) -> Array:
        """[L]: the larger of sampling error and floor."""
        floor = np.broadcast_to(np.asarray(self.floor, dtype=float), self.means.shape)
        if self.sums is None or self.sums.num_prompts < 2:
            return floor.copy()
        return np.maximum(self.sums.standard_errors()[:, 0], floor)

    def clearly_negative(self) -> int:
        """Layers below zero beyond their error, all layers judged at once."""
        above = self.means + 2 * self.errors()
        if self.sums is not None and self.sums.num_prompts >= LEAST_PROMPTS:
            above = self.sums.draw(RESAMPLES, 0).studentised(simultaneous=True)[1][:, 0]
        return int(np.sum(above < 0))

    def resampled(self, resamples: int, seed: int, more_prompts: float = 1.0) -> Array:
        """[resamples, L] profiles of prompts drawn anew, as if there were more of them.

        The spread is widened by sqrt(P/(P-1)) and by the chance error of a spread seen on P
        prompts (Student's t), which is what few prompts do not tell.
        """
        if self.sums is None or self.sums.num_prompts < 2:
            return self.means[None]
        freedom = self.sums.num_prompts - 1
        drawn = self.sums.draw(resamples, seed).means[..., 0] - self.means
        chance = np.random.default_rng(seed + 1).chisquare(freedom, resamples) / freedom
        widening = np.sqrt((freedom + 1) / freedom / np.clip(chance, 0.05, None) / more_prompts)
        return self.means + drawn * widening[:, None]


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
    literal = paper_rule_layer(profile.means)
    draws = profile.resampled(resamples, seed)
    weights = cut_weights(draws, profile.errors()).mean(0)
    shares = _layer_shares(weights)
    layer = max(shares, key=lambda answer: shares[answer])
    stages = _stages(weights, layer)
    if rule == "paper":
        shares = _shares([paper_rule_layer(draw) for draw in draws])
        layer = literal
    known_error = profile.num_prompts is None or profile.num_prompts > 1
    stability = min(1.0, shares.get(layer, 0.0)) if known_error else None
    alternatives = tuple(
        Alternative(other, share)
        for other, share in sorted(shares.items(), key=lambda item: -item[1])
        if other != layer and share >= SMALLEST_SHARE
    )
    applies, why = _fit(profile, stages, layer)
    needed = _prompts_needed(profile, layer, stability, seed) if rule == "stages" else None
    sentences = [
        _opening(layer, stages, profile) if rule == "stages" else _literal_opening(literal),
        *why,
        *_doubts(layer, literal, stability, alternatives, profile),
        *(_prompts_sentence(profile, stability, needed) if rule == "stages" else ()),
        *_control_sentence(profile, layer),
    ]
    return Recommendation(
        layer=layer,
        rule=rule,
        applies=applies,
        stability=stability,
        sensitivity=_sensitivity(profile.means, layer),
        paper_rule_layer=literal,
        alternatives=alternatives,
        reason=" ".join(sentences),
        reading=reading,
        stages=stages,
        num_prompts=profile.num_prompts,
        prompts_needed=needed,
    )


def paper_rule_layer(deltas: Array, bound: float = 0.0) -> int | None:
    """The literal rule: the last layer below L whose FFN entropy change is above the bound."""
    above = np.flatnonzero(np.asarray(deltas)[:-1] > bound)
    return int(above[-1]) + 1 if len(above) else None


def _shares(answers: list[int | None]) -> dict[int | None, float]:
    return {answer: answers.count(answer) / len(answers) for answer in set(answers)}


def _layer_shares(weights: Array) -> dict[int | None, float]:
    """Shares of the answers: no exploration is None, exploration to the end is L - 1."""
    by_cut = weights.sum(1)
    last = len(by_cut) - 1
    shares: dict[int | None, float] = {None: float(by_cut[0])}
    for cut in range(1, last + 1):
        answer = min(cut, last - 1) or None
        shares[answer] = shares.get(answer, 0.0) + float(by_cut[cut])
    return shares


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


def _fit(profile: Profile, stages: Stages, layer: int | None) -> tuple[str, list[str]]:
    """Does the profile have the shape that the rule speaks of, and what speaks against it."""
    means, errors = profile.means, profile.errors()
    explored = means[: stages.exploration[1]] if stages.exploration else means[:0]
    if layer is None:
        return "no", []
    if stages.convergence is None and means[-1] > 0 and np.mean(means > 0) >= 0.9:
        return "no", [
            "No FFN layer converges, so there is no boundary to stop at: L-1 is only the last "
            "inner layer, and the paper's own penultimate policy collapsed in training (Fig. 4)."
        ]
    against = []
    if stages.convergence is None:
        against.append("No convergence stage follows the exploration.")
    elif stages.integration is None and stages.convergence[0] >= profile.num_layers - 1:
        against.append(
            "Convergence happens at once, in the last layer: a Llama-like profile without an "
            "integration stage."
        )
    if stages.integration is not None:
        first, last = stages.integration
        middle = means[first - 1 : last]
        width = float(np.sqrt(np.mean(np.square(middle))))
        if width > 0.5 * float(np.median(explored)):
            against.append(
                f"The middle (layers {first}-{last}) is not about zero: its changes are of the "
                f"size of the exploring ones ({width:.2g} against {np.median(explored):.2g} nats)."
            )
        elif run := _longest_run(middle < -2 * errors[first - 1 : last]):
            start = first + run[0]
            against.append(
                f"A negative block in the middle (layers {start}-{start + run[1] - 1}) breaks "
                "the order of the stages."
            )
    strays = _strays(profile, stages)
    if strays:
        against.append(
            f"Layer{'s' if len(strays) > 1 else ''} {_listed(strays)} "
            f"go{'' if len(strays) > 1 else 'es'} against the stage around "
            f"{'them' if len(strays) > 1 else 'it'}."
        )
    if len(explored) and float(np.median(explored)) < 3 * float(np.median(errors[: len(explored)])):
        against.append("The exploring changes hardly stand out of their error.")
    if profile.control is not None and len(explored):
        excess = (means - profile.control)[: len(explored)]
        if np.mean(excess > 0) < 0.5 or np.median(excess) < 0.25 * np.median(explored):
            against.append("Vector norms alone give the exploring changes.")
    return ("weakly" if against else "yes"), against


def _strays(profile: Profile, stages: Stages) -> list[int]:
    """Layers clearly of the other sign inside a stage of one sign."""
    errors = profile.errors()
    found = []
    for span, sign in ((stages.exploration, 1), (stages.convergence, -1)):
        if span is not None:
            inside = sign * profile.means[span[0] - 1 : span[1]]
            beyond = inside < -2 * errors[span[0] - 1 : span[1]]
            found += [span[0] + int(place) for place in np.flatnonzero(beyond)]
    return found


def _longest_run(flags: Array) -> tuple[int, int] | None:
    """Start and length of the longest run, if it is too long for signs drawn by chance."""
    best = (0, 0)
    length = 0
    for place, flag in enumerate(flags):
        length = length + 1 if flag else 0
        if length > best[1]:
            best = (place - length + 1, length)
    return best if best[1] >= LONG_RUN else None


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
        shares = _layer_shares(cut_weights(draws, profile.errors() / np.sqrt(factor)).mean(0))
        if max(shares.values()) >= SETTLED:
            return max(RELIABLE_PROMPTS, int(prompts * factor))
    # Still open: because the profile seen is mostly noise, or because it is gradual in itself.
    noise = float(np.median(profile.errors()) / max(np.median(np.abs(profile.means)), 1e-12))
    return math.ceil(prompts * (noise / CLEAR_NOISE) ** 2) if noise > CLEAR_NOISE else None


def _opening(layer: int | None, stages: Stages, profile: Profile) -> str:
    spans = ", ".join(
        f"{name} {_span(span)}"
        for name, span in (
            ("exploration", stages.exploration),
            ("integration", stages.integration),
            ("convergence", stages.convergence),
        )
        if span is not None
    )
    if layer is not None:
        return f"Layer {layer} ends the exploration stage (layers: {spans})."
    negative = profile.clearly_negative()
    if negative == profile.num_layers:
        return (
            f"No layer: every FFN lowers the entropy ({negative} of {profile.num_layers} layers "
            "clearly negative), so no layer explores and the rule has nothing to say."
        )
    return (
        f"No layer: no run of FFN layers from the bottom on clearly raises the entropy "
        f"({negative} of {profile.num_layers} layers clearly negative; layers: {spans}), so the "
        "rule has nothing to say."
    )


def _literal_opening(literal: int | None) -> str:
    if literal is None:
        return "No layer: no FFN below the last raises the entropy."
    return f"Layer {literal} is the last below L whose FFN raises the entropy, whatever lies below."


def _doubts(
    layer: int | None,
    literal: int | None,
    stability: float | None,
    alternatives: tuple[Alternative, ...],
    profile: Profile,
) -> list[str]:
    said = []
    if literal != layer:
        said.append(
            f"The paper's rule read literally (the last positive layer below L) names "
            f"{'none' if literal is None else f'layer {literal}'}."
        )
    prompts = profile.num_prompts
    if prompts is None:
        said.append("Only a profile was given: its sampling error is not known.")
    elif stability is None:
        said.append(
            f"One prompt tells nothing about stability: at least {RELIABLE_PROMPTS} are needed."
        )
    elif alternatives and stability < SETTLED:
        others = ", ".join(
            f"{'none' if other.layer is None else f'layer {other.layer}'} {other.share:.0%}"
            for other in alternatives
        )
        said.append(f"The data do not settle it: {stability:.0%} of resamples agree ({others}).")
    return said


def _prompts_sentence(
    profile: Profile, stability: float | None, needed: int | None
) -> tuple[str, ...]:
    """Whether more prompts would help, and how many."""
    prompts = profile.num_prompts
    if prompts is None or stability is None:
        return ()
    enough = "" if needed is None else f"about {needed} would do."
    if prompts < RELIABLE_PROMPTS:
        gradual = "and more would not settle this boundary, which is gradual in itself."
        return (
            f"Too few prompts: {prompts}, unreliable under {RELIABLE_PROMPTS}; "
            + (enough or gradual),
        )
    if stability >= SETTLED:
        return ()
    return (
        f"More prompts would settle it: {enough}"
        if enough
        else "More prompts would not settle it: the boundary itself is gradual.",
    )


def _control_sentence(profile: Profile, layer: int | None) -> list[str]:
    """What vector norms alone would give, and what they leave."""
    if profile.control is None:
        return []
    means, control = profile.means, profile.control
    same_sign = int(np.sum(np.sign(means) == np.sign(control)))
    varies = np.std(means) > 0 and np.std(control) > 0
    alike = float(np.corrcoef(means, control)[0, 1]) if varies else 0.0
    left = float(np.sqrt(np.mean((means - control) ** 2) / max(np.mean(means**2), 1e-30)))
    weights = cut_weights((means - control)[None], profile.errors())[0]
    shares = _layer_shares(weights)
    by_excess = max(shares, key=lambda answer: shares[answer])
    named = "no layer" if by_excess is None else f"layer {by_excess}"
    pure = alike > 0.95 and left < 0.25
    return [
        ("This profile is a norm effect: r" if pure else "R")
        + f"andom vectors of the same norms give correlation {alike:.2f} with it and the same sign "
        f"in {same_sign} of {profile.num_layers} layers, leaving {left:.0%} of its size; on what "
        f"is left the rule names {named}{', too' if by_excess == layer else ''}."
    ]


def _span(span: tuple[int, int]) -> str:
    return str(span[0]) if span[0] == span[1] else f"{span[0]}-{span[1]}"


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
