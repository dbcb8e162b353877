"""Means over generated tokens, and their sampling error with prompts as the unit.

Tokens of one response, and responses to one prompt, are not independent. So prompts are drawn
anew, each with all its samples, and the ratio sum_r n_r mean_r / sum_r n_r is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["RELIABLE_PROMPTS", "Difference", "PromptSums", "Spread", "difference", "prompt_sums"]

#: Fewer prompts than this give no reliable interval.
RELIABLE_PROMPTS = 20
RESAMPLES = 2000
#: Fewer give no interval at all: two prompts have one resample with an error of its own.
LEAST_PROMPTS = 3

Array = NDArray[Any]


@dataclass(frozen=True)
class PromptSums:
    """Token sums of K quantities at L layers, prompt by prompt.

    Args:
        sums: [prompts, L, K].
        tokens: [prompts], generated tokens.
    """

    sums: Array
    tokens: Array

    @property
    def num_prompts(self) -> int:
        """Independent units."""
        return len(self.tokens)

    def means(self) -> Array:
        """[L, K], token-weighted."""
        return self.sums.sum(0) / self.tokens.sum()

    def standard_errors(self) -> Array:
        """[L, K], linearised for a ratio; NaN with a single prompt."""
        return _standard_errors(
            self.sums, self.tokens, np.ones((1, self.num_prompts)), self.means()[None]
        )[0]

    def draw(self, resamples: int, seed: int) -> Spread:
        """Draw the prompts anew, `resamples` times."""
        count = self.num_prompts
        random = np.random.default_rng(seed)
        times = random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
        drawn = np.einsum("bp,plk->blk", times, self.sums) / (times @ self.tokens)[:, None, None]
        return Spread(self, times, drawn)


@dataclass(frozen=True)
class Spread:
    """Resampled means.

    Args:
        sums: what was resampled.
        times: [resamples, prompts], how often each prompt was drawn.
        means: [resamples, L, K].
    """

    sums: PromptSums
    times: Array
    means: Array

    def studentised(
        self, level: float = 0.95, *, simultaneous: bool = False
    ) -> tuple[Array, Array]:
        """Bootstrap-t interval of each mean; NaN under 3 prompts.

        Args:
            level: coverage.
            simultaneous: cover all layers of a quantity at once (the largest |t| over layers).

        Returns:
            low and high, [L, K].
        """
        centre, error = self.sums.means(), self.sums.standard_errors()
        if self.sums.num_prompts < LEAST_PROMPTS:
            return np.full_like(centre, np.nan), np.full_like(centre, np.nan)
        drawn_error = _standard_errors(self.sums.sums, self.sums.tokens, self.times, self.means)
        if simultaneous:
            t = _t_values(centre, error, self.means, drawn_error)
            widest = np.nanquantile(_nanmax(np.abs(t), axis=1), level, axis=0)
            return centre - widest * error, centre + widest * error
        return _bootstrap_t(centre, error, self.means, drawn_error, level)


@dataclass(frozen=True)
class Difference:
    """Means of one set of responses less those of another, with 95 % intervals.

    Args:
        means: [L, K].
        errors: [L, K], standard errors; NaN with a single prompt.
        low, high: [L, K], bootstrap-t; NaN under 3 prompts.
        drawn: [resamples, L, K].
    """

    means: Array
    errors: Array
    low: Array
    high: Array
    drawn: Array


def difference(
    first: PromptSums,
    second: PromptSums,
    *,
    paired: bool,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The second's means less the first's.

    Args:
        first, second: of the same L and K.
        paired: both are of the same prompts in the same order, which are drawn together.
        resamples: how often.
        seed: of the draws.
    """
    one = first.draw(resamples, seed)
    other = second.draw(resamples, seed if paired else seed + 1)  # one seed, the same prompts
    means, drawn = second.means() - first.means(), other.means - one.means
    single = np.ones((1, first.num_prompts))
    errors = _difference_errors(
        (first, single, first.means()[None]),
        (second, np.ones((1, second.num_prompts)), second.means()[None]),
        paired,
    )[0]
    if min(first.num_prompts, second.num_prompts) < LEAST_PROMPTS:
        unknown = np.full_like(means, np.nan)
        return Difference(means, errors, unknown, unknown, drawn)
    drawn_errors = _difference_errors(
        (first, one.times, one.means), (second, other.times, other.means), paired
    )
    low, high = _bootstrap_t(means, errors, drawn, drawn_errors, 0.95)
    return Difference(means, errors, low, high, drawn)


