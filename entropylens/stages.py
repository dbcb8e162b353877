"""Exploration | integration | convergence, learnt from a profile of entropy changes (Sec. 3.2).

A profile delta_1..delta_L is cut at b1 <= b2. Layers up to b1 explore: their changes are
positive, of log-normal size. Layers b1+1..b2 integrate: both signs, normal around zero. The rest
converge: negative, of log-normal size. Each layer may be an exception of any sign and size. The
sizes and the width of "about zero" are not set but integrated out over flat priors, with the two
expectations that typical sizes are at least twice that width and that integration rather begins
with a change of sign; so every cut has a weight: its posterior probability. A layer's own error
(sampling or dtype, whichever is larger) widens what each stage allows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import binom

__all__ = ["STAGES", "Stages", "cut_weights", "layer_shares", "stages_of"]

STAGES = ("exploration", "integration", "convergence")

Array = NDArray[Any]

#: Share of layers that follow no stage.
EXCEPTIONS = 0.03
#: Share of its layers that must have a one-signed stage's sign.
SAME_SIGN = 0.75
#: Typical sizes of the outer stages, in widths of "about zero".
CLEAR_OF_ZERO = 2.0
#: Prior probability that exploration is not that clear (a disordered profile still has one).
UNCLEAR = 0.1
#: Integration holds both signs: from three layers on it has one of each, and its rarer sign is
#: as frequent as fair coins make it but once in 200 times.
FAIR_COINS = 0.005
#: Odds that a positive layer right after exploration is not exploration's still.
CARRIES_ON = 0.5
#: A size is not modelled more finely than this share of it.
SIZE_GRAIN = 0.06
#: Profiles weighed at a time; bounds the memory.
CHUNK = 32
_SIZES = np.geomspace(1e-4, 1e2, 180)
_MEDIANS = np.geomspace(1e-3, 3e1, 22)
_SPREADS = np.array([0.15, 0.3, 0.6, 0.9])
_WIDTHS = np.geomspace(1e-4, 1e1, 16)


def _priors() -> tuple[Array, Array, Array]:
    """Probability of each size under each log-normal, and of each log-normal given each width.

    Returns:
        [sizes, medians * spreads], and twice [medians * spreads, widths], of convergence and of
        exploration; columns sum to 1.
    """
    median, spread = (grid.ravel() for grid in np.meshgrid(_MEDIANS, _SPREADS))
    size = np.exp(-0.5 * ((np.log(_SIZES)[:, None] - np.log(median)) / spread) ** 2)
    clear = (median[:, None] >= CLEAR_OF_ZERO * _WIDTHS).astype(float)
    anyhow = np.full_like(clear, 1 / len(clear))
    clear /= clear.sum(0)
    return size / size.sum(0), clear, (1 - UNCLEAR) * clear + UNCLEAR * anyhow


_SIZE_GIVEN_NORMAL, _CONVERGES_GIVEN_WIDTH, _EXPLORES_GIVEN_WIDTH = _priors()


@dataclass(frozen=True)
class Stages:
    """Each stage as a first and a last layer (from 1), or None where it is empty."""

    exploration: tuple[int, int] | None
    integration: tuple[int, int] | None
    convergence: tuple[int, int] | None

    def of(self, layer: int) -> str | None:
        """The stage that a layer belongs to, or None where the stages were not found."""
        for name in STAGES:
            span = getattr(self, name)
            if span is not None and span[0] <= layer <= span[1]:
                return name
        return None

    def to_dict(self) -> dict[str, list[list[int]]]:
        """Lists of [first, last], as analysis.json has them."""
        return {
            name: [] if getattr(self, name) is None else [list(getattr(self, name))]
            for name in STAGES
        }


def stages_of(exploration_end: int, integration_end: int, num_layers: int) -> Stages:
    """Stages from the cuts b1 and b2."""

    def span(before: int, last: int) -> tuple[int, int] | None:
        return (before + 1, last) if last > before else None

    return Stages(
        span(0, exploration_end),
        span(exploration_end, integration_end),
        span(integration_end, num_layers),
    )


def layer_shares(weights: Array) -> dict[int | None, float]:
    """Weight of each target layer: no exploration is None, exploration to the end is L - 1.

    Args:
        weights: [L + 1, L + 1], one profile's of `cut_weights`.
    """
    by_cut = weights.sum(1)
    last = len(by_cut) - 1
    shares: dict[int | None, float] = {None: float(by_cut[0])}
    for cut in range(1, last + 1):
        answer = min(cut, last - 1) or None
        shares[answer] = shares.get(answer, 0.0) + float(by_cut[cut])
    return shares


def cut_weights(profiles: Array, errors: Array) -> Array:
    """Posterior weight of every pair of cuts.

    Args:
        profiles: [resamples, L] entropy changes in nats.
        errors: [L] or [resamples, L], each layer's standard error in nats, above zero.

    Returns:
        [resamples, L + 1, L + 1]: weight of (b1, b2), 0 where b1 > b2; each resample sums to 1.
    """
    profiles = np.atleast_2d(profiles)
    error = np.broadcast_to(errors, profiles.shape)
    chunks = range(0, len(profiles), CHUNK)
    return np.concatenate(
        [_cut_weights(profiles[at : at + CHUNK], error[at : at + CHUNK]) for at in chunks]
    )


def _cut_weights(profiles: Array, error: Array) -> Array:
    layers = profiles.shape[1]
    variance = error**2 + (SIZE_GRAIN * profiles) ** 2 + (0.5 * _SIZES[0]) ** 2
    positive = _normal(profiles[..., None], _SIZES, variance[..., None])
    negative = _normal(-profiles[..., None], _SIZES, variance[..., None])
    exception = EXCEPTIONS * 0.5 * (positive.mean(-1) + negative.mean(-1))[..., None]

    def log_mixture(density: Array) -> Array:
        return np.log((1 - EXCEPTIONS) * density + exception + 1e-300)

    explores = _prefix(log_mixture(positive @ _SIZE_GIVEN_NORMAL))
    converges = _prefix(log_mixture(negative @ _SIZE_GIVEN_NORMAL))
    converges = converges[:, -1:] - converges
    spread = variance[..., None] + _WIDTHS**2
    integrates = _prefix(log_mixture(_normal(profiles[..., None], 0.0, spread)))

    # Given the width of "about zero" the three stages are independent.
    weight = integrates[:, None, :] - integrates[:, :, None]
    weight += _given_width(explores, _EXPLORES_GIVEN_WIDTH)[:, :, None]
    weight += _given_width(converges, _CONVERGES_GIVEN_WIDTH)[:, None, :]
    weight = logsumexp(weight, axis=-1)
    # As likely as not there is no integration; where there is, it may be anywhere.
    weight[:, np.eye(layers + 1, dtype=bool)] += np.log(max(layers, 2) / 2)
    weight += np.log(CARRIES_ON) * _carries_on(profiles)
    weight[~_both_signs(profiles)] = -np.inf
    weight[~_one_signed(profiles + error)] = -np.inf
    weight.swapaxes(1, 2)[~_one_signed((error - profiles)[:, ::-1])[:, ::-1]] = -np.inf
    weight -= logsumexp(weight, axis=(1, 2), keepdims=True)
    return np.exp(weight)


def _one_signed(profiles: Array) -> Array:
    """[resamples, L + 1]: may the first k layers, errors granted, be a stage of positive sign?"""
    above = profiles > 0
    count = np.arange(1, profiles.shape[1] + 1)
    # It ends with a layer of its sign and holds few of the other.
    enough = above & (np.cumsum(above, axis=1) >= SAME_SIGN * count)
    return np.concatenate([np.ones_like(enough[:, :1]), enough], axis=1)


def _both_signs(profiles: Array) -> Array:
    """[resamples, L + 1, L + 1]: is b1 <= b2, and may the layers between be about zero?"""
    cuts = np.arange(profiles.shape[1] + 1)
    length = cuts[None, :] - cuts[:, None]
    above = np.cumsum(np.pad(profiles > 0, ((0, 0), (1, 0))), axis=1)
    positive: Array = above[:, None, :] - above[:, :, None]
    least = np.maximum(binom.ppf(FAIR_COINS, np.clip(length, 0, None), 0.5), length >= 3)
    return (length >= 0) & (np.minimum(positive, length - positive) >= least)


def _carries_on(profiles: Array) -> Array:
    """[resamples, L + 1, L + 1]: does integration begin with exploration's sign?"""
    cuts = np.arange(profiles.shape[1] + 1)
    positive: Array = np.pad(profiles > 0, ((0, 0), (0, 1)))
    return positive[:, :, None] & (cuts[:, None] > 0) & (cuts[None, :] > cuts[:, None])


def _given_width(log_likelihood: Array, prior: Array) -> Array:
    """[resamples, L + 1, widths]: integrate the log-normal out that each width allows."""
    top = log_likelihood.max(-1, keepdims=True)
    mean = np.exp(log_likelihood - top) @ prior
    return np.log(mean + 1e-300) + top


def _normal(value: Array, mean: Array | float, variance: Array) -> Array:
    return np.exp(-0.5 * (value - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)


def _prefix(log_density: Array) -> Array:
    """[resamples, L + 1, parameters]: summed over the first k layers."""
    return np.concatenate(
        [np.zeros_like(log_density[:, :1]), np.cumsum(log_density, axis=1)], axis=1
    )
