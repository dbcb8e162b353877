"""What all commands share: options, errors in one line, and the state of the process."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

import typer

__all__ = ["Debug", "Json", "Thinking", "prepare_process", "reported"]


class Thinking(StrEnum):
    """Whether a thinking model thinks."""

    on = "on"
    off = "off"


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextlib.contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Errors in one line with exit code 2; a traceback only with --debug."""
    from entropylens.errors import EntropyLensError

    try:
        yield
    except EntropyLensError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command with -o as named above resumes", err=True)
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
