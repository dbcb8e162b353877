"""How far the boundaries of the stages lie apart in two models, with what is open about them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entropylens.resampling import LEAST_PROMPTS
from entropylens.stages import cut_weights

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["boundary_shifts"]

Array = NDArray[Any]

#: Resamples whose cuts are weighed.
RESAMPLES = 400


def boundary_shifts(first: Analysis, second: Analysis, reading: str, seed: int) -> pd.DataFrame:
    """Where exploration and integration end in two models, and how far that shifts.

    Args:
        first, second: both measured in this reading.
        reading: raw | normed.
        seed: of the resamples.

    Returns:
        As `ModelContrast.boundaries`.
    """
    columns = ["boundary", "first", "second", "shift", "low", "high", "unit"]
    shares = [_cut_shares(analysis, reading, seed) for analysis in (first, second)]
    if any(it is None for it in shares):
        return pd.DataFrame(columns=columns)
    one, other = [it for it in shares if it is not None]
    stages = [analysis.recommendations[reading].stages for analysis in (first, second)]
    ends = [
        (
            0 if it.exploration is None else it.exploration[1],
            analysis.num_layers if it.convergence is None else it.convergence[0] - 1,
        )
        for it, analysis in zip(stages, (first, second), strict=True)
    ]
    scales, unit = (1.0, 1.0), "layers"
    if first.num_layers != second.num_layers:
        scales, unit = (100 / first.num_layers, 100 / second.num_layers), "% of depth"
    names = ("last exploring layer", "last layer before convergence")
    rows = []
    for place, name in enumerate(names):
        low = high = math.nan
        if min(first.num_prompts, second.num_prompts) >= LEAST_PROMPTS:
            low, high = _shift_interval(one[place], other[place], scales)
        before, after = ends[0][place], ends[1][place]
        shift = after * scales[1] - before * scales[0]
        rows.append((name, before, after, shift, low, high, unit))
    return pd.DataFrame(rows, columns=columns)


def _cut_shares(analysis: Analysis, reading: str, seed: int) -> tuple[Array, Array] | None:
    """Probability of each place of the two cuts, over prompts drawn anew and the fit's weights."""
    profile = analysis.profile(reading)
    if not np.isfinite(profile.means).all():
        return None
    weights = cut_weights(profile.resampled(RESAMPLES, seed), profile.errors()).mean(0)
    return weights.sum(1), weights.sum(0)


def _shift_interval(
    first: Array, second: Array, scales: tuple[float, float]
) -> tuple[float, float]:
    """95 % of second - first, as if the two were independent (shared prompts make it narrower)."""
    before, after = np.arange(len(first)) * scales[0], np.arange(len(second)) * scales[1]
    shift = (after[None, :] - before[:, None]).ravel()
    weight = (first[:, None] * second[None, :]).ravel()
    order = np.argsort(shift)
    total = np.cumsum(weight[order])
    low, high = (
        shift[order][min(len(order) - 1, int(np.searchsorted(total, level)))]
        for level in (0.025, 0.975)
    )
    return float(low), float(high)
