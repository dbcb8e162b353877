"""Problems with gold answers: out of a file, a dataset on the Hub, or a reasoning-gym task."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from tqdm import tqdm

from entropylens.benchmarks import BENCHMARKS, NAMED, HubDataset, Purpose
from entropylens.dataset_files import (
    ANSWER_COLUMNS,
    BUNDLED,
    PROBLEM_COLUMNS,
    SUFFIXES,
    columns_of,
    gold_of,
    read_table,
    task_names,
)
from entropylens.errors import DatasetError, SettingError
from entropylens.templates import INSTRUCTION

logger = logging.getLogger(__name__)

__all__ = ["GENERATED", "Messages", "Problem", "Problems", "Source", "load_problems"]

#: What the name of a generated dataset starts with.
GENERATED = "reasoning_gym:"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WHOLE = re.compile(r"(-?[0-9]+)\.0")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Problem:
    """One problem and its gold answer.

    Args:
        index: its row in the dataset, from 0.
        content: the problem's text, or chat messages that are asked as they are.
        answer: the gold answer, or None without a usable one.
        task: the reasoning-gym task that made it, or None.
        entry: what that task's scorer reads, as JSON text, or None.
    """

    index: int
    content: str | Messages
    answer: str | None
    task: str | None = None
    entry: str | None = None

    @property
    def key(self) -> str:
        """Equal for the same problem: its text with blanks collapsed."""
        if isinstance(self.content, str):
            return " ".join(self.content.split())
        return " ".join(" ".join(message["content"] for message in self.content).split())


@dataclass(frozen=True)
class Problems:
    """A dataset's problems.

    Args:
        name: what to call the dataset.
        source: where it came from.
        items: its problems in their order.
        revision: the Hub commit, or None where it lies elsewhere.
    """

    name: str
    source: str
    items: tuple[Problem, ...]
    revision: str | None = None

    def head(self, count: int | None) -> Self:
        """The first ones; all for None."""
        return replace(self, items=self.items[:count])


@dataclass(frozen=True)
class Source:
    """What else it takes to find problems in a dataset; all of it has defaults.

    Args:
        problems: the column that holds them.
        answers: the column that holds the gold answers.
        split: of a Hub dataset.
        revision: branch, tag or commit of a Hub dataset.
    """

    problems: str | None = None
    answers: str | None = None
    split: str | None = None
    revision: str | None = None


def load_problems(
    dataset: str,
    *,
    purpose: Purpose = "train",
    source: Source | None = None,
    need_answers: bool = True,
    size: int = 0,
    seed: int = 0,
    task_options: Mapping[str, Any] | None = None,
) -> Problems:
    """All problems of a dataset; the network is asked for names on the Hub alone.

    Args:
        dataset: a file, `bundled`, a name of benchmarks.NAMED, a Hub id, or GENERATED and a task.
        purpose: which split of a Hub dataset to take.
        source: columns, split and revision, where they are not the usual ones.
        need_answers: refuse a dataset without a column of answers.
        size: how many problems a task makes.
        seed: the task's; a neighbour's problems are the same but one.
        task_options: the task's settings, such as {"min_digits": 1}.

    Raises:
        DatasetError: no such dataset, out of reach, or a row that cannot be used.
        SettingError: task options that the task does not take, or without a task.
    """
    options, source = dict(task_options or {}), source or Source()
    path = Path(dataset).expanduser()
    here = dataset == BUNDLED or path.is_file() or path.suffix in SUFFIXES
    if (here or dataset.startswith(GENERATED)) and (source.split or source.revision):
        raise SettingError(
            f"split and revision are for datasets on the Hub, not for {dataset!r}",
            "leave them out",
        )
    if dataset.startswith(GENERATED):
        items = _generate(dataset.removeprefix(GENERATED), size, seed, options)
        return Problems(dataset, dataset, items)
    if options:
        raise SettingError(
            f"task options are for generated problems, not for {dataset!r}",
            f"leave them out, or name {GENERATED}TASK",
        )
    if here:
        frame, name = read_table(dataset), task_names([dataset])[0]
        return Problems(name, dataset, _problems(frame, dataset, source, need_answers))
    if dataset in NAMED or (_HUB_ID.fullmatch(dataset) and not path.exists()):
        hub = _on_the_hub(dataset)
        frame, revision = _download(hub, purpose, source)
        items = _problems(frame, hub.hub_id, source, need_answers)
        return Problems(dataset, hub.hub_id, items, revision)
    names = [name for name in NAMED if purpose == "train" or name in BENCHMARKS]
    raise DatasetError(
        f"no dataset {dataset!r}",
        f"name a {', '.join(SUFFIXES)} file, {', '.join([BUNDLED, *names])}, {GENERATED}TASK, "
        "or a Hub id such as owner/name",
    )


def _problems(
    frame: pd.DataFrame, name: str, source: Source, need_answers: bool
) -> tuple[Problem, ...]:
    column, answers = columns_of(frame)
    column, answers = source.problems or column, source.answers or answers
    missing = [it for it in (column, answers) if it and it not in frame.columns]
    if missing:
        raise DatasetError(
            f"dataset {name!r} has no column {missing[0]!r}",
            f"its columns: {', '.join(map(str, frame.columns))}",
        )
    if not column or (need_answers and not answers) or frame.empty:
        wanted = f" and an answer ({', '.join(ANSWER_COLUMNS)})" if need_answers else ""
        raise DatasetError(
            f"dataset {name!r} has no row with a problem ({', '.join(PROBLEM_COLUMNS)}){wanted}; "
            f"its columns: {', '.join(map(str, frame.columns))}",
            "rename the columns that hold them, or name them where the command takes their names",
        )
    items = []
    for index, record in enumerate(frame.to_dict("records")):
        try:
            content = _content(record[column])
            answer = gold_of(record[answers], answers) if answers else None
        except ValueError as error:
            raise DatasetError(
                f"dataset {name!r}, row {index + 1}: {error}", "mend the row, or leave it out"
            ) from error
        items.append(Problem(index, content, answer, *_origin(record.get("extra_info"))))
    whole = [_WHOLE.fullmatch(one.answer or "") for one in items]
    if all(whole):  # integers that some tool kept as floats, as those of AMC
        items = [replace(one, answer=it[1]) for one, it in zip(items, whole, strict=True) if it]
    return tuple(items)


def _origin(extra: Any) -> tuple[str, str] | tuple[None, None]:
    """Task and entry in a file that was prepared before: it keeps what the scorer reads."""
    found = extra if isinstance(extra, Mapping) else {}
    task, entry = found.get("task"), found.get("entry")
    return (task, entry) if isinstance(task, str) and isinstance(entry, str) else (None, None)


def _content(value: Any) -> str | Messages:
    """Text, or messages; the paper's two messages are text again, so that templates apply."""
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, np.ndarray | list) or not len(value):
        raise ValueError(f"the problem is no text but {type(value).__name__}")
    messages = []
    for message in value:
        found = message if isinstance(message, Mapping) else {}
        role, content = found.get("role"), found.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("a message of its prompt has no text as role and content")
        messages.append({"role": role, "content": _text(content)})
    paper = {"role": "system", "content": INSTRUCTION}
    if len(messages) == 2 and messages[0] == paper and messages[1]["role"] == "user":
        return messages[1]["content"]
    return messages


