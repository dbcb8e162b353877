"""Which policy a step trains (Eq. 11), and when the internal phase ends where that is not fixed.

With a number, steps 1..internal_steps train pi_l, as the authors' code does (Algorithm 1 read to
the letter makes one more). With `auto`, which is beyond the paper, the phase ends after a step of
at least MIN_STEPS when

* KL(pi_theta at step 0 || pi_theta) on the fixed set exceeds `kl_bound` in two looks running, or
* the reward of the last WINDOW steps lies below that of the first WINDOW by more than the 95 %
  interval of their difference (prompts are the units; looking at every step makes a false alarm
  somewhat likelier than 2.5 %), or
* `max_internal_steps` are made.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from bupo.settings import AUTO, Settings
from entropylens.files import make_directory, write_text

__all__ = ["MIN_STEPS", "WINDOW", "Phase"]

logger = logging.getLogger(__name__)

#: No decision before this step; steps whose rewards are compared; the normal's 97.5 % point.
MIN_STEPS, WINDOW, _Z = 5, 3, 1.959964


@dataclass
class Phase:
    """The phases of one run.

    Args:
        settings: of the run.
        file: where `auto` keeps what it saw and decided.
    """

    settings: Settings
    file: Path
    _kl: dict[int, float] = field(default_factory=dict)
    _rewards: dict[int, list[float]] = field(default_factory=dict)
    _ended: tuple[int, str] | None = None

    @property
    def last_internal_step(self) -> int | None:
        """s_inter: known from the start, or None while `auto` has not decided."""
        steps = self.settings.internal_steps
        if steps != AUTO:
            return int(steps)
        return None if self._ended is None else self._ended[0]

    def is_internal(self, step: int) -> bool:
        """Whether this step (from 1) trains pi_l."""
        last = self.last_internal_step
        if last is None:  # its maximum holds even if its file is lost
            last = self.settings.max_internal_steps or 0
        return step <= last

    def resume(self, step: int) -> None:
        """Take up what was seen up to `step`; what came after it is forgotten."""
        if self.settings.internal_steps != AUTO or not self.file.is_file():
            return
        found = json.loads(self.file.read_text(encoding="utf-8"))
        self._kl = {int(at): kl for at, kl in found["kl"].items() if int(at) <= step}
        self._rewards = {int(at): it for at, it in found["rewards"].items() if int(at) <= step}
        ended = found["ended"]
        self._ended = (ended[0], ended[1]) if ended is not None and ended[0] <= step else None

    def saw(self, step: int, rewards: Sequence[float], kl: float | None) -> str | None:
        """Note a finished step: mean rewards of its prompts, and the fixed set's KL if looked at.

        Returns:
            Why the internal phase ends with this step, or None.
        """
        if self.settings.internal_steps != AUTO or self._ended is not None:
            return None
        self._rewards[step] = list(rewards)
        if kl is not None:
            self._kl[step] = kl
        reason = self._reason(step)
        if reason is not None:
            self._ended = (step, reason)
            logger.warning("the internal phase ends with step %d: %s", step, reason)
        self._save()
        return reason

    def _reason(self, step: int) -> str | None:
        if step >= int(self.settings.max_internal_steps or 0):
            return f"{step} steps are the most that max_internal_steps allows"
        if step < MIN_STEPS:
            return None
        looks = [self._kl[at] for at in sorted(self._kl)][-2:]
        bound = self.settings.kl_bound
        if step in self._kl and len(looks) == 2 and min(looks) > bound:
            return (
                f"KL to step 0 is {looks[0]:.3g} and {looks[1]:.3g} nats a token in two looks "
                f"running, over the bound of {bound:g}"
            )
        steps = sorted(self._rewards)
        if len(steps) < 2 * WINDOW:
            return None
        start = [it for at in steps[:WINDOW] for it in self._rewards[at]]
        now = [it for at in steps[-WINDOW:] for it in self._rewards[at]]
        fall = fmean(start) - fmean(now)
        half = _Z * math.sqrt(_squared_error(start) + _squared_error(now))
        if fall > half:
            return (
                f"reward fell from {fmean(start):.3f} to {fmean(now):.3f}, by {fall:.3f} with a "
                f"95 % half-width of {half:.3f}"
            )
        return None

    def _save(self) -> None:
        content: dict[str, Any] = {"kl": self._kl, "rewards": self._rewards, "ended": self._ended}
        make_directory(self.file.parent)
        write_text(self.file, json.dumps(content, indent=1) + "\n")


def _squared_error(values: Sequence[float]) -> float:
    return variance(values) / len(values) if len(values) > 1 else 0.0
