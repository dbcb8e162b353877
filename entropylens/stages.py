"""Exploration | integration | convergence, learnt from a profile of entropy changes (Sec. 3.2).

A profile delta_1..delta_L is cut at b1 <= b2. Layers up to b1 explore: their changes are
positive, of log-normal size. Layers b1+1..b2 integrate: normal around zero. The rest converge:
negative, of log-normal size. Each layer may be an exception of any sign and size. The sizes and
the width of "about zero" are not set but integrated out over flat priors, with the one
expectation that typical sizes are at least twice that width; so every cut has a weight: its posterior
probability. A layer's own error (sampling or dtype, whichever is larger) widens what each stage
allows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

__all__ = ["STAGES", "Stages", "cut_weights", "stages_of"]

STAGES = ("exploration", "integration", "convergence")

Array = NDArray[Any]

#: Share of layers that follow no stage.
EXCEPTIONS = 0.03
#: Share of its layers that must have a one-signed stage's sign.
SAME_SIGN = 0.75
#: Typical sizes of the outer stages, in widths of "about zero".
CLEAR_OF_ZERO = 2.0
#: Prior probability that they are not that clear.
UNCLEAR = 0.1
#: A size is not modelled more finely than this share of it.
SIZE_GRAIN = 0.06
_SIZES = np.geomspace(1e-4, 1e2, 240)
_MEDIANS = np.geomspace(1e-3, 3e1, 22)
_SPREADS = np.array([0.15, 0.3, 0.6, 0.9])
_WIDTHS = np.geomspace(1e-4, 1e1, 24)


def _priors() -> tuple[Array, Array]:
    """Probability of each size under each log-normal, and of each log-normal given each width.

    Returns:
        [sizes, medians * spreads] and [medians * spreads, widths]; columns sum to 1.
    """
    median, spread = (grid.ravel() for grid in np.meshgrid(_MEDIANS, _SPREADS))
    size = np.exp(-0.5 * ((np.log(_SIZES)[:, None] - np.log(median)) / spread) ** 2)
    clear = (median[:, None] >= CLEAR_OF_ZERO * _WIDTHS).astype(float)
    anyhow = np.full_like(clear, 1 / len(clear))
    return size / size.sum(0), (1 - UNCLEAR) * clear / clear.sum(0) + UNCLEAR * anyhow


_SIZE_GIVEN_NORMAL, _NORMAL_GIVEN_WIDTH = _priors()


@dataclass(frozen=True)
class Stages:
    """Each stage as a first and a last layer (from 1), or None where it is empty."""

    exploration: tuple[int, int] | None
    integration: tuple[int, int] | None
    convergence: tuple[int, int] | None

    def of(self, layer: int) -> str:
        """The stage that a layer belongs to.

        Raises:
            ValueError: no stage has this layer.
        """
        for name in STAGES:
            span = getattr(self, name)
            if span is not None and span[0] <= layer <= span[1]:
                return name
        raise ValueError(f"no stage holds layer {layer}")

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


def cut_weights(profiles: Array, errors: Array) -> Array:
    """Posterior weight of every pair of cuts.

    Args:
        profiles: [resamples, L] entropy changes in nats.
        errors: [L] or [resamples, L], each layer's standard error in nats, above zero.

    Returns:
        [resamples, L + 1, L + 1]: weight of (b1, b2), 0 where b1 > b2; each resample sums to 1.
    """
    profiles = np.atleast_2d(profiles)
    resamples, layers = profiles.shape
    error = np.broadcast_to(errors, profiles.shape)
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
    weight += _given_width(explores)[:, :, None] + _given_width(converges)[:, None, :]
    weight = logsumexp(weight, axis=-1)
    weight[:, np.tril(np.ones((layers + 1, layers + 1), dtype=bool), -1)] = -np.inf
    weight[~_one_signed(profiles)] = -np.inf
    weight.swapaxes(1, 2)[~_one_signed(-profiles[:, ::-1])[:, ::-1]] = -np.inf
    weight -= logsumexp(weight, axis=(1, 2), keepdims=True)
    return np.exp(weight)


def _one_signed(profiles: Array) -> Array:
    """[resamples, L + 1]: may the first k layers be a stage of positive sign?"""
    above = profiles > 0
    count = np.arange(1, profiles.shape[1] + 1)
    # It ends with a layer of its sign and holds few of the other.
    enough = above & (np.cumsum(above, axis=1) >= SAME_SIGN * count)
    return np.concatenate([np.ones_like(enough[:, :1]), enough], axis=1)


def _given_width(log_likelihood: Array) -> Array:
    """[resamples, L + 1, widths]: integrate the log-normal out that each width allows."""
    top = log_likelihood.max(-1, keepdims=True)
    mean = np.exp(log_likelihood - top) @ _NORMAL_GIVEN_WIDTH
    return np.log(mean + 1e-300) + top


def _normal(value: Array, mean: Array, variance: Array) -> Array:
    return np.exp(-0.5 * (value - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)


def _prefix(log_density: Array) -> Array:
    """[resamples, L + 1, parameters]: summed over the first k layers."""
    return np.concatenate(
        [np.zeros_like(log_density[:, :1]), np.cumsum(log_density, axis=1)], axis=1
    )
