"""Training data for veRL: a dataset's problems in, parquet files of prompts and answers out."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from entropylens.doctor import usable_cores
from entropylens.errors import DatasetError, OutputDirectoryError, SettingError
from entropylens.files import make_directory, write_whole
from entropylens.grading import Grader
from entropylens.problems import (
    GENERATED,
    Messages,
    Problem,
    Problems,
    Source,
    load_problems,
)
from entropylens.responses import encode_prompt
from entropylens.templates import INSTRUCTION, TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TRAINING_TEMPLATES", "Preparation", "prepare"]

#: What training data can be: veRL renders messages with the model's chat template, or with the
#: preset's own where the model has none; so one file serves all models. `plain` has no system
#: message.
TRAINING_TEMPLATES = ("chat", "plain")

_CHUNK = 256
_NUMBER = re.compile(r"-?[0-9]+")  # nothing to doubt, and most answers are of this kind

#: The paper's draw from DeepMath-103K; also how many problems a task makes.
DEFAULT_SIZE = 5000


@dataclass(frozen=True)
class Preparation:
    """What became of a dataset's rows; each row that was dropped counts once.

    Args:
        source: where the rows came from.
        path: the training file.
        val_path: the hold-out file, or None without one.
        read: rows of the source.
        without_answer: rows without a gold answer that its scorer accepts.
        duplicates: rows with the problem of an earlier row.
        too_long: rows whose prompt takes more than max_prompt_tokens.
        kept: rows of the training file.
        held_out: rows of the hold-out file.
        max_prompt_tokens: the limit, or None where no length was checked.
    """

    source: str
    path: Path
    val_path: Path | None
    read: int
    without_answer: int
    duplicates: int
    too_long: int
    kept: int
    held_out: int
    max_prompt_tokens: int | None

    @property
    def not_drawn(self) -> int:
        """Usable rows that neither file holds."""
        dropped = self.without_answer + self.duplicates + self.too_long
        return self.read - dropped - self.kept - self.held_out

    @property
    def summary(self) -> str:
        """The counts in one line."""
        limit = self.max_prompt_tokens
        dropped = [
            f"duplicates {self.duplicates}",
            f"without answer {self.without_answer}",
            "length not checked" if limit is None else f"over {limit} tokens {self.too_long}",
            f"not drawn {self.not_drawn}",
        ]
        held_out = f" and {self.held_out} in {self.val_path}" if self.val_path else ""
        return (
            f"{self.source}: of {self.read} rows {self.kept} in {self.path}{held_out}; "
            f"{', '.join(dropped)}"
        )


def prepare(
    dataset: str | Path,
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    template: str = "chat",
    thinking: bool | None = None,
    size: int | None = None,
    seed: int = 0,
    max_prompt_tokens: int = 1024,
    val_size: int = 0,
    task_options: Mapping[str, Any] | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Preparation:
    """Write the parquet file that veRL trains on; the same arguments write the same rows.

    Rows keep the source's order, and `extra_info.index` is a row's place there, whatever else
    is drawn. The draw takes place after everything unusable was dropped; where less is left
    than asked for, all of it is kept.

    Args:
        dataset: a .parquet, .jsonl, .json or .csv file with a problem (problem, question or
            prompt) and an answer (answer, final_answer, solution or reward_model.ground_truth),
            also one of veRL's format, whose messages stay; `bundled`; `deepmath`, `gsm8k` or
            another Hub id (its split train); `reasoning_gym:TASK`, generated here.
        output: a .parquet file; a hold-out goes into `<stem>-val.parquet` beside it.
        tokenizer: the model's; without it no prompt is too long.
        template: of TRAINING_TEMPLATES.
        thinking: sets enable_thinking of the chat template, here for the length alone.
        size: training rows at most; by default all, but 5000 of `deepmath` as in the paper, and
            as many problems of a task, with the hold-out's on top.
        seed: of the draw and of the task. Tasks make nearly the same problems with seeds 0 and
            1: hold out with `val_size`. Six of them (list_functions is one) also hang on
            PYTHONHASHSEED.
        max_prompt_tokens: the longest prompt, rendered with the generation prompt.
        val_size: usable rows to hold out of training.
        task_options: settings of the task, such as {"min_digits": 1}.
        revision: branch, tag or commit of a Hub dataset.
        force: replace existing output.

    Raises:
        DatasetError: no such dataset, out of reach, a row that cannot be used, or none left.
        SettingError: a setting, or an option of the task, that cannot be used.
        OutputDirectoryError: the output exists, or cannot be written.
    """
    dataset, path = str(dataset), Path(output).expanduser()
    val_path = path.with_name(f"{path.stem}-val.parquet") if val_size else None
    numbers = {
        "size": size, "seed": seed, "max_prompt_tokens": max_prompt_tokens, "val_size": val_size,
    }  # fmt: skip
    _check_settings(template, numbers)
    _check_output(path, val_path, force)
    if size is None and (dataset == "deepmath" or dataset.startswith(GENERATED)):
        size = DEFAULT_SIZE
    problems = load_problems(
        dataset,
        source=Source(revision=revision),
        size=(size or 0) + val_size,
        seed=seed,
        task_options=task_options,
    )
    options = {} if thinking is None else {"enable_thinking": thinking}

    def is_long(messages: Messages) -> bool:
        if tokenizer is None:
            return False
        prompt: str | Messages = messages
        if not tokenizer.chat_template:  # a base model: the paper's text stands for it
            text = TEMPLATES["octothinker" if template == "chat" else "plain"] or ""
            prompt = text.replace("{problem}", messages[-1]["content"])
        return len(encode_prompt(prompt, tokenizer, **options)) > max_prompt_tokens

    usable, counts = _usable(problems, template, is_long)
    if len(usable) <= val_size:
        why = ", ".join(f"{reason} {count}" for reason, count in counts.items())
        raise DatasetError(
            f"dataset {problems.source!r} has {len(usable)} usable rows of "
            f"{len(problems.items)} (dropped: {why or 'none'})",
            f"hold out fewer than {val_size}" if usable else "look into the rows, or name another",
        )
    order = np.random.default_rng(seed).permutation(len(usable))
    rest = len(usable) - val_size
    training, held_out = sorted(order[:rest][:size]), sorted(order[rest:])
    make_directory(path.parent)
    if val_path is not None:  # first: whoever sees the training file finds the hold-out too
        _write(val_path, [usable[place] for place in held_out], problems.name, "val")
    _write(path, [usable[place] for place in training], problems.name, "train")
    return Preparation(
        source=problems.source,
        path=path,
        val_path=val_path,
        read=len(problems.items),
        without_answer=counts["without answer"],
        duplicates=counts["duplicates"],
        too_long=counts["too long"],
        kept=len(training),
        held_out=len(held_out),
        max_prompt_tokens=None if tokenizer is None else max_prompt_tokens,
    )


def _usable(
    problems: Problems, template: str, is_long: Callable[[Messages], bool]
) -> tuple[list[tuple[Problem, Messages]], Counter[str]]:
    """The rows to draw from with their messages, and how many were dropped for what."""
    usable: list[tuple[Problem, Messages]] = []
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    unusable = _unusable(problems)
    for place, problem in enumerate(
        tqdm(problems.items, desc="checking prompts", unit="row", disable=None)
    ):
        if problem.answer is None or place in unusable:
            dropped["without answer"] += 1
            continue
        if problem.key in seen:
            dropped["duplicates"] += 1
            continue
        seen.add(problem.key)
        try:
            messages = _messages(problem.content, template)
            if is_long(messages):
                dropped["too long"] += 1
                continue
        except ValueError as error:
            raise DatasetError(
                f"dataset {problems.source!r}, row {problem.index + 1}: {error}",
                "mend the row, or choose another --template",
            ) from error
        usable.append((problem, messages))
    return usable, dropped


def _unusable(problems: Problems) -> Collection[int]:
    """The places of gold answers that Math-Verify could never find in a response."""
    golds = list(
        dict.fromkeys(
            one.answer
            for one in problems.items
            if one.answer is not None and one.task is None and not _NUMBER.fullmatch(one.answer)
        )
    )
    if not golds or importlib.util.find_spec("math_verify") is None:
        return ()
    wrong: set[str] = set()
    chunks = [golds[start : start + _CHUNK] for start in range(0, len(golds), _CHUNK)]
    with Grader(workers=usable_cores()) as grader:
        for chunk in tqdm(chunks, desc="checking answers", unit="x256", disable=None):
            wrong |= {chunk[place] for place in grader.unusable(chunk)}
    return {place for place, one in enumerate(problems.items) if one.answer in wrong}


def _messages(content: str | Messages, template: str) -> Messages:
    """What veRL hands to the chat template."""
    if not isinstance(content, str):
        if template == "plain":
            raise ValueError("its prompt is finished chat messages, no text for 'plain'")
        return content
    user = {"role": "user", "content": content}
    return [user] if template == "plain" else [{"role": "system", "content": INSTRUCTION}, user]


def _record(problem: Problem, messages: Messages, name: str, split: str) -> dict[str, Any]:
    """A row as veRL reads it."""
    extra: dict[str, Any] = {"split": split, "index": problem.index}
    if problem.task is not None:
        name = f"reasoning_gym/{problem.task}"
        extra |= {"task": problem.task, "entry": problem.entry}
    return {
        "data_source": name,
        "prompt": messages,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": extra,
    }


def _write(path: Path, rows: Sequence[tuple[Problem, Messages]], name: str, split: str) -> None:
    records = [_record(problem, messages, name, split) for problem, messages in rows]
    # Plain strings, as every other file of veRL has them: large ones would not join with those.
    frame = pd.DataFrame(records, dtype=object)
    write_whole(path, lambda aside: frame.to_parquet(aside, index=False))


def _check_settings(template: str, numbers: Mapping[str, int | None]) -> None:
    if template not in TRAINING_TEMPLATES:
        remedy = f"choose one of {', '.join(TRAINING_TEMPLATES)}"
        if template in TEMPLATES:
            remedy = "choose chat: the model's own chat template writes the same text"
        raise SettingError(f"no template {template!r} for training", remedy)
    for name, value in numbers.items():
        least = 0 if name in ("seed", "val_size") else 1
        if value is not None and value < least:
            raise SettingError(f"{name} is {value}", f"give at least {least}")


def _check_output(path: Path, val_path: Path | None, force: bool) -> None:
    if path.suffix != ".parquet":
        raise OutputDirectoryError(f"{str(path)!r} is no .parquet file", "name one with -o")
    for target in filter(None, (path, val_path)):
        if target.exists() and not force:
            raise OutputDirectoryError(
                f"{str(target)!r} exists", "name another file with -o, or pass --force"
            )
