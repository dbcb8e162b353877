"""Files that appear whole: written aside, then renamed; a write that fails leaves the old one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from entropylens.errors import OutputDirectoryError

__all__ = ["make_directory", "refuse_existing", "unwritable", "write_text", "write_whole"]


def refuse_existing(paths: Iterable[Path], *, force: bool) -> None:
    """Refuse to write where something stands.

    Args:
        paths: of the files that are about to be written.
        force: replace them.

    Raises:
        OutputDirectoryError: one of them is there.
    """
    for path in paths:
        if path.exists() and not force:
            raise OutputDirectoryError(
                f"{str(path)!r} exists already",
                "choose another directory with -o, or pass --force to replace it",
            )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then move it there.

    Raises:
        OutputDirectoryError: the disk is full, or the directory cannot be written.
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def make_directory(path: Path) -> Path:
    """Make a directory and its parents.

    Raises:
        OutputDirectoryError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def unwritable(path: Path, error: OSError) -> OutputDirectoryError:
    """What a failed write tells the user."""
    return OutputDirectoryError(
        f"cannot write {str(path)!r} ({error.strerror or error})",
        "what stood there before is untouched; free some space or choose another directory with -o",
    )
