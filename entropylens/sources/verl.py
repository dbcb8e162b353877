"""veRL checkpoints: FSDP shards become a Hugging Face model, and no pickled code ever runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from entropylens.errors import WeightsError
from entropylens.sources import hf
from entropylens.sources.verl_shards import (
    COPY_AGAIN,
    StateDict,
    local_part,
    merge,
    misfit,
    own_dtype,
    read_shard,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["assemble", "load", "steps"]

_STEP = re.compile(r"global_step_(\d+)")
_SHARD = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")


def steps(path: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, or the single one named: (global step, actor directory).

    A `huggingface` directory counts where it lacks weights, so that its actor's shards are needed.
    Sorted by step; empty where there is none. The step is 0 for an actor directory that stands in
    no `global_step_<N>`. Steps whose actor veRL has removed to make room are left out.

    Raises:
        WeightsError: a checkpoint lacks a shard.
    """
    found = _actors(path)
    for _, actor in found:
        if not _has_weights(actor / "huggingface"):
            _shard_files(actor)
    return found


def load(
    actor: Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the model of an actor directory, and its tokenizer, without looking into it yet.

    Safetensors in `huggingface/` are taken where they are; else the shards are merged, one tensor
    at a time, straight into the model.

    Args:
        actor: a directory from `steps`.
        dtype: auto (float32 on a CPU, the shards' own on a GPU) or a torch dtype.
        device: auto (cuda, else cpu) or a torch device.
        trust_remote_code: let Python code in `huggingface/` run.

    Raises:
        WeightsError: shards are missing, corrupt, could run code, or do not fit the configuration.
        NotADecoderError, SettingError, AllocationError: what their names say.
    """
    folder = actor / "huggingface"
    dtype = str(dtype).removeprefix("torch.")
    place = hf.pick_device(device)
    _refuse_adapter(actor)
    if _has_weights(folder):
        return hf.load_unverified(
            folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
    files = _shard_files(actor)
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"checkpoint {str(actor)!r} holds no huggingface/config.json",
            "copy the model's config.json and tokenizer there; rank 0 of the run wrote them",
        )
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with hf.explained(str(actor)):
        config = hf.load_config(str(folder), options)
    hf.check_decoder(config, str(actor), trust_remote_code)
    with hf.explained(str(actor)):
        shards = [read_shard(file) for file in files]
        _check_wrapping(shards[0], actor)
        asked = hf.pick_dtype(dtype, place)
        chosen = asked if isinstance(asked, torch.dtype) else own_dtype(shards[0])
        model = _empty_model(config, chosen, trust_remote_code)
        _fill(model, shards, chosen, place, actor)
        _add_generation_config(model, folder)
    return model.to(place).eval(), hf.load_tokenizer(str(folder), folder, options)


def assemble(
    config: PretrainedConfig,
    weights: StateDict,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a configuration with these weights, whole tensors under its own names.

    Raises:
        WeightsError: they do not fit the configuration.
    """
    model = _empty_model(config, dtype, trust_remote_code)
    place = torch.device(device)
    _fill(model, [weights], dtype, place, Path("weights in memory"))
    return model.to(place).eval()


def _actors(path: Path) -> list[tuple[int, Path]]:
    """(step, actor directory) of all checkpoints here, whole or not."""
    path = path.expanduser()
    if not path.is_dir():
        return []
    inside = path / "checkpoints"  # of a run of `entropylens train`
    series = [
        (int(match[1]), child / "actor")
        for folder in (path, *([inside] if inside.is_dir() else []))
        for child in folder.iterdir()
        if (match := _STEP.fullmatch(child.name)) and _is_actor(child / "actor")
    ]
    if series:
        return sorted(series)
    candidates = [path, path / "actor"]
    if path.name == "huggingface" and not _has_weights(path):
        candidates.append(path.parent)
    for actor in filter(_is_actor, candidates):
        match = _STEP.fullmatch(actor.resolve().parent.name)
        return [(int(match[1]) if match else 0, actor)]
    return []


def _is_actor(path: Path) -> bool:
    if not path.is_dir():
        return False
    names = (child.name for child in path.iterdir())
    return any(name == "fsdp_config.json" or _SHARD.fullmatch(name) for name in names)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))


def _shard_files(actor: Path) -> list[Path]:
    """All shards of the checkpoint, by rank.

    Raises:
        WeightsError: one is missing, or nothing tells how many there should be.
    """
    found = {
        (int(match[1]), int(match[2]))
        for child in actor.iterdir()
        if (match := _SHARD.fullmatch(child.name))
    }
    world = _world_size(actor, {size for size, _ in found})
    missing = next((rank for rank in range(world) if (world, rank) not in found), None)
    if missing is not None:
        name = f"model_world_size_{world}_rank_{missing}.pt"
        raise WeightsError(
            f"checkpoint {str(actor)!r} is incomplete ({name} is missing)",
            "copy it from the node that ran this rank, wait until the run has written it, "
            "or name another step",
        )
    return [actor / f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]


