"""What a run must not be started with: found out from the configuration alone, before Ray."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
from omegaconf import DictConfig, ListConfig, OmegaConf

from bupo.names import ROLLOUT
from bupo.settings import Settings
from entropylens.errors import DatasetError, SettingError

__all__ = ["check_config", "check_files", "listed", "reward_function"]

_BACKENDS = ("fsdp", "fsdp2")
_COLUMNS = ("prompt", "data_source", "reward_model")


def check_config(config: DictConfig) -> None:
    """Refuse what BuPO cannot do, or what would not mean what it says.

    Args:
        config: veRL's, resolved, with the `bupo` node.

    Raises:
        SettingError: with the setting to change.
    """
    settings = Settings.of(config)
    _check_backend(config, settings)
    _check_objective(config, settings)
    _check_batches(config)
    if config.trainer.device == "cpu":
        _check_cpu(config)


def _check_backend(config: DictConfig, settings: Settings) -> None:
    strategy = config.actor_rollout_ref.actor.strategy
    if strategy not in _BACKENDS:
        raise SettingError(
            f"actor_rollout_ref.actor.strategy={strategy} is a backend that BuPO has no engine for",
            f"use {' or '.join(_BACKENDS)}",
        )
    if not config.trainer.use_v1:
        raise SettingError("trainer.use_v1=False asks for veRL's old trainer", "leave it at True")
    mode = config.trainer.v1.trainer_mode
    if mode in ("sync", "cpu") and (settings.trains_inner or settings.analyze_every):
        raise SettingError(
            f"trainer.v1.trainer_mode={mode} is veRL's own trainer, which knows no bupo settings",
            "set it to bupo, or bupo.internal_steps=0 and bupo.analyze_every=0",
        )
    if mode not in ("bupo", "sync", "cpu"):
        raise SettingError(
            f"trainer.v1.trainer_mode={mode} is not BuPO's: asynchronous training has no place "
            "for an internal phase yet",
            "set it to bupo",
        )
    for key in (
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size",
        "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size",
    ):
        if (OmegaConf.select(config, key) or 1) > 1:
            raise SettingError(f"{key} > 1: sequence parallelism is not supported", "set it to 1")
    if OmegaConf.select(config, "distillation.enabled"):
        raise SettingError("distillation.enabled=True is not supported", "set it to False")
    if OmegaConf.select(config, "actor_rollout_ref.model.mtp.enable"):
        raise SettingError(
            "actor_rollout_ref.model.mtp.enable=True is not supported", "set it to False"
        )
    if settings.analyze_every and strategy != "fsdp2":
        raise SettingError(
            "bupo.analyze_every gathers the weights as FSDP2 keeps them, and "
            f"actor_rollout_ref.actor.strategy={strategy}",
            "set the strategy to fsdp2, or bupo.analyze_every=0",
        )
    if settings.analyze_every and settings.layer is None:
        raise SettingError(
            "bupo.analyze_every looks at a layer, and none is given",
            "pass bupo.layer=N (with bupo.internal_steps=0 nothing trains it)",
        )


def _check_objective(config: DictConfig, settings: Settings) -> None:
    watching = settings.layer is not None and settings.log_both_policies
    if config.actor_rollout_ref.model.use_fused_kernels and watching:
        raise SettingError(
            "bupo.log_both_policies reads logits, which fused kernels never show",
            "set bupo.log_both_policies=False or actor_rollout_ref.model.use_fused_kernels=False",
        )
    correction = config.algorithm.get("rollout_correction") or {}
    if not settings.trains_inner:
        return
    if correction.get("bypass_mode"):
        raise SettingError(
            "algorithm.rollout_correction.bypass_mode=True takes the rollout's log-probabilities, "
            "which are pi_theta's, for old ones of pi_l",
            "set it to False",
        )
    for name in ("rollout_is", "rollout_rs"):
        if correction.get(name):
            raise SettingError(
                f"algorithm.rollout_correction.{name} compares pi_l with the rollout's pi_theta",
                "set it to null",
            )
    kl = {
        "actor_rollout_ref.actor.use_kl_loss": config.actor_rollout_ref.actor.use_kl_loss,
        "algorithm.use_kl_in_reward": config.algorithm.use_kl_in_reward,
    }
    for key, used in kl.items():
        if used and not settings.kl_in_internal_phase:
            raise SettingError(
                f"{key}=True would compare pi_l with the reference's pi_theta in the internal "
                "phase",
                "set it to False, or ask for it with bupo.kl_in_internal_phase=True",
            )


def _check_batches(config: DictConfig) -> None:
    actor, samples = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    batch, mini = config.data.train_batch_size, actor.ppo_mini_batch_size
    _must_divide(
        mini, batch, "actor_rollout_ref.actor.ppo_mini_batch_size", "data.train_batch_size"
    )
    _must_divide(ranks, mini * samples, "the number of ranks", "ppo_mini_batch_size * rollout.n")
    micro = actor.ppo_micro_batch_size_per_gpu
    if actor.use_dynamic_bsz:
        longest = config.data.max_prompt_length + config.data.max_response_length
        if actor.ppo_max_token_len_per_gpu < longest:
            raise SettingError(
                "actor_rollout_ref.actor.ppo_max_token_len_per_gpu="
                f"{actor.ppo_max_token_len_per_gpu} cannot hold one prompt and response of "
                f"{longest} tokens",
                f"set it to {longest} or more",
            )
    elif micro is None:
        raise SettingError(
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu is not given",
            "give it, or set actor_rollout_ref.actor.use_dynamic_bsz=True",
        )
    else:
        _must_divide(
            micro, mini * samples // ranks,
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
            "ppo_mini_batch_size * rollout.n / ranks",
        )  # fmt: skip
    if config.algorithm.adv_estimator == "gae":
        _must_divide(
            config.critic.ppo_mini_batch_size, batch,
            "critic.ppo_mini_batch_size", "data.train_batch_size",
        )  # fmt: skip
    if config.algorithm.adv_estimator in ("grpo", "rloo") and samples < 2:
        raise SettingError(
            f"algorithm.adv_estimator={config.algorithm.adv_estimator} compares the answers to one "
            f"prompt, and actor_rollout_ref.rollout.n={samples}",
            "set it to 2 or more",
        )


def _must_divide(part: int, whole: int, part_name: str, whole_name: str) -> None:
    if part > 0 and whole % part == 0:
        return
    fitting = [it for it in range(1, whole + 1) if whole % it == 0]
    near = sorted(sorted(fitting, key=lambda it: abs(it - part))[:4])
    raise SettingError(
        f"{part_name} ({part}) does not divide {whole_name} ({whole})",
        f"{', '.join(map(str, near))} would, or change {whole_name}",
    )


def _check_cpu(config: DictConfig) -> None:
    roles = ["actor_rollout_ref.actor", "actor_rollout_ref.ref"]
    if config.algorithm.adv_estimator == "gae":
        roles.append("critic")
    for role in roles:
        strategy = OmegaConf.select(config, f"{role}.strategy")
        if strategy == "fsdp":
            raise SettingError(f"{role}.strategy=fsdp wants GPUs", "on a CPU, set it to fsdp2")
    rollout = config.actor_rollout_ref.rollout
    if rollout.name != ROLLOUT:
        raise SettingError(
            f"actor_rollout_ref.rollout.name={rollout.name} needs a GPU", f"set it to {ROLLOUT}"
        )
    for name, sampling in (("", rollout), (".val_kwargs", rollout.val_kwargs)):
        if sampling.top_p != 1 or sampling.top_k not in (-1, 0):
            raise SettingError(
                f"actor_rollout_ref.rollout{name}.top_p or top_k is set, and the CPU rollout "
                "samples the whole distribution",
                "leave them at 1 and -1",
            )
    if rollout.tensor_model_parallel_size != 1:
        raise SettingError(
            "actor_rollout_ref.rollout.tensor_model_parallel_size > 1 needs GPUs", "set it to 1"
        )
    model = config.actor_rollout_ref.model
    if model.get("lora_rank", 0) > 0 and not (model.get("lora") or {}).get("merge"):
        raise SettingError(
            "the CPU rollout takes whole weights, and LoRA adapters are sent apart",
            "set actor_rollout_ref.model.lora.merge=True",
        )


def check_files(config: DictConfig) -> None:
    """Refuse a dataset or a reward function that is not there.

    Raises:
        DatasetError: a file is missing, or is none that veRL reads.
        SettingError: no such reward function.
    """
    for key in ("train_files", "val_files"):
        for file in listed(config.data[key]):
            _check_dataset(file, f"data.{key}")
    reward_function(config)


def listed(files: Any) -> Iterator[str]:
    """The files of `data.train_files` or `data.val_files`: one, or a list of them."""
    yield from files if isinstance(files, ListConfig | list) else [files]


def _check_dataset(file: str, key: str) -> None:
    path = Path(file).expanduser()
    if not path.is_file():
        raise DatasetError(
            f"{key}={file} does not exist",
            "make it with `entropylens prepare DATASET -o FILE.parquet`, or name your own",
        )
    try:
        columns = pq.read_schema(path).names
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{key}={file} cannot be read ({error})", "name a parquet file"
        ) from error
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise DatasetError(
            f"{key}={file} lacks the columns {', '.join(missing)}",
            "let `entropylens prepare` write it",
        )


def reward_function(config: DictConfig) -> Callable[..., Any]:
    """The reward function of a run with its settings, found as veRL finds it.

    Raises:
        SettingError: there is none.
    """
    function = config.reward.custom_reward_function
    path, name = function.path, function.name
    if path is None:
        raise SettingError(
            "no reward function is given, and veRL's own knows few datasets",
            "set reward.custom_reward_function.path (a file, or pkg://bupo.reward) and .name",
        )
    try:
        found = getattr(_module(path), name, None)
    except Exception as error:  # whatever a user's file raises
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingError(
            f"reward.custom_reward_function.path={path} cannot be loaded ({line})",
            "name a Python file, or pkg://module",
        ) from error
    if not callable(found):
        raise SettingError(
            f"reward.custom_reward_function.path={path} has no function {name!r}",
            "give its name as reward.custom_reward_function.name",
        )
    return partial(found, **(function.get("reward_kwargs") or {}))


def _module(path: str) -> ModuleType:
    if path.startswith("pkg://"):
        return importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
    file = Path(path.removeprefix("file://")).expanduser()
    spec = importlib.util.spec_from_file_location("custom_reward", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
