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
        return int(np.count_nonzero(self.tokens))

    def means(self) -> Array:
        """[L, K], token-weighted."""
        return self.sums.sum(0) / self.tokens.sum()

    def standard_errors(self) -> Array:
        """[L, K], linearised for a ratio; NaN with a single prompt."""
        return _standard_errors(
            self.sums, self.tokens, np.ones((1, len(self.tokens))), self.means()[None]
        )[0]

    def draw(self, resamples: int, seed: int) -> Spread:
        """Draw the prompts anew, `resamples` times."""
        count = len(self.tokens)
        random = np.random.default_rng(seed)
        times = random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
        with np.errstate(invalid="ignore"):  # a draw of prompts that have no tokens here
            drawn = np.einsum("bp,plk->blk", times, self.sums)
            drawn /= (times @ self.tokens)[:, None, None]
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
        base: [L, K], the first's means.
        means: [L, K], second - first.
        base_errors, errors: [L, K], standard errors of these; NaN with a single prompt.
        low, high: [L, K], bootstrap-t of `means`; NaN where one has under 3 prompts.
        base_drawn, drawn: [resamples, L, K].
    """

    base: Array
    means: Array
    base_errors: Array
    errors: Array
    low: Array
    high: Array
    base_drawn: Array
    drawn: Array


def difference(
    first: PromptSums, second: PromptSums, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """The second's means less the first's; prompts that both have are drawn together.

    Args:
        first, second: of the same prompts in the same order, L and K; a prompt that one of them
            lacks has no tokens there (see `prompt_sums`).
        resamples: how often.
        seed: of the draws.
    """
    one, other = first.draw(resamples, seed), second.draw(resamples, seed)  # the same draws
    base, means = first.means(), second.means() - first.means()
    once = np.ones((1, len(first.tokens)))
    errors = _difference_errors(first, second, once, base[None], second.means()[None])[0]
    found = {
        "base": base,
        "means": means,
        "base_errors": first.standard_errors(),
        "errors": errors,
        "base_drawn": one.means,
        "drawn": other.means - one.means,
    }
    if min(first.num_prompts, second.num_prompts) < LEAST_PROMPTS:
        unknown = np.full_like(means, np.nan)
        return Difference(low=unknown, high=unknown, **found)
    drawn_errors = _difference_errors(first, second, one.times, one.means, other.means)
    low, high = _bootstrap_t(means, errors, found["drawn"], drawn_errors, 0.95)
    return Difference(low=low, high=high, **found)


def prompt_sums(
    responses: pd.DataFrame,
    quantities: Sequence[str],
    *,
    unit: str = "prompt_id",
    units: Sequence[str] | None = None,
) -> PromptSums:
    """Sum a per-response frame (`prompt_id, layer, num_tokens` and means) by prompt and layer.

    Args:
        responses: one row a response and layer, as in responses.parquet.
        quantities: the K columns wanted.
        unit: the column that tells prompts apart.
        units: the prompts in their order; those that are not there have no tokens. By default
            those that are there, sorted.
    """
    weighted = responses[list(quantities)].multiply(responses["num_tokens"], axis=0)
    weighted["num_tokens"] = responses["num_tokens"]
    groups = weighted.groupby([responses[unit], responses["layer"]])
    by_prompt = groups.sum(min_count=1).sort_index()  # what a layer does not have stays NaN
    layers = sorted(responses["layer"].unique())
    if units is not None:
        everything = pd.MultiIndex.from_product([units, layers])
        by_prompt = by_prompt.reindex(everything)
        by_prompt.loc[~everything.isin(groups.size().index)] = 0.0
    values = by_prompt.to_numpy(dtype=float).reshape(-1, len(layers), len(quantities) + 1)
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
    first: PromptSums, second: PromptSums, times: Array, first_means: Array, second_means: Array
) -> Array:
    """[B, L, K]: of a difference of ratios, whose prompts may be the same."""
    count = len(first.tokens)
    variance = (
        _standard_errors(first.sums, first.tokens, times, first_means) ** 2
        + _standard_errors(second.sums, second.tokens, times, second_means) ** 2
    )

    def cross(left: Array, right: Array) -> Array:
        return np.einsum("bp,plk->blk", times, left * right)

    lengths = first.tokens[:, None, None], second.tokens[:, None, None]
    product = cross(first.sums, second.sums)
    product -= second_means * cross(first.sums, lengths[1])
    product -= first_means * cross(second.sums, lengths[0])
    product += first_means * second_means * cross(*lengths)
    total = ((times @ first.tokens) * (times @ second.tokens))[:, None, None]
    variance -= 2 * product * count / max(1, count - 1) / total
    return np.sqrt(np.clip(variance, 0, None))


def _nanmax(values: Array, axis: int) -> Array:
    return np.where(np.isfinite(values), values, -np.inf).max(axis=axis)