def _world_size(actor: Path, sizes: set[int]) -> int:
    """The number of ranks that wrote the checkpoint; older veRL told it in file names alone."""
    file = actor / "fsdp_config.json"
    if file.is_file():
        try:
            world = json.loads(file.read_text(encoding="utf-8"))["world_size"]
            if type(world) is not int or world < 1:
                raise ValueError(f"world_size is {world!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{str(file)!r} is corrupt ({error})", COPY_AGAIN) from error
        return world
    if len(sizes) != 1:
        raise WeightsError(
            f"checkpoint {str(actor)!r} holds shards of several runs (world sizes "
            f"{', '.join(map(str, sorted(sizes)))})",
            "keep those of one run there, or put its fsdp_config.json beside them",
        )
    return sizes.pop()


def _refuse_adapter(actor: Path) -> None:
    if (actor / "lora_train_meta.json").is_file() or (actor / "lora_adapter").is_dir():
        raise _adapter_error(actor)


def _check_wrapping(shard: StateDict, actor: Path) -> None:
    """Refuse names that are not the plain model's own."""
    for name in shard:
        if "lora_" in name or name.startswith("base_model."):
            raise _adapter_error(actor)
        if "_fsdp_wrapped_module." in name or name.startswith("module."):
            raise WeightsError(
                f"checkpoint {str(actor)!r} was saved from inside a wrapper ({name})",
                f"merge it with veRL, then name the result: {_merge_command(actor)}",
            )


def _adapter_error(actor: Path) -> WeightsError:
    return WeightsError(
        f"checkpoint {str(actor)!r} trained a LoRA adapter, which is kept apart from its base",
        f"split it with veRL ({_merge_command(actor)}), load DIR with PEFT and DIR/lora_adapter, "
        "and name the directory that merge_and_unload().save_pretrained() writes",
    )


def _merge_command(actor: Path) -> str:
    return (
        "python -m verl.model_merger merge --backend fsdp "
        f"--local_dir {str(actor)!r} --target_dir DIR"
    )


def _empty_model(
    config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The model without storage for its parameters; buffers are computed as usual."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if hf.is_wrapper(config) else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        return auto.from_config(
            config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **hf.attention_for(config),
        )


def _fill(
    model: PreTrainedModel,
    shards: Sequence[StateDict],
    dtype: torch.dtype,
    place: torch.device,
    actor: Path,
) -> None:
    """Give every parameter and saved buffer its merged values, and tie what is tied.

    Raises:
        WeightsError: names, shapes or ties differ from the configuration's.
    """
    targets: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    _check_names(set(targets) - set(tied), set(targets), shards, actor)
    for name, target in targets.items():
        if name in tied:
            _check_tie(name, tied[name], shards, actor)
            continue
        merged = merge(name, [shard[name] for shard in shards], actor)
        if merged.shape != target.shape:
            raise misfit(
                actor, f"{name} is {tuple(merged.shape)}, configured as {tuple(target.shape)}"
            )
        exact = torch.float32 if _stays_float32(model, name, dtype) else target.dtype
        _put(model, name, target, merged.to(place, exact))
    model.tie_weights()


def _stays_float32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether `from_pretrained` would keep this tensor in float32 under a half-precision dtype."""
    kept: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(model._keep_in_fp32_modules_strict or ())
    if dtype is torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in kept)


def _check_names(
    needed: set[str], known: set[str], shards: Sequence[StateDict], actor: Path
) -> None:
    """Refuse shards that differ in their names from the model, or among themselves."""
    present = set(shards[0])
    for rank, shard in enumerate(shards):
        if set(shard) != present:
            odd = min(set(shard) ^ present)
            raise misfit(actor, f"ranks 0 and {rank} differ in {odd}")
    if missing := needed - present:
        raise misfit(actor, f"{len(missing)} tensors are missing, such as {min(missing)}")
    if unexpected := present - known:
        raise misfit(actor, f"{len(unexpected)} tensors are unknown, such as {min(unexpected)}")


def _check_tie(name: str, source: str, shards: Sequence[StateDict], actor: Path) -> None:
    """Refuse two tensors that the configuration ties but that differ."""
    if all(
        name not in shard or torch.equal(local_part(shard[name]), local_part(shard[source]))
        for shard in shards
    ):
        return
    raise WeightsError(
        f"checkpoint {str(actor)!r} ties {name} to {source}, but they differ",
        "set tie_word_embeddings to false in its huggingface/config.json",
    )


def _put(model: PreTrainedModel, name: str, target: torch.Tensor, value: torch.Tensor) -> None:
    """Replace a parameter, which has no storage yet, or a buffer."""
    owner, _, leaf = name.rpartition(".")
    new: Any = value
    if isinstance(target, torch.nn.Parameter):
        new = torch.nn.Parameter(value, requires_grad=target.requires_grad)
    setattr(model.get_submodule(owner), leaf, new)


def _add_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Take over the end tokens, which many models name there alone."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