def _text(value: str) -> str:
    value.encode()  # half an emoji is valid JSON, but no file can hold it
    if not value.strip():
        raise ValueError("the problem is empty")
    return value


def _on_the_hub(dataset: str) -> HubDataset:
    for name, known in NAMED.items():
        if dataset in (name, known.hub_id):
            return known
    return HubDataset(dataset, test="test", train="train")


def _download(hub: HubDataset, purpose: Purpose, source: Source) -> tuple[pd.DataFrame, str | None]:
    """The columns that matter of a split of a Hub dataset, and the commit that it is of."""
    datasets = _library("datasets", "datasets")
    split = source.split or hub.split(purpose)
    revision = _commit(hub.hub_id, source.revision)
    try:
        table = datasets.load_dataset(hub.hub_id, hub.config, split=split, revision=revision)
    except Exception as error:  # of several libraries, and of the dataset's own loading
        raise DatasetError(
            f"dataset {hub.hub_id!r} cannot be had from the Hub ({type(error).__name__}: {error})",
            "check the name and the network, log in (hf auth login) where it is gated, or download "
            "it elsewhere and name the .parquet file",
        ) from error
    if revision is None or not _COMMIT.fullmatch(revision):
        revision = _commit_of(table) or revision
    wanted = {*PROBLEM_COLUMNS, *ANSWER_COLUMNS, "extra_info", source.problems, source.answers}
    # DeepMath's other columns are gigabytes of worked solutions.
    known = [name for name in table.column_names if name in wanted]
    frame: pd.DataFrame = table.select_columns(known or table.column_names).to_pandas()
    return frame, revision


