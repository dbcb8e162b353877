"""Problems with gold answers: out of a file, a dataset on the Hub, or a reasoning-gym task."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from entropylens.errors import DatasetError, SettingError
from entropylens.prompts import (
    ANSWER_COLUMNS,
    BUNDLED,
    INSTRUCTION,
    PROBLEM_COLUMNS,
    columns_of,
    gold_of,
    read_table,
    task_names,
)

__all__ = ["GENERATED", "HUB_NAMES", "Messages", "Problem", "Problems", "load_problems"]

#: What the name of a generated dataset starts with.
GENERATED = "reasoning_gym:"
#: Short names of datasets on the Hub.
HUB_NAMES: Mapping[str, str] = {"deepmath": "zwhe99/DeepMath-103K", "gsm8k": "openai/gsm8k"}

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")

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
    """

    name: str
    source: str
    items: tuple[Problem, ...]


def load_problems(
    dataset: str,
    *,
    size: int = 0,
    seed: int = 0,
    task_options: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> Problems:
    """All problems of a dataset; the network is asked for names on the Hub alone.

    Args:
        dataset: a file, `bundled`, a key of HUB_NAMES, a Hub id, or GENERATED and a task.
        size: how many problems a task makes.
        seed: the task's; a neighbour's problems are the same but one.
        task_options: the task's settings, such as {"min_digits": 1}.
        revision: branch, tag or commit on the Hub.

    Raises:
        DatasetError: no such dataset, out of reach, or a row that cannot be used.
        SettingError: task options that the task does not take, or without a task.
    """
    options = dict(task_options or {})
    if dataset.startswith(GENERATED):
        items = _generate(dataset.removeprefix(GENERATED), size, seed, options)
        return Problems(dataset, dataset, items)
    if options:
        raise SettingError(
            f"task options are for generated problems, not for {dataset!r}",
            f"leave them out, or name {GENERATED}TASK",
        )
    path = Path(dataset).expanduser()
    if dataset == BUNDLED or path.is_file() or path.suffix in _SUFFIXES:
        frame, name = read_table(dataset), task_names([dataset])[0]
        return Problems(name, dataset, _problems(frame, dataset))
    if dataset in HUB_NAMES or (_HUB_ID.fullmatch(dataset) and not path.exists()):
        hub_id = HUB_NAMES.get(dataset, dataset)
        return Problems(dataset, hub_id, _problems(_download(hub_id, revision), hub_id))
    raise DatasetError(
        f"no dataset {dataset!r}",
        f"name a {', '.join(_SUFFIXES)} file, {', '.join(HUB_NAMES)}, {GENERATED}TASK, "
        "or a Hub id such as owner/name",
    )


def _problems(frame: pd.DataFrame, source: str) -> tuple[Problem, ...]:
    column, answers = columns_of(frame)
    if not column or not answers or frame.empty:
        raise DatasetError(
            f"dataset {source!r} has no row with a problem ({', '.join(PROBLEM_COLUMNS)}) and an "
            f"answer ({', '.join(ANSWER_COLUMNS)}; "
            f"its columns: {', '.join(map(str, frame.columns))})",
            "rename the columns that hold them",
        )
    items = []
    for index, record in enumerate(frame.to_dict("records")):
        try:
            content = _content(record[column])
            answer = gold_of(record[answers], answers)
        except ValueError as error:
            raise DatasetError(
                f"dataset {source!r}, row {index + 1}: {error}", "mend the row, or leave it out"
            ) from error
        items.append(Problem(index, content, answer, *_origin(record.get("extra_info"))))
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


def _download(hub_id: str, revision: str | None) -> pd.DataFrame:
    """The columns that matter of a Hub dataset's split train."""
    datasets = _library("datasets", "datasets")
    config = "main" if hub_id == HUB_NAMES["gsm8k"] else None
    try:
        table = datasets.load_dataset(hub_id, config, split="train", revision=revision)
    except Exception as error:  # of several libraries, and of the dataset's own loading
        raise DatasetError(
            f"dataset {hub_id!r} cannot be had from the Hub ({type(error).__name__}: {error})",
            "check the name and the network, log in (hf auth login) where it is gated, or download "
            "it elsewhere and name the .parquet file",
        ) from error
    wanted = {*PROBLEM_COLUMNS, *ANSWER_COLUMNS, "extra_info"}
    # DeepMath's other columns are gigabytes of worked solutions.
    known = [name for name in table.column_names if name in wanted]
    frame: pd.DataFrame = table.select_columns(known).to_pandas()
    return frame


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
