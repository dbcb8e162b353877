"""What a laboratory run is made of: everything that is fixed before the first step."""

from __future__ import annotations

from dataclasses import dataclass, field

from bupo.lab.run import Course
from bupo.lab.subject import Lesson

__all__ = ["FULL", "QUICK", "Plan"]


@dataclass(frozen=True)
class Plan:
    """A laboratory run.

    Args:
        lessons: of the starts.
        course: of all arms; the grid sets its learning rate.
        internal_steps: s_inter.
        seeds: how many the primary contrast has from each start, none of which is another's.
        other_seeds: how many the other arms have: the first ones.
        layer: l of BuPO; None for what the analyzer recommends.
        problems: of the test split, asked in the end.
        samples: K, answers to each.
        analyzed: problems whose answers are analyzed before training.
        probed: problems whose answers give the gradients that are compared before training.
        learning_rates: of the grid, ascending; () for the course's own.
        grid_seeds: how many the grid's runs have from each start.
        race: internal steps of the layer race's last round; 0 for none.
        intervals: whether there are seeds enough for intervals.
        through_verl: repeat BuPO's first run through veRL.
    """

    lessons: tuple[Lesson, ...]
    course: Course = field(default_factory=Course)
    internal_steps: int = 10
    seeds: int = 4
    other_seeds: int = 2
    layer: int | None = None
    problems: int = 256
    samples: int = 16
    analyzed: int = 128
    probed: int = 64
    learning_rates: tuple[float, ...] = ()
    grid_seeds: int = 1
    race: int = 0
    intervals: bool = True
    through_verl: bool = False


#: Of the seeds 1 to 6, the two whose starts show a boundary in one reading most stably.
_LESSONS = (Lesson(seed=1), Lesson(seed=6))

FULL = Plan(lessons=_LESSONS, learning_rates=(3e-5, 1e-4, 3e-4, 1e-3), race=20, through_verl=True)
#: Two seeds tell nothing about differences: the mechanics, in minutes.
QUICK = Plan(
    lessons=_LESSONS, course=Course(steps=30, prompts=16, held_out=64), internal_steps=3,
    seeds=1, other_seeds=1, problems=64, samples=8, analyzed=64, probed=32,
    intervals=False,
)  # fmt: skip
