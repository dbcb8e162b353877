"""The profile that a recommendation is made from: FFN entropy changes, their errors and control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entropylens.resampling import LEAST_PROMPTS, PromptSums

__all__ = ["Profile", "floor_of"]

Array = NDArray[Any]

#: Resamples of the intervals that judge all layers at once.
RESAMPLES = 400
#: Error of a layer's mean entropy change that the dtype itself brings, in nats.
FLOORS = {"float64": 1e-6, "float32": 2e-4}
HALF_PRECISION_FLOOR = 1e-2


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


def floor_of(dtype: str) -> float:
    """Error of a layer's mean entropy change that a dtype itself brings, in nats."""
    return FLOORS.get(dtype, HALF_PRECISION_FLOOR)
