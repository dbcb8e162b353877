"""prepare, train and export from the command line; whole runs are in tests/bupo."""

import json

import pandas as pd
import pytest
from trained import save_toy

from entropylens.errors import OutputDirectoryError
from entropylens.export import export


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy"))


def settings(toy):
    return [
        f"actor_rollout_ref.model.path={toy / 'model'}",
        f"data.train_files={toy / 'train.parquet'}",
        f"reward.custom_reward_function.path={toy / 'reward.py'}",
        "bupo.internal_steps=1",
    ]


def test_prepare_writes_and_counts(entropylens, tmp_path):
    target = tmp_path / "sums.parquet"
    options = ["--size", "20", "--val-size", "5", "--task-option", "max_terms=2"]
    done = entropylens("prepare", "reasoning_gym:chain_sum", "-o", str(target), *options)
    assert done.returncode == 0, done.stderr
    assert "of 25 rows 20 in" in done.stdout
    assert len(pd.read_parquet(target)) == 20
    assert len(pd.read_parquet(tmp_path / "sums-val.parquet")) == 5
    again = entropylens("prepare", "reasoning_gym:chain_sum", "-o", str(target), *options)
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert again.stderr.count("\n") <= 2
    bad = entropylens("prepare", "bundled", "-o", str(target), "--task-option", "terms")
    assert bad.returncode == 2
    assert "name=value" in bad.stderr


def test_a_dry_run_starts_nothing(entropylens, toy, tmp_path):
    run = tmp_path / "run"
    done = entropylens(
        *("train", "--config", "tiny-cpu", "--layer", "2", "--dry-run", "-o", str(run)),
        *settings(toy),
    )
    assert done.returncode == 0, done.stderr
    assert "layer: 2" in done.stdout
    assert "-m verl.trainer.main_ppo" in done.stdout
    assert not run.exists()


def test_auto_stops_where_the_rule_has_nothing_to_say(entropylens, toy, tmp_path):
    done = entropylens(
        *("train", "--config", "tiny-cpu", "--layer", "auto", "-o", str(tmp_path / "run")),
        *settings(toy),
    )
    assert done.returncode == 2
    assert "--layer N" in done.stderr
    found = json.loads((tmp_path / "run" / "recommendation.json").read_text())
    assert found["applies"] != "yes"


def test_probe_layers_compares_gradients_and_trains_nothing(entropylens, toy, tmp_path):
    run = tmp_path / "run"
    done = entropylens(
        *("train", "--config", "tiny-cpu", "--probe-layers", "-o", str(run)), *settings(toy)
    )
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(run / "layer_probe" / "layer_probe.csv")
    assert frame["layer"].tolist() == [1, 2, 3]
    assert frame["cosine"].between(-1, 1).all()
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--config", "qwen9"], "qwen3-4b-paper"),
        (["export", "no/such/checkpoint", "out"], "holds no veRL checkpoint"),
    ],
)
def test_mistakes_are_told_in_one_line(entropylens, arguments, says):
    done = entropylens(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_export_replaces_a_model_with_force_and_nothing_else(toy, tmp_path):
    kept = tmp_path / "metrics.jsonl"
    kept.touch()
    for force in (False, True):
        with pytest.raises(OutputDirectoryError, match=r"choose another directory$"):
            export(toy, tmp_path, force=force)
    with pytest.raises(OutputDirectoryError, match="--force"):
        export(toy, toy / "model")
    assert kept.exists()
