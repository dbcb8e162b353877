"""One run twice: in this process, and by `entropylens train` (veRL: Ray, FSDP2), draw for draw.

The problems stand in the training file in the order in which the run in this process meets them,
and samples are keyed alike; so both are one run, up to the order of sums in floating point.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from bupo import launch
from bupo.lab.jobs import Job, perform
from bupo.lab.run import ROLLOUTS
from bupo.lab.task import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS, draw_sums
from entropylens.errors import TrainingFilesError
from entropylens.files import make_directory, write_whole
from entropylens.training_run import TrainingRun

__all__ = ["HERE", "VERL", "run_twins"]

#: The names of the two.
HERE, VERL = "in this process", "through veRL"
PRESET = "tiny-cpu"


def run_twins(here: Job, directory: Path) -> dict[str, TrainingRun]:
    """The two runs, made where they are not there yet; by name.

    Args:
        here: the run in this process.
        directory: for veRL's data and run.

    Raises:
        TrainingFilesError: veRL ended before the last step.
        EntropyLensError: as `bupo.launch.plan`.
    """
    if not here.finished:
        perform(here)
    there, data = directory / "verl", directory / "sums.parquet"
    if not data.is_file():
        write_problems(here, data)
    if _steps_in(there) < here.course.steps:
        code = launch.start(launch.plan(PRESET, there, overrides(here, data)))
        if code != 0 or _steps_in(there) < here.course.steps:
            raise TrainingFilesError(
                f"veRL ended with exit code {code} in {str(there)!r}",
                "see its message above; the same command begins that run anew",
            )
    return {HERE: TrainingRun.load(here.directory), VERL: TrainingRun.load(there)}


def _steps_in(directory: Path) -> int:
    """Steps that a run has made; one that is stopped leaves no checkpoint to go on from."""
    try:
        return len(TrainingRun.load(directory).metrics)
    except TrainingFilesError:
        return 0


def write_problems(job: Job, file: Path) -> None:
    """The run's problems, step by step, as veRL reads them."""
    rows: list[dict[str, Any]] = []
    for step in range(1, job.course.steps + 1):
        for it in draw_sums("train", job.course.prompts, ROLLOUTS, job.seed, step):
            rows.append(
                {
                    "data_source": "sums",
                    "prompt": [{"role": "user", "content": it.prompt}],
                    "reward_model": {"style": "rule", "ground_truth": it.gold},
                    "extra_info": {"index": len(rows)},
                }
            )
    make_directory(file.parent)
    write_whole(file, lambda aside: pd.DataFrame(rows).to_parquet(aside, index=False))


def overrides(job: Job, data: Path) -> list[str]:
    """What makes veRL's run this one."""
    arm, course = job.arm, job.course
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    asked = course.prompts // course.rates.updates  # prompts of an update
    together = asked * course.samples
    return [
        f"actor_rollout_ref.model.path={job.start.absolute()}",
        f"data.train_files={data.absolute()}",
        "data.shuffle=False",
        f"data.train_batch_size={course.prompts}",
        f"data.max_prompt_length={MAX_PROMPT_TOKENS}",
        f"data.max_response_length={MAX_ANSWER_TOKENS}",
        f"{rollout}.n={course.samples}",
        f"{rollout}.seed={job.seed}",
        f"{actor}.ppo_mini_batch_size={asked}",
        f"{actor}.ppo_micro_batch_size_per_gpu={together}",
        f"{actor}.optim.lr={course.rates.lr}",
        f"{actor}.optim.weight_decay={course.rates.weight_decay}",
        f"{actor}.grad_clip={course.rates.max_grad_norm}",
        "reward.custom_reward_function.reward_kwargs.mode=strict",
        f"bupo.layer={arm.layer}",
        f"bupo.internal_steps={arm.internal_steps}",
        f"trainer.total_training_steps={course.steps}",
        "trainer.total_epochs=1",
        "trainer.save_freq=-1",
    ]