def _commit(hub_id: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a Hub dataset names now; as it was given if offline."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        found: str | None = HfApi().dataset_info(hub_id, revision=revision).sha
    except Exception:  # the dataset may be in the cache all the same
        return revision
    return found


def _commit_of(table: Any) -> str | None:
    """The commit that a loaded dataset's files were of."""
    files = getattr(getattr(table, "info", None), "download_checksums", None) or {}
    found = [match[1] for file in files if (match := re.search(r"@([0-9a-f]{40})/", str(file)))]
    if not found:
        logger.warning("the Hub does not tell the commit of this dataset: it is not recorded")
    return found[0] if found else None


def _generate(task: str, size: int, seed: int, options: dict[str, Any]) -> tuple[Problem, ...]:
    factory = _library("reasoning_gym.factory", "reasoning-gym")
    if task not in factory.DATASETS:
        near = difflib.get_close_matches(task, factory.DATASETS) or sorted(factory.DATASETS)
        raise DatasetError(f"reasoning-gym has no task {task!r}", f"choose {', '.join(near)}")
    known = {field.name for field in fields(factory.DATASETS[task][1])} - {"size", "seed"}
    if wrong := sorted(set(options) - known):
        raise SettingError(
            f"{task} has no option {', '.join(wrong)}", f"choose of {', '.join(sorted(known))}"
        )
    if size < 1:
        raise SettingError(
            f"{task} makes any number of problems", "say how many: --num-problems, or --size"
        )
    try:
        entries: Sequence[Any] = factory.create_dataset(task, size=size, seed=seed, **options)
        score = factory.get_score_answer_fn(task)
        places = tqdm(range(size), desc=f"making {task}", unit="problem", disable=None)
        return tuple(_generated(index, entries[index], task, score) for index in places)
    except Exception as error:  # a task asserts, raises TypeError or fails as it likes
        raise SettingError(
            f"{task} makes no problems with options {options or 'by default'} "
            f"({type(error).__name__}: {error})",
            "choose other values",
        ) from error


def _generated(
    index: int, made: Mapping[str, Any], task: str, score: Callable[..., float]
) -> Problem:
    kept = {name: made[name] for name in ("question", "answer", "metadata")}
    entry = json.dumps(kept, default=str)
    answer = None if made["answer"] is None else str(made["answer"])
    # JSON keeps no tuples, and two scorers compare them: no answer to such a row could earn 1.
    usable = False
    with contextlib.suppress(Exception):
        usable = score(answer, json.loads(entry)) == 1
    return Problem(index, _text(made["question"]), answer if usable else None, task, entry)


def _library(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise DatasetError(
            f"this dataset needs the package {package} ({error})", f"pip install {package}"
        ) from error
