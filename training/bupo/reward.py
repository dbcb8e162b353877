"""The reward: whether an answer is right, as veRL's custom reward function."""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Mapping
from typing import Any

from entropylens.errors import SettingError
from entropylens.grading import Grader, task_gold
from entropylens.grading_worker import UnusableGold

__all__ = ["compute_lenient_score", "compute_score"]

logger = logging.getLogger(__name__)

_TASKS = "reasoning_gym/"
_making = threading.Lock()


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    mode: str = "math",
    time_limit: float = 10.0,
    **kwargs: Any,
) -> dict[str, float]:
    """The reward of one response, called by veRL from many threads of a Ray actor.

    Args:
        data_source: "reasoning_gym/<task>", or anything else for mathematics.
        solution_str: the response.
        ground_truth: the right answer; unused for a reasoning-gym task.
        extra_info: of a reasoning-gym task {"entry": the JSON text of the entry}, and "task"
            where data_source does not name it.
        mode: "math" or "strict" for mathematics (`entropylens.grading.Grader`).
        time_limit: seconds an answer may take.
        kwargs: what else veRL passes; unused.

    Returns:
        "score" and "acc", 1.0 where the answer is right and else 0.0; "answered", 1.0 where
        there is an answer. All are 0.0 where no answer to the row could be judged.

    Raises:
        SettingError: no such mode, or a reasoning-gym task without its entry.
    """
    if data_source.startswith(_TASKS):
        mode, gold = "reasoning_gym", _task_gold(data_source, extra_info or {})
    else:
        gold = str(ground_truth)
    with _making:
        grader = _grader(mode, time_limit)
    try:
        grade = grader.grade(solution_str, gold)
    except SettingError as error:
        if not isinstance(error.__cause__, UnusableGold):
            raise
        _warn_once(str(error))  # one bad row must not end a run of days
        return {"score": 0.0, "acc": 0.0, "answered": 0.0}
    right = float(grade.correct)
    return {"score": right, "acc": right, "answered": float(grade.answer is not None)}


def compute_lenient_score(
    data_source: str, solution_str: str, ground_truth: Any, **kwargs: Any
) -> dict[str, float]:
    """For demonstrations with small models: 0.5 where the right answer is at least mentioned.

    Args and Returns: as `compute_score`; "acc" stays strict.
    """
    told = compute_score(data_source, solution_str, ground_truth, **kwargs)
    words = re.findall(r"-?\w+", solution_str)
    mentioned = 0.5 if str(ground_truth) in words else 0.0
    return told | {"score": max(told["score"], mentioned)}


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("a row without reward: %s", message)


@functools.cache
def _grader(mode: str, time_limit: float) -> Grader:
    return Grader(mode, time_limit)


def _task_gold(data_source: str, extra_info: Mapping[str, Any]) -> str:
    task = extra_info.get("task") or data_source.removeprefix(_TASKS)
    entry = extra_info.get("entry")
    if not isinstance(entry, str):
        raise SettingError(
            f"extra_info of data source {data_source!r} holds no reasoning-gym entry",
            'store the JSON text of the entry under extra_info["entry"]',
        )
    return task_gold(task, entry)
