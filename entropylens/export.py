"""A training checkpoint as an ordinary Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from entropylens.errors import OutputDirectoryError, SettingError
from entropylens.files import make_directory, unwritable
from entropylens.sources import hf, load_named, verl

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
        force: replace an existing model.

    Raises:
        SettingError: it is no checkpoint, or one of a whole run.
        WeightsError: its shards do not make up the model.
        OutputDirectoryError: the directory exists, or cannot be written.
    """
    target = Path(directory)
    is_model = (target / "config.json").is_file()  # --force replaces a model, nothing else
    if target.exists() and not (force and is_model):
        raise OutputDirectoryError(
            f"{str(target)!r} exists already",
            "choose another directory" + (", or pass --force" if is_model else ""),
        )
    found = verl.steps(Path(checkpoint))
    if not found:
        raise SettingError(
            f"{str(checkpoint)!r} holds no veRL checkpoint",
            "name a directory such as checkpoints/global_step_300",
        )
    if dtype == "auto":
        options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        with hf.explained(str(checkpoint)):
            config = hf.load_config(str(found[0][1] / "huggingface"), options)
        dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    model, tokenizer = load_named(
        checkpoint, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code
    )
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
