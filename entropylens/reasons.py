"""Does a profile fit the rule, and why should one doubt the answer: in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entropylens.profile import Profile
from entropylens.resampling import RELIABLE_PROMPTS
from entropylens.stages import Stages, cut_weights, layer_shares

__all__ = [
    "SETTLED",
    "control_sentence",
    "doubts",
    "fit_of",
    "literal_opening",
    "opening",
    "prompts_sentence",
]

Array = NDArray[Any]

#: From this stability on a recommendation counts as settled.
SETTLED = 0.9
#: So many negative layers in a row are no noise around zero (1 in 128).
LONG_RUN = 7


def fit_of(
    profile: Profile, stages: Stages, layer: int | None, stability: float | None
) -> tuple[str, list[str]]:
    """Does the profile have the shape that the rule speaks of, and what speaks against it."""
    if layer is None or stages.exploration is None:
        return "no", []
    means, errors = profile.means, profile.errors()
    explored = means[: stages.exploration[1]]
    if stages.convergence is None and means[-1] > 0 and np.mean(means > 0) >= 0.9:
        return "no", [
            "No FFN layer converges, so there is no boundary to stop at: L-1 is only the last "
            "inner layer, and the paper's own penultimate policy collapsed in training (Fig. 4)."
        ]
    against = []
    if stability is not None and stability < 0.5:
        against.append("No layer holds half of the resamples: no boundary stands out.")
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
    if float(np.median(explored)) < 3 * float(np.median(errors[: len(explored)])):
        against.append("The exploring changes hardly stand out of their error.")
    if profile.control is not None:
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


def opening(layer: int | None, stages: Stages, profile: Profile) -> str:
    """The answer of the ordered fit, with its stages."""
    spans = ", ".join(
        f"{name} {_span(span)}"
        for name, span in (
            ("exploration", stages.exploration),
            ("integration", stages.integration),
            ("convergence", stages.convergence),
        )
        if span is not None
    )
    if layer is not None and stages.exploration != (1, layer):
        return f"Layer {layer} is the last inner layer of an exploration without end ({spans})."
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


def literal_opening(literal: int | None) -> str:
    """The answer of the literal rule."""
    if literal is None:
        return "No layer: no FFN below the last raises the entropy."
    return f"Layer {literal} is the last below L whose FFN raises the entropy, whatever lies below."


def doubts(
    layer: int | None,
    literal: int | None,
    stability: float | None,
    others: Mapping[int | None, float],
    profile: Profile,
) -> list[str]:
    """Where the literal rule differs, what is not known, and what else came out."""
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
    elif others and stability < SETTLED:
        named = ", ".join(
            f"{'none' if other is None else f'layer {other}'} {share:.0%}"
            for other, share in others.items()
        )
        said.append(f"The data do not settle it: {stability:.0%} of resamples agree ({named}).")
    return said


def prompts_sentence(
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


def control_sentence(profile: Profile, layer: int | None) -> list[str]:
    """What vector norms alone would give, and what they leave."""
    if profile.control is None:
        return []
    means, control = profile.means, profile.control
    same_sign = int(np.sum(np.sign(means) == np.sign(control)))
    varies = np.std(means) > 0 and np.std(control) > 0
    alike = float(np.corrcoef(means, control)[0, 1]) if varies else 0.0
    left = float(np.sqrt(np.mean((means - control) ** 2) / max(np.mean(means**2), 1e-30)))
    weights = cut_weights((means - control)[None], profile.errors())[0]
    shares = layer_shares(weights)
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
