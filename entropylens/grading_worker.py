"""The process that judges answers for `entropylens.grading`: JSON lines in, JSON lines out.

It is started as a script, so that it imports no more than its judge and runs wherever the
parent's interpreter does. What it judges was written by a model, may hang the judge, and some of
reasoning-gym's scorers evaluate it: so it limits itself in time, memory and what it may touch.
Such an answer still shares this process's memory: one written against this very judge could fool
it, which no model does by chance.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

Judge = Callable[[str | None, str], bool]  # of None: whether the gold answers itself

_MEMORY = 4 * 2**30  # bytes of address space: a power tower must not take the machine's
_GRACE = 2.0  # seconds after which a worker ends whose parent did not live to end it
_READING = {"os.listdir", "os.scandir", "os.putenv", "os.unsetenv", "os.add_dll_directory"}
_TOUCHING = {"os", "pty", "shutil", "socket", "subprocess", "tempfile", "webbrowser"}


class UnusableGold(ValueError):
    """The gold answer, not the model's, is what cannot be judged."""


def math_judge() -> Judge:
    """Math-Verify, fed one box at a time: of several in a text it would make one set."""
    math_verify: Any = importlib.import_module("math_verify")

    def parse(answer: str) -> Any:
        return math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)

    def judge(answer: str | None, gold: str) -> bool:
        right = parse(gold)
        if not right:
            raise UnusableGold("Math-Verify finds nothing in it")
        given = right if answer is None else parse(answer)
        return bool(math_verify.verify(right, given, timeout_seconds=None))

    judge("1", "1.0")  # fills the parsers' caches before the first time limit
    return judge


def reasoning_gym_judge() -> Judge:
    """The scorer of the entry's task; its partial credits count as wrong."""
    gym: Any = importlib.import_module("reasoning_gym")
    scorer = functools.cache(gym.get_score_answer_fn)

    def judge(answer: str | None, gold: str) -> bool:
        try:
            content = json.loads(gold)
            score, entry = scorer(content["task"]), json.loads(content["entry"])
            given = entry["answer"] if answer is None else answer
        except Exception as error:
            raise UnusableGold(f"{type(error).__name__}: {error}") from error
        if given is None:  # some tasks have many right answers, and their entries name none
            return True
        try:
            return float(score(given, entry)) == 1.0
        except Exception:  # scorers parse what the model wrote: they raise what they like
            return False

    return judge


JUDGES: dict[str, Callable[[], Judge]] = {
    "math": math_judge,
    "reasoning_gym": reasoning_gym_judge,
}


def main(mode: str, time_limit: float) -> None:
    """Say {} once ready, then answer each {"answer", "gold", "mark"} by its mark and
    {"correct"} or {"error"}.

    Args:
        mode: a key of JUDGES.
        time_limit: seconds after which the parent ends this process.
    """
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library's print is no reply

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        judge = JUDGES[mode]()
    except ImportError as error:
        reply({"error": str(error)})
        return
    _confine()
    reply({})
    for line in sys.stdin.buffer:
        task = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, time_limit + _GRACE)
        try:
            answer: dict[str, Any] = {"correct": judge(task["answer"], task["gold"])}
        except UnusableGold as error:
            answer = {"error": str(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(answer | {"mark": task["mark"]})


def _confine() -> None:
    # The default action ends the process even inside one long product of integers, where
    # Python itself would not get to act. A parent may have blocked or ignored the signal.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    """Refuse to write, start or reach anything: judging needs none of it."""
    if event == "open":
        touching = bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    else:
        touching = event.partition(".")[0] in _TOUCHING and event not in _READING
    if touching:
        raise PermissionError(f"judging an answer may not use {event}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
