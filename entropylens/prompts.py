"""What models are asked: problems as token ids, by the paper's templates or the model's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entropylens.dataset_files import task_names
from entropylens.errors import DatasetError, SettingError
from entropylens.problems import Messages, Problems, load_problems
from entropylens.responses import Limits, digest, encode_prompt, problem_key
from entropylens.templates import INSTRUCTION, TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

__all__ = [
    "Prompt",
    "encode_problems",
    "load_datasets",
    "load_prompts",
    "refuse_both",
    "used_template",
]


@dataclass(frozen=True)
class Prompt:
    """One problem, ready for the model.

    Args:
        ids: token ids, template included.
        task: the dataset's name.
        answer: the gold answer, or None.
        index: its row in the dataset, from 0.
        problem: a digest of the problem, before any template or tokenizer.
    """

    ids: tuple[int, ...]
    task: str
    answer: str | None
    index: int = 0
    problem: str = ""

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
        name_or_path: a dataset as for `problems.load_problems`; it needs no answers.
        tokenizer: the model's.
        limits: what the model can read.
        task: what to call the dataset; by default its own name.
        num_prompts: how many; by default all.
        template: a name of TEMPLATES; by default the tokenizer's chat template, or the paper's
            template for base models where it has none.
        thinking: sets enable_thinking of the chat template.

    Raises:
        DatasetError: no such dataset, no usable column, or a row that cannot be used.
        SettingError: an unknown template, or no tokenizer to encode with.
    """
    if num_prompts is not None and num_prompts < 1:
        raise SettingError(f"--num-prompts is {num_prompts}", "give at least 1")
    problems = load_problems(
        name_or_path, purpose="test", need_answers=False, size=num_prompts or 0
    ).head(num_prompts)
    return encode_problems(
        problems, tokenizer, limits, task=task, template=template, thinking=thinking
    )


def load_datasets(
    datasets: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits,
    *,
    num_prompts: int | None = None,
    template: str | None = None,
    thinking: bool | None = None,
) -> tuple[Prompt, ...]:
    """The first problems of each dataset, named apart; arguments and errors as `load_prompts`."""
    return tuple(
        prompt
        for dataset, task in zip(datasets, task_names(datasets), strict=True)
        for prompt in load_prompts(
            dataset, tokenizer, limits, task=task, num_prompts=num_prompts, template=template,
            thinking=thinking,
        )
    )  # fmt: skip


def refuse_both(responses: object, datasets: Sequence[str], *answering: object) -> None:
    """Responses are given, or made from datasets.

    Args:
        responses: those given, or None.
        datasets: to be answered.
        answering: settings for it; None where one was not given.

    Raises:
        SettingError: both.
    """
    if responses is not None and (datasets or any(it is not None for it in answering)):
        raise SettingError(
            "responses are given, and settings for answering a dataset",
            "pass --responses or --dataset with its settings, not both",
        )


def encode_problems(
    problems: Problems,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits,
    *,
    task: str | None = None,
    template: str | None = None,
    thinking: bool | None = None,
) -> tuple[Prompt, ...]:
    """A dataset's problems as prompts, in their order; arguments as for `load_prompts`.

    Raises:
        DatasetError: a prompt that the template refuses, or that leaves no room for an answer.
        SettingError: an unknown template, or no tokenizer to encode with.
    """
    if tokenizer is None:
        raise SettingError(
            "the model came without a tokenizer, so it cannot be asked anything",
            "put its tokenizer files beside the weights, or pass token ids with --responses",
        )
    if template is None:
        template = used_template(None, tokenizer)
        logger.info("asking %s with template %s", problems.source, template)
    if template not in TEMPLATES:
        raise SettingError(f"no template {template!r}", f"choose one of {', '.join(TEMPLATES)}")
    if thinking is not None and template != "chat":
        raise SettingError(
            f"--thinking is for the model's own chat template, not for {template!r}",
            "leave it out, or pass --template chat",
        )
    options = {} if thinking is None else {"enable_thinking": thinking}
    prompts = []
    for problem in problems.items:
        where = f"dataset {problems.source!r}, row {problem.index + 1}"
        try:
            ids = encode_prompt(_asked(problem.content, template), tokenizer, **options)
        except ValueError as error:
            raise DatasetError(
                f"{where}: {error}", "mend the row, leave it out, or choose another --template"
            ) from error
        if not ids or (limits.context is not None and len(ids) >= limits.context):
            raise DatasetError(
                f"{where}: the prompt takes {len(ids)} tokens, the model's context has "
                f"{limits.context}",
                "leave it out, or use a model with a longer context",
            )
        key = problem_key(problem.content)
        prompts.append(Prompt(ids, task or problems.name, problem.answer, problem.index, key))
    return tuple(prompts)


def used_template(template: str | None, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The template that None stands for, or the one that is given."""
    chat = tokenizer is not None and tokenizer.chat_template
    return template or ("chat" if chat else "octothinker")


def _asked(content: str | Messages, template: str) -> str | Sequence[Mapping[str, str]]:
    text = TEMPLATES[template]
    if not isinstance(content, str):  # finished messages stay as they are
        return content
    if text is not None:
        return text.replace("{problem}", content)
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": content},
    ]