def prompt_sums(responses: pd.DataFrame, quantities: Sequence[str]) -> PromptSums:
    """Sum a per-response frame (`prompt_id, layer, num_tokens` and means) by prompt and layer.

    Args:
        responses: one row a response and layer, as in responses.parquet.
        quantities: the K columns wanted.
    """
    weighted = responses[list(quantities)].multiply(responses["num_tokens"], axis=0)
    weighted["num_tokens"] = responses["num_tokens"]
    groups = weighted.groupby([responses["prompt_id"], responses["layer"]])
    by_prompt = groups.sum(min_count=1).sort_index()  # what a layer does not have stays NaN
    layers = responses["layer"].nunique()
    values = by_prompt.to_numpy(dtype=float).reshape(-1, layers, len(quantities) + 1)
    return PromptSums(sums=values[..., :-1], tokens=values[:, 0, -1])


def _standard_errors(sums: Array, tokens: Array, times: Array, means: Array) -> Array:
    """[B, L, K]: sqrt(P/(P-1) sum_p w_p (S_p - mean N_p)^2) / sum_p w_p N_p."""
    count = len(tokens)
    if count < 2:
        return np.full_like(means, np.nan)
    square = np.einsum("bp,plk->blk", times, sums**2)
    cross = np.einsum("bp,plk->blk", times, sums * tokens[:, None, None])
    length = times @ tokens**2
    variance = square - 2 * means * cross + means**2 * length[:, None, None]
    total = (times @ tokens)[:, None, None]
    return np.sqrt(np.clip(variance, 0, None) * count / (count - 1)) / total


def _t_values(centre: Array, error: Array, drawn: Array, drawn_error: Array) -> Array:
    # A resample of a single prompt many times has no error of its own: it tells nothing.
    drawn_error = np.where(drawn_error > 1e-3 * error, drawn_error, np.nan)
    return (drawn - centre) / drawn_error


def _bootstrap_t(
    centre: Array, error: Array, drawn: Array, drawn_error: Array, level: float
) -> tuple[Array, Array]:
    t = _t_values(centre, error, drawn, drawn_error)
    constant = ~np.isfinite(t).any(axis=0)
    t[:, constant] = 0.0
    tail = (1 - level) / 2
    low, high = np.nanquantile(t, [tail, 1 - tail], axis=0)
    return centre - high * error, centre - low * error


def _difference_errors(
    first: tuple[PromptSums, Array, Array], second: tuple[PromptSums, Array, Array], paired: bool
) -> Array:
    """[B, L, K]: of a difference of ratios; where prompts are shared, less their covariance."""
    variance = sum(
        _standard_errors(sums.sums, sums.tokens, times, means) ** 2
        for sums, times, means in (first, second)
    )
    if paired:
        (one, times, one_means), (other, _, other_means) = first, second
        count = one.num_prompts

        def cross(left: Array, right: Array) -> Array:
            return np.einsum("bp,plk->blk", times, left * right)

        n_one, n_other = one.tokens[:, None, None], other.tokens[:, None, None]
        product = cross(one.sums, other.sums)
        product -= other_means * cross(one.sums, n_other) + one_means * cross(other.sums, n_one)
        product += one_means * other_means * cross(n_one, n_other)
        total = ((times @ one.tokens) * (times @ other.tokens))[:, None, None]
        variance = variance - 2 * product * count / max(1, count - 1) / total
    return np.sqrt(np.clip(variance, 0, None))


def _nanmax(values: Array, axis: int) -> Array:
    return np.where(np.isfinite(values), values, -np.inf).max(axis=axis)
