"""Responses: what the model was asked and what it said, as token ids, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entropylens.errors import ResponsesError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Limits", "Response", "Responses", "parse_responses", "problem_key", "read_responses"]


@dataclass(frozen=True)
class Response:
    """One prompt and one answer to it, as token ids.

    Args:
        prompt_ids: what the model read; at least one id.
        response_ids: what it produced; at least one id.
        truncated: whether it was cut at the token limit.
        task: the dataset it came from.
        problem: a digest of what was asked, before any template or tokenizer, or "".
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    truncated: bool = False
    task: str = "responses"
    problem: str = field(default="", compare=False)

    @property
    def num_tokens(self) -> int:
        """T, the produced tokens."""
        return len(self.response_ids)

    @property
    def length(self) -> int:
        """Positions that a forward pass needs: the last produced token is never read."""
        return len(self.prompt_ids) + len(self.response_ids) - 1

    @property
    def key(self) -> str:
        """A digest of its content: the same wherever it stands."""
        return digest([self.prompt_ids, self.response_ids])

    @property
    def prompt_key(self) -> str:
        """A digest of its prompt: equal for all samples of one prompt."""
        return digest([self.prompt_ids])


def digest(ids: Sequence[Sequence[int]]) -> str:
    """A short digest of lists of token ids."""
    content = hashlib.sha256()
    for part in ids:
        content.update(np.asarray([len(part), *part], dtype=np.int64).tobytes())
    return content.hexdigest()[:32]


