"""From a preset to a running veRL: compose, check, and start `python -m verl.trainer.main_ppo`.

Nothing of Ray or veRL's trainer is imported here: what cannot work is refused within seconds.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bupo.checks import check_config, check_files
from bupo.estimate import Estimate, estimate, free_disk
from bupo.model import check_model, model_config
from bupo.names import STOP_FILE
from bupo.settings import AUTO
from entropylens.demo import demo_model
from entropylens.errors import OutputDirectoryError, SettingError
from entropylens.files import make_directory, unwritable, write_text
from entropylens.rundir import open_run

__all__ = [
    "AUTO",
    "BUNDLED",
    "Plan",
    "claim",
    "compose",
    "internal_steps_overrides",
    "places",
    "plan",
    "presets",
    "start",
    "with_model",
]

logger = logging.getLogger(__name__)

#: As a model's path: the bundled SmolLM2.
BUNDLED = "bundled"
#: What a run writes, and so what --force may remove.
OWN_FILES = ("config.yaml", "metrics.jsonl", "phase.json", STOP_FILE)
OWN_DIRECTORIES = ("checkpoints", "rollouts", "tensorboard", "fixed_set", "hydra")
#: What `--layer auto`, `--layer race:` and `--probe-layers` leave there before a run.
PREFLIGHT = ("analysis", "recommendation.json", "layer_probe", "race")


def presets() -> dict[str, Path]:
    """The configurations that travel with the package, by name."""
    folder = Path(str(files("bupo") / "configs"))
    if not folder.is_dir():  # an editable install: training/configs beside training/bupo
        folder = Path(str(files("bupo"))).parent / "configs"
    return {
        file.stem: file for file in sorted(folder.glob("*.yaml")) if not file.stem.startswith("_")
    }


@dataclass(frozen=True)
class Plan:
    """A checked run.

    Args:
        config: resolved.
        command: what starts it.
        environment: variables that the command needs beside the caller's.
        directory: of the run.
        estimate: of memory and disk.
    """

    config: DictConfig
    command: tuple[str, ...]
    environment: Mapping[str, str]
    directory: Path
    estimate: Estimate

    @property
    def line(self) -> str:
        """The command as a shell takes it; it works alone."""
        return " ".join(
            [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
            + [shlex.quote(word) for word in self.command]
        )

    @property
    def text(self) -> str:
        """All of it for a reader."""
        return "\n".join([OmegaConf.to_yaml(self.config), *self.estimate.lines(), "", self.line])


def compose(config: str, overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """The configuration of a preset or file, and the options with which veRL composes the same.

    Args:
        config: a name of `presets()`, or a YAML file.
        overrides: Hydra's `key=value`.

    Raises:
        SettingError: no such configuration, or an override that Hydra refuses.
    """
    import hydra
    from hydra.errors import HydraException

    known = presets()
    file = known.get(config) or Path(config).expanduser()
    if not file.is_file():
        raise SettingError(
            f"there is no configuration {config!r}",
            f"name a YAML file, or one of {', '.join(known)}",
        )
    own = next(iter(known.values())).parent
    searched = [f"file://{own}", f"file://{_verl_configs()}"]
    search = f"hydra.searchpath=[{','.join(searched)}]"
    try:
        with hydra.initialize_config_dir(str(file.parent.resolve()), version_base=None):
            composed = hydra.compose(file.stem, [search, *overrides])
        resolved = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        line = " ".join(str(error).split())
        raise SettingError(
            f"{config} with {' '.join(overrides) or 'no overrides'}: {line}",
            "see `entropylens train --config NAME --dry-run` for the keys",
        ) from error
    options = ["--config-path", str(file.parent.resolve()), "--config-name", file.stem, search]
    return OmegaConf.create(resolved), options  # type: ignore[return-value]


def _verl_configs() -> Path:
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise SettingError("veRL is not installed", "pip install 'entropylens[train]'")
    return Path(spec.origin).parent / "trainer" / "config"


def with_model(config: str, overrides: Sequence[str]) -> DictConfig:
    """The composed configuration, its data and reward checked, `bundled` being resolved."""
    composed, _ = compose(config, overrides)
    if composed.actor_rollout_ref.model.path == BUNDLED:
        composed.actor_rollout_ref.model.path = str(demo_model())
    check_files(composed)
    return composed


def places(directory: Path) -> list[str]:
    """The overrides that let a run write into its directory."""
    directory = directory.absolute()
    own = {
        "bupo.run_dir": directory,
        "trainer.default_local_dir": directory / "checkpoints",
        "trainer.rollout_data_dir": directory / "rollouts",
        "hydra.run.dir": directory / "hydra",
        "hydra.output_subdir": "null",
    }
    return [f"{key}={value}" for key, value in own.items()]


def plan(
    config: str, directory: Path, overrides: Sequence[str] = (), *, check_machine: bool = True
) -> Plan:
    """Compose a run and refuse it where it cannot work.

    Args:
        config: a preset's name, or a YAML file.
        directory: for everything that the run writes.
        overrides: Hydra's `key=value`.
        check_machine: whether its GPUs and disk must be here.

    Raises:
        EntropyLensError: its subclasses say what is wrong and what to do.
    """
    directory = directory.absolute()
    all_overrides = [*places(directory), *overrides]
    composed, options = compose(config, all_overrides)
    if composed.actor_rollout_ref.model.path == BUNDLED:
        all_overrides.append(f"actor_rollout_ref.model.path={demo_model()}")
        composed, options = compose(config, all_overrides)
    check_config(composed)
    check_files(composed)
    hf_config = model_config(composed)
    check_model(composed, hf_config)
    needed = estimate(composed, hf_config, gpu_memory=_gpu_memory())
    if check_machine:
        _check_machine(composed, needed, directory)
    command = (sys.executable, "-m", "verl.trainer.main_ppo", *options, *all_overrides)
    return Plan(composed, command, _environment(composed, directory), directory, needed)


def _environment(config: DictConfig, directory: Path) -> dict[str, str]:
    found = {
        "VERL_USE_EXTERNAL_MODULES": "bupo.plugin",
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TENSORBOARD_DIR": str(directory / "tensorboard"),
    }
    if _is_alone(config):
        # Ray makes the machine's own address of 127.0.0.1, except where it forms no clusters.
        found["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if config.trainer.device == "cpu":
        from entropylens.doctor import usable_cores

        ranks = config.trainer.n_gpus_per_node
        threads = str(max(1, usable_cores() // ranks))
        found["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    if Path(config.actor_rollout_ref.model.path).is_dir():
        found["HF_HUB_OFFLINE"] = "1"  # a path was given: no network
    return found


def _is_alone(config: DictConfig) -> bool:
    """Whether veRL starts Ray for this run, on this machine."""
    return config.trainer.nnodes == 1 and not config.ray_kwargs.ray_init.get("address")


def _gpu_memory() -> float:
    """GiB of this machine's first GPU, or of the usual one where there is none."""
    import torch

    if not torch.cuda.is_available():
        return 80.0
    memory: int = torch.cuda.get_device_properties(0).total_memory
    return memory / 2**30


