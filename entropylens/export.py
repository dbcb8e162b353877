"""A training checkpoint as an ordinary Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropylens.errors import OutputDirectoryError, SettingError
from entropylens.files import make_directory, unwritable
from entropylens.sources import load_named, verl

if TYPE_CHECKING:
    import torch

__all__ = ["export"]


def export(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
) -> Path:
    """Write the model of a veRL checkpoint, its tokenizer and generation settings.

    Args:
        checkpoint: `global_step_<N>`, or its actor directory.
        directory: the new directory, which appears whole.
        dtype: auto (what the model's configuration names), float32, bfloat16 or float16.
        trust_remote_code: let Python code beside the checkpoint run.
        force: replace an existing directory.

    Raises:
        SettingError: it is no checkpoint, or one of a whole run.
        WeightsError: its shards do not make up the model.
        OutputDirectoryError: the directory exists, or cannot be written.
    """
    target = Path(directory)
    if target.exists() and not force:
        raise OutputDirectoryError(
            f"{str(target)!r} exists already", "choose another directory, or pass --force"
        )
    if not verl.steps(Path(checkpoint)):
        raise SettingError(
            f"{str(checkpoint)!r} holds no veRL checkpoint",
            "name a directory such as checkpoints/global_step_300",
        )
    model, tokenizer = load_named(
        checkpoint, dtype="float32", device="cpu", trust_remote_code=trust_remote_code
    )
    model = model.to(_dtype(model.config, dtype))
    make_directory(target.parent)
    aside = target.with_name(f".{target.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _dtype(config: Any, asked: str) -> torch.dtype:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if asked == "auto":
        found = getattr(config, "dtype", None)
        return found if isinstance(found, torch.dtype) else known.get(str(found), torch.float32)
    if asked not in known:
        raise SettingError(f"no dtype {asked!r}", f"choose auto or one of {', '.join(known)}")
    return known[asked]
