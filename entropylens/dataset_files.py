"""Tables of problems on disk: files are read as they were written, and their columns found."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from entropylens.answers import last_boxed
from entropylens.errors import DatasetError

__all__ = [
    "ANSWER_COLUMNS",
    "BUNDLED",
    "PROBLEM_COLUMNS",
    "SUFFIXES",
    "columns_of",
    "gold_of",
    "read_table",
    "task_names",
]

#: The name of the 24 short problems that travel with the package.
BUNDLED = "bundled"
_BUNDLED_FILE = Path(__file__).parent / "data" / "prompts.jsonl"

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")

#: What a problem's column may be called.
PROBLEM_COLUMNS = ("problem", "question", "prompt")
#: What an answer's column may be called; `reward_model` holds a `ground_truth`.
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "reward_model")

#: GSM8K's mark: what follows it is the answer, the lines before it are how it was found.
_MARKED = re.compile(r"^####[ \t]*(.*)$", re.MULTILINE)


def task_names(datasets: Sequence[str]) -> tuple[str, ...]:
    """A name for each dataset: its file's, with the folder's where two would be the same."""
    paths = [Path(dataset) for dataset in datasets]
    stems = [path.stem for path in paths]
    return tuple(
        path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}"
        for path in paths
    )


def read_table(name_or_path: str) -> pd.DataFrame:
    """The rows of a dataset file, or of the bundled problems.

    Raises:
        DatasetError: no such file, or none that can be read.
    """
    path = _BUNDLED_FILE if name_or_path == BUNDLED else Path(name_or_path).expanduser()
    readers: dict[str, Any] = {
        ".parquet": pd.read_parquet,
        ".jsonl": _read_jsonl,
        # As written: guessed types change answers, and make numbers of problems.
        ".json": partial(pd.read_json, dtype=False, precise_float=True),
        ".csv": partial(pd.read_csv, dtype=str),
    }
    if not path.is_file() or path.suffix not in readers:
        raise DatasetError(
            f"dataset {name_or_path!r} is no {', '.join(readers)} file here",
            f"name such a file with a column problem, question or prompt, or {BUNDLED!r}",
        )
    try:
        frame = readers[path.suffix](path)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"dataset {name_or_path!r} cannot be read ({str(error).strip()})",
            "check that the file is whole",
        ) from error
    return frame


def columns_of(frame: pd.DataFrame) -> tuple[str, str]:
    """The columns that hold the problems and their answers, "" for none."""
    columns = set(frame.columns)
    if {"prompt", "reward_model"} <= columns:
        # veRL's format: further columns are the raw material of these two.
        return "prompt", "reward_model"
    problem, answer = (
        next((name for name in names if name in columns), "")
        for names in (PROBLEM_COLUMNS, ANSWER_COLUMNS)
    )
    return problem, answer


def gold_of(value: Any, column: str) -> str | None:
    """The gold answer in a value of an answer's column, or None without a usable one.

    Of a column `solution` it is the last box; else what follows the last of GSM8K's marks `####`,
    without thousands separators; else the whole text.

    Raises:
        ValueError: the value is no text or number, or text that no file can hold.
    """
    if isinstance(value, Mapping):
        value = value.get("ground_truth")
    if not pd.api.types.is_scalar(value):
        raise ValueError(f"the answer is no text or number but {type(value).__name__}")
    if pd.isna(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with a gap comes as floats
    text = str(value)
    text.encode()
    box = last_boxed(text) if column == "solution" else None
    if box is not None:  # before any mark: headings of a worked solution look the same
        text = box
    elif marked := _MARKED.findall(text):
        text = marked[-1].replace(",", "")
    return text.strip() or None


def _read_jsonl(path: Path) -> pd.DataFrame:
    lines = path.read_text(encoding="utf-8").split("\n")
    return pd.DataFrame([json.loads(line) for line in lines if line.strip()])
