"""A run's directory: whose it is, what of it is finished, and what may be overwritten."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from entropylens.errors import OutputDirectoryError, SettingError
from entropylens.files import make_directory, unwritable, write_text, write_whole

__all__ = ["RunDirectory", "distinct_names", "fingerprint", "new_directory", "open_run"]

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
PARTS = "parts"
#: What a run writes, and so what --force may remove.
OWN_FILES = (
    RUN_FILE,
    "layers.csv",
    "responses.parquet",
    "tokens.parquet",
    "analysis.json",
    "report.html",
    "completions.jsonl",
    "benchmarks.json",
    "grades.parquet",
    "problems.csv",
    "scores.csv",
    "evaluation.json",
)
OWN_FIGURES = ("figures/figure[0-9]*_*.p[nd][gf]", "figures/trainability.p[nd][gf]")


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A digest of settings: equal settings, equal digest."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def new_directory(model_name: str, root: Path = Path("runs")) -> Path:
    """`runs/<model>-<n>`, n the first number that is free."""
    name = model_name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf") or "model"
    number = 1
    while (root / f"{name}-{number}").exists():
        number += 1
    return root / f"{name}-{number}"


def distinct_names(paths: Sequence[str]) -> tuple[str, ...]:
    """A name for each path or Hub id: its last part, with parts before it where two are alike.

    Raises:
        SettingError: one of them twice, or a name that no directory can have.
    """
    parts = []
    for path in paths:
        local = Path(path).expanduser()
        whole = local.resolve() if local.exists() else local
        parts.append([part for part in whole.parts if part not in ("/", ".", "..")] or [""])
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    else:
        twice = next(name for name in names if names.count(name) > 1)
        raise SettingError(f"{twice!r} is named twice", "name each once")
    if not all(names):
        raise SettingError("an empty name stands for no model or run", "name one")
    return tuple(names)


@dataclass(frozen=True)
class RunDirectory:
    """An open run directory that belongs to these settings.

    Args:
        path: the directory.
    """

    path: Path

    @property
    def completions(self) -> Path:
        """Where generated responses are kept."""
        return self.path / "completions.jsonl"

    @property
    def complete(self) -> bool:
        """Whether the run is through: analysis.json is written last."""
        return (self.path / "analysis.json").is_file()

    def finished(self) -> tuple[list[pd.DataFrame], list[pd.DataFrame]]:
        """What is measured so far: rows of responses.parquet, and of tokens.parquet.

        A part that cannot be read is dropped, and its responses are measured again.
        """
        rows, single = [], []
        for part in sorted((self.path / PARTS).glob("[0-9]*.parquet")):
            try:
                there = [it for it in (part, _tokens_of(part)) if it.is_file()]
                read = [pd.read_parquet(it) for it in there]
            except (OSError, ValueError) as error:
                logger.warning("%s cannot be read (%s) and is measured again", part, error)
                part.unlink()
                continue
            rows.append(read[0])
            single += read[1:]
        return rows, single

    def add(self, rows: pd.DataFrame, tokens: pd.DataFrame | None = None) -> None:
        """Keep the finished rows of some responses, and of their single tokens."""
        first = int(rows["response_id"].iloc[0])
        part = make_directory(self.path / PARTS) / f"{first:08d}.parquet"
        if tokens is not None:  # before the part, which says that all of it is there
            write_whole(_tokens_of(part), lambda aside: tokens.to_parquet(aside, index=False))
        write_whole(part, lambda aside: rows.to_parquet(aside, index=False))

    def close(self) -> None:
        """Drop the parts once everything stands in the final files."""
        shutil.rmtree(self.path / PARTS, ignore_errors=True)


def _tokens_of(part: Path) -> Path:
    return part.with_name(f"tokens-{part.name}")


def open_run(
    path: Path,
    settings: Mapping[str, Any],
    *,
    force: bool = False,
    beside: Collection[str] = (),
) -> RunDirectory:
    """Open a directory for a run: a new one, or one of the same settings, which is resumed.

    Args:
        path: made if it does not exist.
        settings: everything that the run's results depend on.
        force: start anew: remove a run's files first, but none that no run writes.
        beside: names that may stand there before the run.

    Raises:
        OutputDirectoryError: it holds something else, or cannot be written.
    """
    mark = fingerprint(settings)
    run_file = path / RUN_FILE
    try:
        occupied = path.exists()
        if occupied and not path.is_dir():
            raise OutputDirectoryError(
                f"{str(path)!r} is a file", "choose a directory for the run with -o"
            )
        # What a killed write left aside begins with a dot and counts for nothing.
        occupied = occupied and any(
            not one.name.startswith(".") and one.name not in beside for one in path.iterdir()
        )
    except OSError as error:
        raise unwritable(path, error) from error
    if occupied:
        found = _read_mark(run_file)
        if found == mark and not force:
            return RunDirectory(path)
        if not force:
            what = "something else"
            if found is not None:
                what = f"a run with other settings{_difference(run_file, settings)}"
            raise OutputDirectoryError(
                f"{str(path)!r} holds {what}",
                "choose another directory with -o, or pass --force to replace that run",
            )
        if found is not None:
            _clear(path)
        else:  # what a run reads must be its own
            (path / "completions.jsonl").unlink(missing_ok=True)
    make_directory(path)
    content = {"fingerprint": mark, "settings": dict(settings)}
    write_text(run_file, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return RunDirectory(path)


def _read_mark(run_file: Path) -> str | None:
    try:
        return str(json.loads(run_file.read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _difference(run_file: Path, settings: Mapping[str, Any]) -> str:
    """The names of settings that differ, in brackets."""
    try:
        theirs = dict(json.loads(run_file.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    ours = json.loads(json.dumps(dict(settings)))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return f" ({', '.join(names)})" if names else ""


def _clear(path: Path) -> None:
    try:
        if (path / PARTS).is_dir():
            shutil.rmtree(path / PARTS)
        for file in [
            *(path / name for name in OWN_FILES),
            *(file for pattern in OWN_FIGURES for file in path.glob(pattern)),
        ]:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
