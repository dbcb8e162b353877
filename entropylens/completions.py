"""A file of finished answers: one JSON line each, with all that it depends on.

A run that ends early goes on from it, nothing is answered twice, and lines of other settings
never mix in. `analyze --responses` reads the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropylens.engines.engine import Answers, Engine, Job
from entropylens.errors import OutputDirectoryError
from entropylens.files import unwritable
from entropylens.prompts import Prompt
from entropylens.sampling import Sampling

__all__ = ["Completion", "Journal"]


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Args:
        job: the place of its prompt, and the number of the sample.
        response_ids: its tokens, an end token included.
        truncated: whether it was cut at the token limit.
        text: without special tokens, or None where the model has no tokenizer.
    """

    job: Job
    response_ids: tuple[int, ...]
    truncated: bool
    text: str | None


@dataclass(frozen=True)
class Journal:
    """The answers of one engine to some prompts in a JSONL file.

    Args:
        path: the file; it may not exist yet.
        engine: what answers.
        prompts: what is asked.
        sampling: how answers are drawn.
    """

    path: Path
    engine: Engine
    prompts: Sequence[Prompt]
    sampling: Sampling

    @property
    def settings(self) -> dict[str, Any]:
        """What a sample depends on beside model and prompt."""
        return self.sampling.of_a_sample | dict(self.engine.settings)

    def repair(self) -> None:
        """Cut off the line that the end of a run tore.

        Raises:
            OutputDirectoryError: the file cannot be written.
        """
        if not self.path.is_file():
            return
        try:
            with self.path.open("rb+") as file:
                end = place = file.seek(0, os.SEEK_END)
                while place > 0:
                    start = max(0, place - 65536)
                    file.seek(start)
                    newline = file.read(place - start).rfind(b"\n")
                    if newline >= 0:
                        place = start + newline + 1
                        break
                    place = start
                if place < end:
                    file.truncate(place)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def completions(self) -> Iterator[Completion]:
        """The finished answers to these prompts with these settings, each once.

        Raises:
            OutputDirectoryError: the file is damaged, or holds answers of another model.
        """
        places = {
            (prompt.task, prompt.index, prompt.ids): place
            for place, prompt in enumerate(self.prompts)
        }
        seen: set[Job] = set()
        settings = self.settings
        for record in self._records():
            try:
                if record["model"] != self.engine.fingerprint:
                    raise OutputDirectoryError(
                        f"{str(self.path)!r} holds answers of another model ({record['name']})",
                        "choose another directory with -o, or pass --force to replace them",
                    )
                if record["sampling"] != settings or record["sample"] >= self.sampling.num_samples:
                    continue
                key = (record["benchmark"], record["problem"], tuple(record["prompt_ids"]))
                ids, truncated = tuple(record["response_ids"]), record["truncated"]
                sample, text = record["sample"], record["text"]
            except (KeyError, TypeError) as error:
                raise self._damaged(error) from error
            job = (places.get(key, -1), sample)
            if job[0] >= 0 and job not in seen:
                seen.add(job)
                yield Completion(job, ids, truncated, text)

    def append(self, answers: Answers) -> None:
        """Add finished answers.

        Raises:
            OutputDirectoryError: the file cannot be written.
        """
        lines = "".join(json.dumps(self._record(job, ids)) + "\n" for job, ids in answers.items())
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _record(self, job: Job, ids: tuple[int, ...]) -> Mapping[str, Any]:
        engine, prompt = self.engine, self.prompts[job[0]]
        text = None
        if engine.tokenizer is not None:
            text = engine.tokenizer.decode(ids, skip_special_tokens=True)
        return {
            "benchmark": prompt.task,
            "problem": prompt.index,
            "sample": job[1],
            "name": engine.name,
            "model": engine.fingerprint,
            "sampling": self.settings,
            "prompt_ids": prompt.ids,
            "response_ids": ids,
            "truncated": ids[-1] not in engine.ends,
            "text": text,
            "answer": prompt.answer,
        }

    def _records(self) -> Iterator[Any]:
        if not self.path.is_file():
            return
        tasks = {prompt.task for prompt in self.prompts}
        wanted = tuple(f'{{"benchmark": {json.dumps(task)}, ' for task in tasks)
        try:
            with self.path.open(encoding="utf-8") as file:
                for line in file:
                    if line.startswith(wanted):  # others need not be parsed
                        yield json.loads(line)
        except OSError as error:
            raise unwritable(self.path, error) from error
        except ValueError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> OutputDirectoryError:
        return OutputDirectoryError(
            f"{str(self.path)!r} is damaged ({type(error).__name__}: {error})",
            "start the run anew with --force",
        )
