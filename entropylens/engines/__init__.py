"""What answers prompts: Hugging Face generate, vLLM, or several of either."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entropylens.dataset_files import BUNDLED
from entropylens.demo import demo_model
from entropylens.engines.engine import Engine
from entropylens.errors import SettingError
from entropylens.sources import hf, open_model, verl

__all__ = ["ENGINES", "check_named", "open_engine", "open_one"]

ENGINES = ("auto", "hf", "vllm")


def open_engine(
    model: Any,
    *,
    engine: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
) -> Engine:
    """The engine for a model.

    Args:
        model: a Hub id, directory, GGUF file or veRL checkpoint; None for the bundled model; or
            anything loaded that `sources.open_model` takes.
        engine: hf | vllm | auto, which is vLLM where it is installed and can read the model.
        dtype, device, revision, trust_remote_code: how a named model is loaded.
        tensor_parallel: GPUs that hold a model together (vLLM).
        data_parallel: copies of the model that share the prompts, each in a Ray actor.

    Raises:
        SettingError: no such engine, one that is not installed, or parallelism that it has not.
        EntropyLensError: the model cannot be loaded.
    """
    if engine not in ENGINES:
        raise SettingError(f"no engine {engine!r}", f"choose one of {', '.join(ENGINES)}")
    for name, value in (("tensor", tensor_parallel), ("data", data_parallel)):
        if value < 1:
            raise SettingError(f"--{name}-parallel is {value}", "give at least 1")
    named = model is None or isinstance(model, str | Path)
    chosen = engine
    if engine == "auto":
        loading = {
            "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        chosen = "vllm" if named and _vllm_reads(model, device, loading) else "hf"
    if chosen == "vllm" and importlib.util.find_spec("vllm") is None:
        raise SettingError("vLLM is not installed", "pip install vllm, or pass --engine hf")
    if not named and (chosen == "vllm" or data_parallel > 1):
        raise SettingError(
            "a loaded model answers by Hugging Face generate, in this process",
            "name the model instead",
        )
    if chosen == "vllm" and device == "cpu":
        raise SettingError(
            "vLLM runs where it was built for", "leave --device out, or pass --engine hf"
        )
    if chosen == "hf" and tensor_parallel > 1:
        raise SettingError("--tensor-parallel needs vLLM", "pass --engine vllm, or leave it out")
    options: dict[str, Any] = {
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    options |= {"device": device} if chosen == "hf" else {"tensor_parallel": tensor_parallel}
    if data_parallel > 1:
        from entropylens.engines.sharded import ShardedEngine

        return ShardedEngine(_path(model), chosen, options, data_parallel)
    if not named:
        from entropylens.engines.hf import HFEngine

        return HFEngine.of(open_model(model))
    return open_one(_path(model), chosen, options)


def open_one(model: str, engine: str, options: dict[str, Any]) -> Engine:
    """One copy of a named model."""
    if engine == "vllm":
        from entropylens.engines.vllm import VLLMEngine

        return VLLMEngine(model, **options)
    from entropylens.engines.hf import HFEngine

    return HFEngine.open(model, **options)


def _path(model: str | Path | None) -> str:
    return str(demo_model() if model in (None, BUNDLED) else model)


def check_named(models: Sequence[str], revision: str | None, trust_remote_code: bool) -> None:
    """Find out early which of several models is none, without loading any.

    Raises:
        EntropyLensError: as `sources.hf.load_config` where the first bad one is.
    """
    for model in models:
        path = Path(model).expanduser()
        if model == BUNDLED or path.is_file() or verl.steps(path):
            continue
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        options |= {"local_files_only": True} if path.is_dir() else {"revision": revision}
        with hf.explained(model):
            config = hf.load_config(str(path) if path.is_dir() else model, options)
        hf.check_decoder(config, model, trust_remote_code)


def _vllm_reads(model: str | Path | None, device: str, loading: dict[str, Any]) -> bool:
    if importlib.util.find_spec("vllm") is None or device not in ("auto", "cuda"):
        return False
    import torch

    path = Path(model).expanduser() if model is not None else None
    if path is not None and (path.is_file() or verl.steps(path)):
        return False
    if not torch.cuda.is_available():
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return False
    from entropylens.engines.vllm import VLLMEngine

    return VLLMEngine(_path(model), **loading).is_supported
