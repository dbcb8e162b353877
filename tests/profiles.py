"""Synthetic profiles of FFN entropy changes with known boundaries."""

import numpy as np

from entropylens.profile import Profile
from entropylens.resampling import PromptSums


def three_stages(random, b1=6, b2=26, layers=36, noise=0.05, plunge=1.0):
    """The paper's Qwen3-4B: clearly positive, about zero with either sign, negative."""
    profile = np.concatenate(
        [
            random.uniform(0.5, 1.5, b1),
            random.normal(0, noise, b2 - b1),
            -random.uniform(0.3, 1.5, layers - b2),
        ]
    )
    profile[-1] *= plunge
    return profile


def weak_llama(random, layers):
    """Weakly positive everywhere but the last, whose plunge is 30 times as large."""
    profile = random.uniform(0.1, 0.3, layers)
    profile[-1] = -30 * 0.2
    return profile


def negative(random, layers=30):
    """The bundled model."""
    return -random.uniform(2, 10, layers)


def positive(random, layers=24):
    """Qwen2.5-Coder-0.5B."""
    return random.uniform(0.5, 9, layers)


def isolated(random):
    """One positive layer inside convergence."""
    profile = three_stages(random)
    profile[31] = random.uniform(0.3, 1.5)
    return profile


def block(random):
    """A negative block in the middle (DeepSeek-Math), between clearly positive layers."""
    return np.concatenate(
        [
            random.uniform(0.5, 1.5, 8),
            -random.uniform(0.5, 2, 8),
            random.uniform(0.2, 1.0, 13),
            [-4.0],
        ]
    )


def studied(random, truth, prompts=24, spread=0.3, control=None):
    """What a study on `prompts` prompts sees of a true profile."""
    tokens = random.integers(20, 60, prompts).astype(float)
    common = random.normal(0, 0.5 * spread, (prompts, 1))
    seen = truth + common + random.normal(0, spread, (prompts, len(truth)))
    sums = PromptSums((seen * tokens[:, None])[..., None], tokens)
    return Profile(means=sums.means()[:, 0], sums=sums, floor=2e-4, control=control)