def _check_machine(config: DictConfig, needed: Estimate, directory: Path) -> None:
    import torch

    wanted, alone = config.trainer.n_gpus_per_node, _is_alone(config)
    if config.trainer.device == "cuda" and alone and torch.cuda.device_count() < wanted:
        raise SettingError(
            f"trainer.n_gpus_per_node={wanted}, and this machine has {torch.cuda.device_count()}",
            "set it to what is there, start on another machine, or see --dry-run",
        )
    if config.trainer.save_freq > 0 and (room := free_disk(directory)) < needed.checkpoint:
        raise OutputDirectoryError(
            f"a checkpoint takes about {needed.checkpoint:.1f} GiB, and {str(directory)!r} has "
            f"room for {room:.1f}",
            "choose another -o, or set trainer.save_freq=-1",
        )


def claim(planned: Plan, *, force: bool = False) -> None:
    """Make the directory this run's, without starting it.

    Raises:
        OutputDirectoryError: the directory holds a run with other settings.
    """
    settings = OmegaConf.to_container(planned.config, resolve=True)
    assert isinstance(settings, dict)
    settings["trainer"].pop("total_training_steps")  # a finished run may be prolonged
    if force:
        _clear(planned.directory)
    open_run(planned.directory, {"train": settings}, force=force, beside=PREFLIGHT)


def start(planned: Plan, *, force: bool = False) -> int:
    """Run it, resuming what is there; returns veRL's exit code.

    The first Ctrl-C lets the step finish, saves and stops; the second stops at once.

    Raises:
        OutputDirectoryError: the directory holds a run with other settings.
    """
    directory = planned.directory
    claim(planned, force=force)
    make_directory(directory)
    write_text(directory / "config.yaml", OmegaConf.to_yaml(planned.config))
    (directory / STOP_FILE).unlink(missing_ok=True)
    process = subprocess.Popen(
        planned.command, env=os.environ | dict(planned.environment), start_new_session=True
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        (directory / STOP_FILE).touch()
        logger.warning("stopping after this step; press Ctrl-C again to stop at once")
    try:
        return process.wait()
    except KeyboardInterrupt:
        logger.warning("stopping at once")
        return _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> int:
    """End veRL's driver, which takes Ray's processes with it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            return process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    return process.wait()


def _clear(directory: Path) -> None:
    try:
        for name in OWN_DIRECTORIES:
            shutil.rmtree(directory / name, ignore_errors=True)
        for name in OWN_FILES:
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(directory, error) from error


def internal_steps_overrides(config: DictConfig, internal_steps: str | None) -> list[str]:
    """What `--internal-steps` stands for; `auto` takes the preset's number as its maximum."""
    if internal_steps is None:
        return []
    if internal_steps != AUTO:
        return [f"bupo.internal_steps={internal_steps}"]
    found = ["bupo.internal_steps=auto"]
    if config.bupo.max_internal_steps is None:
        found.append(f"bupo.max_internal_steps={config.bupo.internal_steps}")
    if not config.bupo.analyze_every:
        found.append("bupo.analyze_every=1")
    return found
