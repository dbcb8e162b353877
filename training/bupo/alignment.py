"""Do two gradients point the same way, and how sure is that? Sketches of blocks, and a jackknife.

An interval needs the products of all blocks' gradients with each other, and no machine holds
them all. So each is kept as a random projection, signs and then folding (a count sketch): unbiased
for inner products, with an error of |a| |b| / sqrt(SKETCH_SIZE), and exact up to that many numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor

from entropylens.resampling import LEAST_PROMPTS

__all__ = ["SKETCH_SIZE", "Gradient", "Sketch", "aligned", "dot"]

#: Numbers a sketch. A prime: a weight's heavy columns fall into different places from row to row.
SKETCH_SIZE = 65537
#: Different runs of signs; a gradient of more than this many times the size uses some twice.
SIGN_RUNS = 2**18
#: Keeps atanh finite where two gradients are one.
NEARLY_ONE = 1 - 1e-12

#: One tensor a parameter; None where nothing reached it.
Gradient = Sequence[Tensor | None]
Array = NDArray[Any]


def dot(first: Gradient, second: Gradient) -> float:
    """Inner product over the parameters at the places that both have, summed in float64."""
    pairs = zip(first, second, strict=False)
    products = [
        (a * b).sum(dtype=torch.float64).item() for a, b in pairs if a is not None and b is not None
    ]
    return float(sum(products))


class Sketch:
    """A random projection of gradients to SKETCH_SIZE numbers: linear, the same at each call.

    Args:
        seed: of the signs.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = SKETCH_SIZE + SIGN_RUNS
        self._signs = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
        self._runs = torch.randperm(SIGN_RUNS, generator=generator).tolist()

    def __call__(
        self, gradient: Gradient, sizes: Sequence[int], ends: Sequence[int]
    ) -> Float[Tensor, "ends size"]:
        """Project the first e parameters for each e of `ends`: float64, on the CPU.

        Args:
            gradient: one entry a parameter.
            sizes: numbers of each parameter, also where its entry is None.
            ends: numbers of parameters, in any order.
        """
        total = torch.zeros(SKETCH_SIZE, dtype=torch.float64)
        prefixes: dict[int, Tensor] = {}
        start = 0
        for place, (part, size) in enumerate(zip(gradient, sizes, strict=True), start=1):
            if part is not None:
                total += self._folded(part.reshape(-1), start).cpu()
            start += size
            if place in ends:
                prefixes[place] = total.clone()
        return torch.stack([prefixes[end] for end in ends])

    def _folded(self, flat: Float[Tensor, " numbers"], start: int) -> Float[Tensor, " size"]:
        """The signed number at i goes to (start + i) mod SKETCH_SIZE."""
        signs = self._signs.to(flat)
        folded = torch.zeros(SKETCH_SIZE, dtype=flat.dtype, device=flat.device)
        taken = 0
        while taken < len(flat):
            # Signs of their own each time round, else equal columns would add up.
            turn, low = divmod(start + taken, SKETCH_SIZE)
            high = min(SKETCH_SIZE, low + len(flat) - taken)
            run = self._runs[turn % SIGN_RUNS]
            piece = flat[taken : taken + high - low]
            folded[low:high].addcmul_(piece, signs[run + low : run + high])
            taken += high - low
        return folded


def aligned(
    exact: tuple[float, float, float],
    first: Float[Tensor, "blocks size"],
    second: Float[Tensor, "blocks size"],
    level: float = 0.95,
) -> dict[str, float]:
    """Cosine and norm ratio of two sums over independent blocks, with jackknife intervals.

    `cosine_expected` is the cosine of the blocks' expectations: of products of different blocks
    alone, as sampling noise is independent between them. It is NaN where noise hides either.

    Args:
        exact: <a, a>, <a, b>, <b, b> of the sums; a sketch's error stays out of cosine and ratio.
        first: sketches of a's blocks.
        second: of b's.
        level: of the intervals, which are NaN under 3 blocks.

    Returns:
        `cosine`, `cosine_expected` and `norm_ratio` (|b| / |a|), each with `_low` and `_high`.
    """
    a, b = first.double().numpy(), second.double().numpy()
    grams = np.stack([a @ a.T, a @ b.T, b @ b.T])
    own = np.diagonal(grams, axis1=1, axis2=2)  # [3, blocks]
    noisy = own.sum(1, keepdims=True)
    total = np.array(exact)[:, None]
    # Each block left out in turn.
    totals = grams.sum((1, 2))[:, None] - grams.sum(1) - grams.sum(2) + own
    between, betweens = total - noisy, totals - (noisy - own)
    if min(between[[0, 2]].min(), betweens[[0, 2]].min()) <= 0:
        between, betweens = between * np.nan, betweens * np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.tanh(_interval(_atanh_cosine(total), _atanh_cosine(totals), level))
        ratio = np.exp(_interval(_log_ratio(total), _log_ratio(totals), level))
        expected = _interval(_cosine(between), _cosine(betweens), level)
    return {
        **_named("cosine", cosine),
        **_named("cosine_expected", np.clip(expected, -1, 1)),
        **_named("norm_ratio", ratio),
    }


def _cosine(products: Array) -> Array:
    aa, ab, bb = products
    return ab / np.sqrt(aa * bb)


def _atanh_cosine(products: Array) -> Array:
    return np.arctanh(np.clip(_cosine(products), -NEARLY_ONE, NEARLY_ONE))


def _log_ratio(products: Array) -> Array:
    aa, _, bb = products
    return np.log(bb / aa) / 2


def _interval(estimate: Array, without: Array, level: float) -> Array:
    """[3]: the estimate, and around it Student's t times the jackknife's standard error."""
    half = np.nan
    blocks = len(without)
    if blocks >= LEAST_PROMPTS:
        error = np.sqrt((blocks - 1) * without.var())
        half = student.ppf((1 + level) / 2, blocks - 1) * error
    return np.array([estimate[0], estimate[0] - half, estimate[0] + half])


def _named(name: str, interval: Array) -> dict[str, float]:
    ends = ("", "_low", "_high")
    return {f"{name}{end}": float(it) for end, it in zip(ends, interval, strict=True)}
