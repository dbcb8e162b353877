"""When to stop: looks at doublings of prompts, each held to a bound that all of them share.

Two things can make a choice of layer wrong, and they are asked for apart.

The profile may be gradual in itself: then no number of prompts names one layer. `stability`
counts this, for each resample splits its vote by the weights of its fit. Looking again does not
make it likelier to be overlooked, as it is not a matter of chance; so every look asks for
stability of at least p.

The prompts may mislead by chance, and whoever looks K times gives chance K occasions. The share
of resamples whose own fit names the layer, `agreement`, is the bootstrap's probability that
other prompts say the same. Declaring a wrong layer at look k needs an agreement of at least
1 - a_k, which happens with probability a_k at most (exactly, where two layers tie and the
profile is normal; less, the farther from a tie). The looks together are wrong with probability
sum a_k at most, whatever depends on what between them: with a_k = (1 - p)/K that is 1 - p
(Bonferroni; looks at doublings have correlations of 0.7 and less, so little is given away).

The first look has as many prompts as an interval needs to be reliable. The simulation in
tests/test_quick.py holds all this against profiles near ties.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from entropylens.errors import SettingError
from entropylens.profile import Profile
from entropylens.resampling import RELIABLE_PROMPTS
from entropylens.stages import CHUNK, cut_weights

__all__ = ["Look", "agreement_bound", "check_until_sure", "look_at", "looks_frame", "planned_looks"]

RESAMPLES = 400
#: Prompts of the first look.
FIRST_LOOK = RELIABLE_PROMPTS
#: A look at more than this share of all prompts saves nothing before the last one.
LATEST = 2 / 3


class Look(NamedTuple):
    """What a look at some prompts says; see this module.

    Args:
        prompts: how many were looked at.
        layer: the answer, None for no layer.
        stability: share of votes for it, where each resample splits its vote by its fit; NaN
            where a layer has no FFN.
        agreement: share of resamples whose own fit names it.
        bound: what agreement must reach.
        sure: stability and agreement reach their bounds, on enough prompts. Where they cannot
            any more, the two are of the resamples that it took to see that.
    """

    prompts: int
    layer: int | None
    stability: float
    agreement: float
    bound: float
    sure: bool


def check_until_sure(until_sure: float | None) -> None:
    """Refuse what is no probability that one could be sure with.

    Raises:
        SettingError: it is not between 0.5 and 1.
    """
    if until_sure is not None and not 0.5 < until_sure < 1:
        raise SettingError(f"until_sure is {until_sure}", "give a probability such as 0.95")


def planned_looks(num_prompts: int) -> tuple[int, ...]:
    """Numbers of prompts to look at: doublings, and all."""
    doublings = []
    prompts = FIRST_LOOK
    while prompts <= LATEST * num_prompts:
        doublings.append(prompts)
        prompts *= 2
    return (*doublings, num_prompts)


def agreement_bound(until_sure: float, looks: int) -> float:
    """What agreement must reach at each of some looks (see this module)."""
    return 1 - (1 - until_sure) / looks


def look_at(
    profile: Profile, until_sure: float, looks: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> Look:
    """Is the choice of layer sure enough?

    Args:
        profile: of the prompts so far.
        until_sure: how probable the answer must be.
        looks: how many looks are planned.
        seed: of the resamples; with as many of them, `recommend` sees the same ones.
        resamples: how often prompts are drawn anew.
    """
    prompts, bound = profile.num_prompts or 0, agreement_bound(until_sure, looks)
    if not np.isfinite(profile.means).all():  # no profile, however many prompts
        return Look(prompts, None, np.nan, 1.0, bound, True)
    draws, errors = profile.resampled(resamples, seed), profile.errors()
    resamples = len(draws)
    votes = np.empty((0, profile.num_layers))
    for start in range(0, resamples, CHUNK):
        votes = np.concatenate([votes, _votes(draws[start : start + CHUNK], errors)])
        winner = int(np.argmax(votes.mean(0)))
        named = votes.argmax(1) == winner
        # What is still to come may at best agree altogether.
        best_agreement = 1 - np.sum(~named) / resamples
        best_stability = 1 - np.sum(1 - votes[:, winner]) / resamples
        possible = best_agreement >= bound and best_stability >= until_sure
        if not possible:
            break
    return Look(
        prompts=prompts,
        layer=winner or None,
        stability=float(votes[:, winner].mean()),
        agreement=float(named.mean()),
        bound=bound,
        sure=bool(possible and prompts >= FIRST_LOOK),
    )


def _votes(draws: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """[resamples, L]: each one's weights of no layer and of layers 1..L-1, as `layer_shares`."""
    by_cut = cut_weights(draws, errors).sum(2)
    votes: np.ndarray = by_cut[:, :-1].copy()
    votes[:, -1] += by_cut[:, -1]
    return votes


def looks_frame(looks: list[Look]) -> pd.DataFrame:
    """One row a look."""
    frame = pd.DataFrame(looks, columns=list(Look._fields))
    return frame.astype({"layer": "Int64"})
