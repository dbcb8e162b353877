"""What models are asked: datasets on disk, the bundled prompts, and the paper's templates (A.3)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from entropylens.answers import last_boxed
from entropylens.errors import DatasetError, SettingError
from entropylens.responses import Limits, digest, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

__all__ = [
    "ANSWER_COLUMNS",
    "BUNDLED",
    "INSTRUCTION",
    "PROBLEM_COLUMNS",
    "TEMPLATES",
    "Prompt",
    "columns_of",
    "gold_of",
    "load_prompts",
    "read_table",
    "task_names",
]

#: The name of the 24 short problems that travel with the package.
BUNDLED = "bundled"
_BUNDLED_FILE = Path(__file__).parent / "data" / "prompts.jsonl"

#: The system message of A.3.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_CHATML = (
    f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n"
    "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
)

#: Templates of A.3 as text with {problem}; `chat` is the tokenizer's own chat template.
TEMPLATES: Mapping[str, str | None] = {
    "chat": None,
    "qwen-math": _CHATML,
    "qwen3-nothinking": _CHATML + "<think>\n\n</think>\n\n",
    "octothinker": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer. User: You must put your answer inside \\boxed{} and "
        "Your final answer will be extracted automatically by the \\boxed{} tag.\n"
        "{problem}\nAssistant:"
    ),
    "plain": "{problem}",
}

#: What a problem's column may be called.
PROBLEM_COLUMNS = ("problem", "question", "prompt")
#: What an answer's column may be called; `reward_model` holds a `ground_truth`.
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "reward_model")

#: GSM8K's mark: what follows it is the answer, the lines before it are how it was found.
_MARKED = re.compile(r"^####[ \t]*(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """One problem, ready for the model.

    Args:
        ids: token ids, template included.
        task: the dataset's name.
        answer: the gold answer, or None.
    """

    ids: tuple[int, ...]
    task: str
    answer: str | None

    @property
    def key(self) -> str:
        """A digest of its content."""
        return digest([self.ids])


def load_prompts(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits,
    *,
    task: str | None = None,
    num_prompts: int | None = None,
    template: str | None = None,
    thinking: bool | None = None,
) -> tuple[Prompt, ...]:
    """The first problems of a dataset, encoded.

    Args:
        name_or_path: `bundled`, or a .parquet, .jsonl, .json or .csv file with a column problem,
            question or prompt (text, or chat messages that are taken as they are); an answer
            is read where there is a column of ANSWER_COLUMNS.
        tokenizer: the model's.
        limits: what the model can read.
        task: what to call the dataset; by default its file's name.
        num_prompts: how many; by default all.
        template: a name of TEMPLATES; by default the tokenizer's chat template, or the paper's
            template for base models where it has none.
        thinking: sets enable_thinking of the chat template.

    Raises:
        DatasetError: no such dataset, no usable column, or a row that cannot be used.
        SettingError: an unknown template, or no tokenizer to encode with.
    """
    if tokenizer is None:
        raise SettingError(
            "the model came without a tokenizer, so it cannot be asked anything",
            "put its tokenizer files beside the weights, or pass token ids with --responses",
        )
    if template is None:
        template = "chat" if tokenizer.chat_template else "octothinker"
        logger.info("asking %s with template %s", name_or_path, template)
    if template not in TEMPLATES:
        raise SettingError(f"no template {template!r}", f"choose one of {', '.join(TEMPLATES)}")
    if num_prompts is not None and num_prompts < 1:
        raise SettingError(f"--num-prompts is {num_prompts}", "give at least 1")
    frame = read_table(name_or_path)
    column, answers = columns_of(frame)
    if not column or frame.empty:
        raise DatasetError(
            f"dataset {name_or_path!r} has no row with a {', '.join(PROBLEM_COLUMNS)} column "
            f"(its columns: {', '.join(map(str, frame.columns))})",
            "rename the column that holds the problems",
        )
    options = {} if thinking is None else {"enable_thinking": thinking}
    prompts = []
    for number, record in enumerate(frame.head(num_prompts or len(frame)).to_dict("records"), 1):
        try:
            ids = _encode(record[column], tokenizer, template, options)
            answer = gold_of(record[answers], answers) if answers else None
        except ValueError as error:
            raise DatasetError(
                f"dataset {name_or_path!r}, row {number}: {error}",
                "mend the row, leave it out, or choose another --template",
            ) from error
        if not ids or (limits.context is not None and len(ids) >= limits.context):
            raise DatasetError(
                f"dataset {name_or_path!r}, row {number}: the prompt takes {len(ids)} tokens, "
                f"the model's context has {limits.context}",
                "leave it out, or use a model with a longer context",
            )
        prompts.append(Prompt(ids, task or task_names([name_or_path])[0], answer))
    return tuple(prompts)


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


def _encode(
    problem: Any, tokenizer: PreTrainedTokenizerBase, template: str, options: dict[str, Any]
) -> tuple[int, ...]:
    text = TEMPLATES[template]
    if isinstance(problem, np.ndarray | list):
        return encode_prompt(list(problem), tokenizer, **options)
    if not isinstance(problem, str):
        raise ValueError(f"the problem is no text but {type(problem).__name__}")
    if text is not None:
        return encode_prompt(text.replace("{problem}", problem), tokenizer)
    messages: Sequence[Mapping[str, str]] = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": problem},
    ]
    return encode_prompt(messages, tokenizer, **options)