def problem_key(content: Any) -> str:
    """A digest of what was asked, as text or messages: the same for every tokenizer."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Limits:
    """What the model can read.

    Args:
        vocab_size: token ids go from 0 to vocab_size - 1.
        context: positions, or None without a limit.
    """

    vocab_size: int
    context: int | None


@dataclass(frozen=True)
class Responses:
    """Checked responses, and how many were left out.

    Args:
        items: the responses in their order.
        skipped: how many bad ones `skip_bad` left out.
    """

    items: tuple[Response, ...]
    skipped: int = 0


def read_responses(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits,
    *,
    skip_bad: bool = False,
) -> Responses:
    """Read a JSONL file of responses, one object a line.

    A line is `{"prompt_ids": [...], "response_ids": [...]}`, or `{"prompt": ..., "response":
    ...}` where prompt is a string, taken as it is, or chat messages, rendered with the chat
    template and its generation prompt; the response is tokenized alone with nothing added.
    `truncated` and `task` (or `benchmark`) may stand beside them.

    Args:
        path: the file.
        tokenizer: needed for text lines only.
        limits: what the model can read.
        skip_bad: leave bad lines out and count them, instead of raising.

    Raises:
        ResponsesError: no such file, not text, no good line, or a bad line (with its number).
    """
    path = Path(path)
    if not path.is_file():
        raise ResponsesError(
            f"responses file {str(path)!r} does not exist", "check the path given to --responses"
        )
    return parse_responses(
        _lines(path), tokenizer, limits, skip_bad=skip_bad, source=str(path), default_task=path.stem
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise ResponsesError(
            f"responses file {str(path)!r} is not text ({error.reason} at byte {error.start})",
            "give a JSONL file: one JSON object a line, in UTF-8",
        ) from error
    except OSError as error:
        raise ResponsesError(
            f"responses file {str(path)!r} cannot be read ({error.strerror})",
            "check its permissions",
        ) from error


def parse_responses(
    lines: Iterable[tuple[int, str | Mapping[str, Any] | Response]],
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits,
    *,
    skip_bad: bool = False,
    source: str = "responses",
    default_task: str = "responses",
) -> Responses:
    """The same for numbered lines, parsed objects or Response objects already in memory."""
    items: list[Response] = []
    skipped = 0
    number = 0
    for number, line in lines:
        try:
            response = _parse(line, tokenizer, default_task)
            _check(response, limits)
        except _BadLine as bad:
            if skip_bad:
                skipped += 1
                continue
            raise ResponsesError(
                f"{source}, line {number}: {bad}",
                "mend the line, or pass --skip-bad to leave such lines out",
            ) from None
        items.append(response)
    if not items:
        cause = f"all {skipped} lines are bad" if skipped else "it holds no response"
        raise ResponsesError(
            f"{source}: {cause}",
            'write lines like {"prompt_ids": [1, 2], "response_ids": [3, 4]}',
        )
    return Responses(tuple(items), skipped)


class _BadLine(ValueError):
    """What is wrong with one line."""


def _parse(
    line: str | Mapping[str, Any] | Response,
    tokenizer: PreTrainedTokenizerBase | None,
    default_task: str,
) -> Response:
    if isinstance(line, Response):
        return line
    if isinstance(line, str):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadLine(f"not JSON ({error})") from None
    else:
        record = line
    if not isinstance(record, Mapping):
        raise _BadLine(f"a JSON object is needed, not {type(record).__name__}")
    truncated, task = (
        record.get("truncated", False),
        record.get("task", record.get("benchmark", default_task)),
    )
    if not isinstance(truncated, bool) or not isinstance(task, str):
        raise _BadLine("truncated must be true or false, and task a string")
    problem = ""
    if "prompt_ids" in record and "response_ids" in record:
        prompt_ids = _ids(record["prompt_ids"], "prompt_ids")
        response_ids = _ids(record["response_ids"], "response_ids")
    elif "prompt" in record and "response" in record:
        prompt_ids, response_ids = _encode(record["prompt"], record["response"], tokenizer)
        problem = problem_key(record["prompt"])
    else:
        raise _BadLine(
            "it needs prompt_ids and response_ids, or prompt and response; "
            f"it has {sorted(map(str, record)) or 'nothing'}"
        )
    return Response(prompt_ids, response_ids, truncated, task, problem)


def _ids(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _BadLine(f"{name} is no list of token ids")
    for place, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int):
            raise _BadLine(f"{name}[{place}] is {token!r}, no token id")
    return tuple(value)


def _encode(
    prompt: Any, response: Any, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if tokenizer is None:
        raise _BadLine("it holds text, and the model came without a tokenizer; give token ids")
    if not isinstance(response, str):
        raise _BadLine(f"response is no string but {type(response).__name__}")
    prompt_ids = encode_prompt(prompt, tokenizer)
    return prompt_ids, _tokens(response, tokenizer)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    try:
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    except (TypeError, UnicodeError) as error:  # half an emoji is valid JSON, but no text
        raise _BadLine(f"its text cannot be tokenized ({error})") from None


def encode_prompt(
    prompt: Any, tokenizer: PreTrainedTokenizerBase, **template: Any
) -> tuple[int, ...]:
    """Token ids of a string (as it is) or of chat messages (with the generation prompt).

    Args:
        prompt: a string, or a list of {"role": ..., "content": ...}.
        tokenizer: the model's.
        template: arguments of the chat template, such as enable_thinking.

    Raises:
        ValueError: neither of both, or a chat template that is missing or refuses it.
    """
    if isinstance(prompt, str):
        return _tokens(prompt, tokenizer)
    messages = list(prompt) if isinstance(prompt, Sequence) else []
    if not messages or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise _BadLine('prompt is neither a string nor messages [{"role": ..., "content": ...}]')
    if not tokenizer.chat_template:
        raise _BadLine("prompt holds chat messages, and the tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template
        )
    except Exception as error:  # templates are Jinja programs: they raise what they like
        raise _BadLine(f"the chat template refuses the messages ({error})") from None
    return _tokens(str(text), tokenizer)


def _check(response: Response, limits: Limits) -> None:
    for name, ids in (("prompt", response.prompt_ids), ("response", response.response_ids)):
        if not ids:
            raise _BadLine(f"the {name} is empty")
        if min(ids) < 0 or max(ids) >= limits.vocab_size:
            wrong = next(token for token in ids if not 0 <= token < limits.vocab_size)
            raise _BadLine(
                f"{name} id {wrong} is outside the vocabulary (0 to {limits.vocab_size - 1})"
            )
    if limits.context is not None and response.length > limits.context:
        raise _BadLine(
            f"prompt and response need {response.length} positions "
            f"({len(response.prompt_ids)} of the prompt); the model's context has {limits.context}"
        )
