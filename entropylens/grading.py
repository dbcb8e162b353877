"""Is an answer right? Math-Verify in processes of its own, which are ended where they hang."""

from __future__ import annotations

import importlib.metadata
import json
import os
import queue
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, get_args

from entropylens.answers import last_boxed, reads_as
from entropylens.errors import SettingError
from entropylens.grading_process import Worker
from entropylens.grading_worker import UnusableGold

__all__ = ["Grade", "Grader", "Mode", "Verdict", "task_gold"]

Mode = Literal["math", "strict", "reasoning_gym"]
Verdict = Literal["correct", "wrong", "no answer", "timeout", "crashed"]

_REMEDIES = {
    "math": "mend the gold answer, or grade with mode strict",
    "reasoning_gym": "give task_gold() a task's name and the JSON text of the whole entry",
}
_PACKAGES = {"math": "math-verify", "strict": "entropylens", "reasoning_gym": "reasoning-gym"}
_FAULTS: dict[Verdict, str] = {
    "wrong": "it does not answer itself",
    "timeout": "judging it takes longer than the time limit",
    "crashed": "judging it ends the judge",
}


@dataclass(frozen=True)
class Grade:
    """What became of one answer.

    Args:
        answer: what was taken for the answer, or None.
        verdict: why: "timeout" and "crashed" are the judge's ends, and count as wrong.
    """

    answer: str | None
    verdict: Verdict

    @property
    def correct(self) -> bool:
        """Whether it is right."""
        return self.verdict == "correct"


class Grader:
    """Judges answers, from any number of threads at once.

    Worker processes start when first needed and end with the grader, its block or the
    interpreter. A process forked from this one starts its own.

    Args:
        mode: "math" asks Math-Verify about the last box where it does not read as the gold
            answer; "strict" never asks (`strict_match`); "reasoning_gym" asks the scorer of a
            task about the last box, or the last line without any, and takes full marks alone.
        time_limit: seconds an answer may take a worker.
        workers: processes, and so the answers judged at once.

    Raises:
        SettingError: no such mode, or a limit or a number of workers that is not positive.
    """

    def __init__(self, mode: str = "math", time_limit: float = 10.0, workers: int = 1) -> None:
        if mode not in get_args(Mode):
            raise SettingError(f"no grading mode is called {mode!r}", f"give one of {_modes()}")
        if not 0 < time_limit < float("inf") or workers < 1:
            raise SettingError(
                f"time_limit={time_limit} and workers={workers} grade nothing",
                "give a positive number of seconds and at least one worker",
            )
        self.mode = mode
        self._workers = [Worker(mode, time_limit) for _ in range(workers)]
        self._free = _queue_of(self._workers)
        weakref.finalize(self, _stop, self._workers)
        # Without it, a forked child would read its parent's replies, and end its workers.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(reference()))

    @property
    def name(self) -> str:
        """What judges, and its version."""
        package = _PACKAGES[self.mode]
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # the first answer will say so
            version = "missing"
        return f"{'strict, ' if self.mode == 'strict' else ''}{package} {version}"

    def grade(self, response: str, gold: str) -> Grade:
        """Judge one response.

        Args:
            response: all that the model said.
            gold: the right answer; in mode "reasoning_gym" a `task_gold`.

        Raises:
            SettingError: the mode's package is not installed, or the gold answer cannot be used.
            EntropyLensError: the workers do not start.
        """
        answer = (last_boxed(response) or "").strip()
        if self.mode == "reasoning_gym":
            answer = answer or _last_line(response)
        if not answer:
            return Grade(None, "no answer")
        if self.mode != "reasoning_gym" and reads_as(answer, gold):
            return Grade(answer, "correct")
        if self.mode == "strict":
            return Grade(answer, "wrong")
        try:
            return Grade(answer, self._ask(answer, gold))
        except UnusableGold as error:
            brief = gold if len(gold) <= 60 else f"{gold[:57]}..."
            raise SettingError(
                f"the gold answer {brief!r} cannot be used in mode {self.mode} ({error})",
                _REMEDIES[self.mode],
            ) from error

    def grade_all(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        """Judge (response, gold) pairs by all workers at once; grades come in their order.

        Raises:
            SettingError, EntropyLensError: as `grade`.
        """
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(lambda pair: self.grade(*pair), pairs))

    def unusable(self, golds: Sequence[str]) -> dict[int, str]:
        """Find the gold answers that cannot be judged, by all workers at once.

        Each gold is judged as an answer to itself, without the short cut by equal text that
        `grade` takes. In mode "reasoning_gym" the entry's own answer must score; an entry that
        names none passes. Mode "strict" can use all but what normalization leaves nothing of.

        Returns:
            Why a gold cannot be used (blank, unreadable, not right by itself, too slow, or a
            crash of the judge), by its place in golds; nothing of those that can.

        Raises:
            SettingError: the mode's package is not installed.
            EntropyLensError: the workers do not start.
        """
        with ThreadPoolExecutor(len(self._workers)) as threads:
            faults = list(threads.map(self._fault, golds))
        return {place: fault for place, fault in enumerate(faults) if fault}

    def close(self) -> None:
        """End the workers. What they are judging counts as crashed; later answers start new."""
        _stop(self._workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _fault(self, gold: str) -> str | None:
        if not gold.strip():
            return "it is blank"
        if self.mode == "strict":
            return None if reads_as(gold, gold) else "normalization leaves nothing of it"
        try:
            return _FAULTS.get(self._ask(None, gold))
        except UnusableGold as error:
            return str(error)

    def _ask(self, answer: str | None, gold: str) -> Verdict:
        worker = self._free.get()
        try:
            return "correct" if worker.ask(answer, gold) else "wrong"
        except TimeoutError:
            return "timeout"
        except (EOFError, BrokenPipeError):
            return "crashed"
        finally:
            self._free.put(worker)


def task_gold(task: str, entry: str) -> str:
    """What stands for the gold answer of a reasoning-gym task.

    Args:
        task: its name.
        entry: the JSON text of one entry of its dataset: question, answer and metadata.
    """
    return json.dumps({"task": task, "entry": entry})


def _modes() -> str:
    return ", ".join(get_args(Mode))


def _last_line(response: str) -> str:
    lines = response.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _queue_of(workers: list[Worker]) -> queue.LifoQueue[Worker]:
    """The idle workers, started ones first: as few start as are needed at once."""
    free: queue.LifoQueue[Worker] = queue.LifoQueue()
    for worker in workers:
        free.put(worker)
    return free


def _stop(workers: list[Worker]) -> None:
    for worker in workers:
        worker.stop()


def _forget(grader: Grader | None) -> None:
    if grader is not None:
        for worker in grader._workers:
            worker.forget()
        grader._free = _queue_of(grader._workers)
