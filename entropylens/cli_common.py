"""What all commands share: options, errors in one line, and the state of the process."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from entropylens.sampling import Sampling

__all__ = [
    "BatchTokens",
    "Dataset",
    "Debug",
    "Device",
    "Dtype",
    "Force",
    "Json",
    "MaxNewTokens",
    "NumPrompts",
    "ResponsesFile",
    "Revision",
    "Samples",
    "SkipBad",
    "Temperature",
    "Template",
    "Thinking",
    "ThinkingOption",
    "TrustRemoteCode",
    "prepare_process",
    "reported",
    "sampling_of",
]


class Thinking(StrEnum):
    """Whether a thinking model thinks."""

    on = "on"
    off = "off"


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

# How a model is loaded.
Dtype = Annotated[str, typer.Option(help="auto | float32 | bfloat16 | float16.")]
Device = Annotated[str, typer.Option(help="auto | cpu | cuda.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model repository's code.")
]

# What it is read over: responses, or a dataset that it answers.
ResponsesFile = Annotated[
    Path | None, typer.Option("--responses", help="JSONL of prompts and responses, ids or text.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad responses out, count them.")]
Dataset = Annotated[
    list[str] | None,
    typer.Option(help="Let the model answer this file, or `bundled`; may be repeated."),
]
NumPrompts = Annotated[int | None, typer.Option(help="Prompts of each dataset.")]
Samples = Annotated[int | None, typer.Option(help="Answers a prompt; default 1.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens an answer at most; default 256.")]
Temperature = Annotated[
    float | None, typer.Option(help="Sampling temperature, 0 is greedy; default 1.")
]
Template = Annotated[
    str | None,
    typer.Option(help="chat | qwen-math | qwen3-nothinking | octothinker | plain."),
]
ThinkingOption = Annotated[
    Thinking | None, typer.Option("--thinking", help="For models that can think.")
]

BatchTokens = Annotated[int, typer.Option(help="Response positions held in memory at a time.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace another run in the output directory.")
]
Replace = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]


def sampling_of(
    samples: int | None, max_new_tokens: int | None, temperature: float | None, seed: int
) -> Sampling | None:
    """How answers are drawn, or None where no option says anything of it."""
    from entropylens.sampling import Sampling

    given = {
        "num_samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature,
    }  # fmt: skip
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Sampling(**settings, seed=seed) if settings else None


@contextlib.contextmanager
def reported(debug: bool, *, resumes: bool = True) -> Iterator[None]:
    """Errors in one line with exit code 2; a traceback only with --debug.

    Args:
        debug: show tracebacks.
        resumes: whether the same command goes on where it was interrupted.
    """
    from entropylens.errors import EntropyLensError

    try:
        yield
    except EntropyLensError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        more = ": the same command with -o as named above resumes" if resumes else ""
        typer.echo(f"interrupted{more}", err=True)
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        typer.echo(f"error: {line}: run again with --debug and report it", err=True)
        raise typer.Exit(2) from None


def prepare_process() -> None:
    """What a library must not do: set threads, and say what goes on."""
    import torch
    from transformers.utils import logging as transformers_logging

    from entropylens.doctor import free_cores

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(free_cores())
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("entropylens", "bupo"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
