"""What a run is refused for before Ray starts, and what a plan says."""

import json
import math
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from bupo import launch, preflight
from bupo.settings import Settings
from profiles import three_stages
from tiny import tiny_model, tiny_tokenizer
from trained import save_toy

from entropylens.errors import EntropyLensError, OutputDirectoryError, SettingError
from entropylens.profile import Profile
from entropylens.recommend import recommend


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("tied"), tied=True)


def plan(toy, *overrides, directory="run", **options):
    base = [
        f"actor_rollout_ref.model.path={toy / 'model'}",
        f"data.train_files={toy / 'train.parquet'}",
        f"reward.custom_reward_function.path={toy / 'reward.py'}",
        "bupo.layer=2",
        "bupo.internal_steps=1",
    ]
    return launch.plan("tiny-cpu", toy / directory, [*base, *overrides], **options)


FUSED = "actor_rollout_ref.model.use_fused_kernels=True"
REFUSED = [
    (["bupo.layer=0"], "bupo.layer is 0: give a number, 1 or more"),
    (["bupo.layer=4"], "bupo.layer=4 .*internal_steps=0.*give 1 to 3"),
    (["bupo.layer=null"], "no layer is given: pass bupo.layer=N, or --layer auto"),
    (["bupo.internal_steps=-1"], "bupo.internal_steps is -1"),
    (["bupo.internal_steps=auto"], "max_internal_steps"),
    (["bupo.internal_steps=auto", "bupo.max_internal_steps=9"], "bupo.analyze_every=1"),
    ([FUSED, "bupo.log_both_policies=False"], "use_fused_kernels=True .*lm_head"),
    ([FUSED], "log_both_policies=False"),
    (["algorithm.rollout_correction.bypass_mode=True"], "bypass_mode=True.*set it to False"),
    (["algorithm.rollout_correction.rollout_is=token"], "rollout_is compares"),
    (["actor_rollout_ref.actor.strategy=fsdp"], "strategy=fsdp wants GPUs.*fsdp2"),
    (["actor_rollout_ref.actor.strategy=megatron"], "megatron is a backend"),
    (["trainer.v1.trainer_mode=separate_async"], "separate_async .*set it to bupo"),
    (["trainer.v1.trainer_mode=cpu"], "knows no bupo settings"),
    ([FUSED, "bupo.internal_steps=0"], "log_both_policies=False"),
    (["trainer.use_v1=False"], "use_v1=False"),
    (
        ["actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2"],
        "sequence parallelism is not supported: set it to 1",
    ),
    (["actor_rollout_ref.actor.ppo_mini_batch_size=3"], r"\(3\) does not divide .*1, 2, 4, 8"),
    (["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3"], r"\(3\) does not divide .*2, 4"),
    (
        ["actor_rollout_ref.rollout.n=1", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"],
        "rollout.n=1: set it to 2 or more",
    ),
    (["actor_rollout_ref.rollout.name=vllm"], "vllm needs a GPU"),
    (["actor_rollout_ref.rollout.top_p=0.9"], "top_p"),
    (["actor_rollout_ref.model.lora_rank=4"], "lora.merge=True"),
    (["data.train_files=missing.parquet"], "missing.parquet does not exist.*entropylens prepare"),
    (["reward.custom_reward_function.name=nothing"], "has no function 'nothing'"),
    (["reward.custom_reward_function.path=pkg://no.such"], "pkg://no.such cannot be loaded"),
    (["reward.custom_reward_function.path=null"], "no reward function is given"),
    (["actor_rollout_ref.actor.use_kl_loss=True"], "use_kl_loss=True .*kl_in_internal_phase"),
    (["algorithm.use_kl_in_reward=True"], "use_kl_in_reward=True .*kl_in_internal_phase"),
    (["actor_rollout_ref.model.path=no/model/here"], "no/model/here"),
    (["trainer.device=cuda", "actor_rollout_ref.rollout.name=vllm"], "this machine has 0"),
]


@pytest.mark.parametrize(("overrides", "says"), REFUSED, ids=[" ".join(it[0]) for it in REFUSED])
def test_refused_with_a_clear_message(toy, overrides, says):
    with pytest.raises(EntropyLensError, match=f"(?s){says}") as refusal:
        plan(toy, *overrides)
    assert "\n" not in refusal.value.line


def test_what_is_asked_for_is_let_through(toy, tied):
    plan(toy, "actor_rollout_ref.actor.use_kl_loss=True", "bupo.kl_in_internal_phase=True")
    plan(toy, "actor_rollout_ref.actor.use_kl_loss=True", "bupo.internal_steps=0")
    plan(tied, FUSED, "bupo.log_both_policies=False")
    plan(toy, "actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora.merge=True")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_family_that_cannot_skip_layers_is_told_so(toy, tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    path = f"actor_rollout_ref.model.path={tmp_path}"
    with pytest.raises(SettingError, match="skip_upper_layers=False"):
        plan(toy, path)
    plan(toy, path, "bupo.skip_upper_layers=False")


def test_data_without_veRLs_columns(toy, tmp_path):
    pd.DataFrame({"problem": ["1+1"]}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(EntropyLensError, match=r"lacks the columns prompt.*entropylens prepare"):
        plan(toy, f"data.train_files={tmp_path / 'bad.parquet'}")


def test_no_space_for_a_checkpoint(toy, monkeypatch):
    monkeypatch.setattr(launch, "free_disk", lambda _path: 0.0)
    with pytest.raises(OutputDirectoryError, match=r"room for 0\.0"):
        plan(toy, "trainer.save_freq=1")
    plan(toy, "trainer.save_freq=-1")
    plan(toy, "trainer.save_freq=1", check_machine=False)


def test_a_plan_shows_configuration_estimate_and_a_line_that_works_alone(toy):
    made = plan(toy, "trainer.total_training_steps=7")
    assert "total_training_steps: 7" in made.text
    assert "GiB" in made.text
    assert made.text.endswith(made.line)
    # veRL composes the same from the line; --cfg job prints it without starting anything.
    words = shlex.split(made.line)
    while "=" in words[0] and not words[0].startswith("/"):
        words.pop(0)
    shown = subprocess.run(
        [*words, "--cfg", "job"], capture_output=True, text=True, check=False
    ).stdout
    assert "total_training_steps: 7" in shown
    assert "trainer_mode: bupo" in shown


LISTENING = """
import psutil, ray
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    for socket in process.net_connections("inet"):
        if socket.status == psutil.CONN_LISTEN:
            print(socket.laddr.ip)
"""


def test_ray_listens_on_this_machine_alone(toy):
    alone, joining = plan(toy), plan(toy, "+ray_kwargs.ray_init.address=auto")
    shown = subprocess.run(
        [sys.executable, "-c", LISTENING],
        env=os.environ | dict(alone.environment),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert shown
    assert {it.removeprefix("::ffff:") for it in shown} == {"127.0.0.1"}
    assert joining.environment.keys() < alone.environment.keys()


def test_another_run_is_not_overwritten(toy, tmp_path, monkeypatch):
    started = []

    class Process:
        def __init__(self, command, **_):
            started.append(command)

        def wait(self):
            return 0

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    first = plan(toy, directory="own")
    assert launch.start(first) == 0
    assert launch.start(first) == 0  # the same again: resumed
    assert launch.start(plan(toy, "trainer.total_training_steps=99", directory="own")) == 0
    other = plan(toy, "bupo.layer=1", directory="own")
    with pytest.raises(OutputDirectoryError, match="--force"):
        launch.start(other)
    kept = toy / "own" / "checkpoints"
    kept.mkdir()
    assert launch.start(other, force=True) == 0
    assert not kept.exists()
    assert len(started) == 4


@pytest.mark.parametrize("nll", [2.0, 80.0])
def test_a_recommended_layer_is_written_down_and_starts(toy, tmp_path, nll, monkeypatch):
    profile = Profile(means=three_stages(np.random.default_rng(0)))
    analysis = SimpleNamespace(
        recommendation=recommend(profile),
        layers=pd.DataFrame({"layer": range(1, 37), "nll_layer": nll}),
        vocab_size=97,
    )
    monkeypatch.setattr(preflight.Analysis, "load", lambda _path: analysis)
    made = plan(toy, directory=tmp_path / "run")
    layer, warnings = preflight.recommended_layer(made.config, made.directory, tmp_path)
    assert layer == 6
    assert len(warnings) == (nll > math.log(97))
    assert all(f"{nll:.1f} nats of surprise" in it for it in warnings)
    told = json.loads((tmp_path / "run" / "recommendation.json").read_text())
    assert (told["layer"], told["applies"]) == (6, "yes")
    ended = SimpleNamespace(wait=lambda: 0)
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, **__: ended)
    assert launch.start(made) == 0


def test_auto_internal_steps_take_the_presets_number_as_their_maximum():
    config, _ = launch.compose("qwen3-4b-paper", [])
    assert launch.internal_steps_overrides(config, None) == []
    assert launch.internal_steps_overrides(config, "12") == ["bupo.internal_steps=12"]
    assert launch.internal_steps_overrides(config, "auto") == [
        "bupo.internal_steps=auto",
        "bupo.max_internal_steps=30",
        "bupo.analyze_every=1",
    ]


def test_presets_start_from_the_defaults_of_the_settings():
    config, _ = launch.compose("tiny-cpu", [])
    assert Settings.of(config) == Settings()
