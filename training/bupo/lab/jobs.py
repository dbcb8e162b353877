"""Runs side by side, a process a core; what is finished is not made again."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from bupo.lab.arms import Arm
from bupo.lab.run import CONFIG, Course, config_of, evaluate, train
from bupo.lab.task import Split
from entropylens.errors import AllocationError
from entropylens.files import write_text

__all__ = ["OUTCOME", "Job", "perform", "read_outcome", "side_by_side"]

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Written last, as the sign of completion.
OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Job:
    """One run: an arm from a start with a seed, and its examination.

    Args:
        arm: how it trains.
        course: how long, and with what.
        start: the directory of the model.
        seed: of prompts, samples and examination.
        directory: of the run.
        watched: the layer that is looked at where the arm has none.
        split: where the examination's problems are from.
        problems: how many.
        samples: K, answers to each.
    """

    arm: Arm
    course: Course
    start: Path
    seed: int
    directory: Path
    watched: int
    split: Split
    problems: int
    samples: int

    @property
    def finished(self) -> bool:
        """Whether its outcome is written, and is that of a run with these settings."""
        file = self.directory / CONFIG
        if not (self.directory / OUTCOME).is_file() or not file.is_file():
            return False
        wanted = config_of(self.arm, self.course, self.seed, self.watched)
        return file.read_text(encoding="utf-8") == wanted


def perform(job: Job) -> None:
    """Train from the start, examine the last step's weights, write outcome.json.

    An unfinished run is begun anew.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.rmtree(job.directory, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(job.start, attn_implementation="sdpa").float()
    tokenizer = AutoTokenizer.from_pretrained(job.start)
    begun = time.perf_counter()
    train(
        model, tokenizer, job.arm, job.course, job.seed, job.directory,
        watched=job.watched, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    right = evaluate(model, tokenizer, job.split, job.problems, job.samples, job.seed)
    told = {"split": job.split, "samples": job.samples, "right": right, "seconds": seconds}
    write_text(job.directory / OUTCOME, json.dumps(told) + "\n")


def read_outcome(job: Job) -> dict[str, Any]:
    """What `perform` wrote in the end: split, samples, right (answers, by problem), seconds."""
    found: dict[str, Any] = json.loads((job.directory / OUTCOME).read_text(encoding="utf-8"))
    return found


def side_by_side(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    cost: Callable[[Item], int],
    *,
    workers: int,
    title: str,
    unit: str = "step",
    progress: bool = True,
) -> list[Result]:
    """What `work` makes of each item, begun and returned in their order.

    An error does not keep the other items from being finished; it is raised then.

    Args:
        work: a function that a process of its own can be given.
        items: what it takes.
        cost: of an item, in `unit`s; the bar counts them.
        workers: processes, with one thread each; with one, this process works itself.
        title: of the progress bar.
        unit: of cost.
        progress: show the bar.

    Raises:
        AllocationError: a process was killed.
    """
    bar = tqdm(total=sum(map(cost, items)), desc=title, unit=unit, disable=not progress)
    found: dict[int, Result] = {}
    with bar:
        if workers == 1:
            for place, item in enumerate(items):
                found[place] = work(item)
                bar.update(cost(item))
            return [found[place] for place in range(len(items))]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_settle) as pool:
            waiting = {pool.submit(work, item): place for place, item in enumerate(items)}
            failed: Exception | None = None
            try:
                for done in as_completed(waiting):
                    place, error = waiting[done], done.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise error
                    if isinstance(error, Exception):
                        failed = failed or error
                        continue
                    found[place] = done.result()
                    bar.update(cost(items[place]))
            except BrokenProcessPool as error:
                raise AllocationError(
                    f"a process was killed while {title}",
                    "the same command goes on; with --workers 1 it takes the least memory",
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if failed is not None:
            raise failed
    return [found[place] for place in range(len(items))]


def _settle() -> None:
    """A worker's own: one thread, no bars beside that of the parent, and no life without it."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
