"""Training runs as a user starts them: `entropylens train` in a process of its own."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from tiny import tiny_tokenizer

from entropylens.specimens import tiny_config

__all__ = ["REWARD", "exported", "interrupt", "metrics", "save_toy", "start", "steps_of", "train"]

#: Dense enough for a random model: the share of digits among the characters.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    digits = sum(it.isdigit() for it in solution_str) / max(1, len(solution_str))
    return {"score": digits, "acc": float(solution_str.startswith(ground_truth))}
"""


def save_toy(path, *, tied=False):
    """A tiny Qwen3 with its tokenizer, sums as data, and a reward function."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("qwen3")
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(path / "model")
    draw = random.Random(0)
    rows = []
    for index in range(64):
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        rows.append(
            {
                "data_source": "sums",
                "prompt": [{"role": "user", "content": f"{a}+{b}="}],
                "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                "extra_info": {"split": "train", "index": index},
            }
        )
    pd.DataFrame(rows).to_parquet(path / "train.parquet")
    (path / "reward.py").write_text(REWARD)
    return path


def command(toy, directory, *overrides):
    """tiny-cpu on the toy; a checkpoint a step, so that each step can be looked into."""
    return [
        *(Path(sys.executable).parent / "entropylens", "train", "--config", "tiny-cpu"),
        *("-o", directory),
        f"actor_rollout_ref.model.path={toy / 'model'}",
        f"data.train_files={toy / 'train.parquet'}",
        f"reward.custom_reward_function.path={toy / 'reward.py'}",
        "trainer.save_freq=1",
        *overrides,
    ]


def start(toy, directory, *overrides, **environment):
    """The process, its output going to a file beside the run."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    log = directory.parent / f"{directory.name}.log"
    with log.open("ab") as out:
        return subprocess.Popen(
            [str(word) for word in command(toy, directory, *overrides)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            start_new_session=True,
            # A shell's background job, as `make test` makes one of these tests, ignores it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def train(toy, directory, *overrides, **environment):
    """Run to the end."""
    process = start(toy, directory, *overrides, **environment)
    code = process.wait()
    log = (directory.parent / f"{directory.name}.log").read_text()
    assert code == 0, log[-4000:]
    return directory


def interrupt(process, directory):
    """Ctrl-C once veRL has opened its loggers, before the first step."""
    while process.poll() is None:
        if any((directory / "tensorboard").glob("*")):
            os.kill(process.pid, signal.SIGINT)
            break
        time.sleep(0.2)
    return process.wait()


def metrics(directory):
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def steps_of(directory):
    found = (directory / "checkpoints").glob("global_step_*")
    return sorted(int(it.name.removeprefix("global_step_")) for it in found)


def exported(directory, step, target):
    """The weights of a step, by the name they have in the model, from `entropylens export`."""
    from entropylens.export import export

    written = target / f"{directory.name}-{step}"
    if not written.exists():
        checkpoint = directory / "checkpoints" / f"global_step_{step}"
        export(checkpoint, written, dtype="float32")
    return load_file(written / "model.safetensors")
