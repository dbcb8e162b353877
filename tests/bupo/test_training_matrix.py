"""The combinations that `make test` leaves out, each a run through Ray: `make test-train`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from trained import exported, metrics, save_toy, train

pytestmark = pytest.mark.train

LAYER = 2
BUPO = (f"bupo.layer={LAYER}", "bupo.internal_steps=1", "trainer.total_training_steps=2")
MODEL = "actor_rollout_ref.model"
TWO_RANKS = "trainer.n_gpus_per_node=2"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def toy(request, tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy"), tied=request.param)


def is_inner(name):
    return not (name.startswith("model.norm") or ".layers.2." in name or ".layers.3." in name)


def steps(toy, directory, target):
    start = load_file(toy / "model" / "model.safetensors")
    return [start, *(exported(directory, step, target) for step in (1, 2))]


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("ranks", [(), (TWO_RANKS,)], ids=["1-rank", "2-ranks"])
@pytest.mark.parametrize(
    "how",
    [
        (f"{MODEL}.enable_gradient_checkpointing=True",),
        (f"{MODEL}.use_remove_padding=True",),
        ("bupo.skip_upper_layers=False", "bupo.log_both_policies=False"),
        ("actor_rollout_ref.actor.use_dynamic_bsz=True",),
    ],
    ids=["checkpointing", "packed", "all-layers", "dynamic-batch"],
)
def test_exactly_the_inner_parameters_change_before_the_switch(toy, tmp_path, how, ranks):
    directory = train(toy, tmp_path / "run", *BUPO, *how, *ranks)
    before, internal, after = steps(toy, directory, tmp_path)
    assert changed(before, internal) == set(filter(is_inner, before))
    assert changed(internal, after) == set(before)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "reinforce_plus_plus"])
def test_other_advantages(toy, tmp_path, estimator):
    directory = train(toy, tmp_path / "run", *BUPO, f"algorithm.adv_estimator={estimator}")
    found = metrics(directory)
    assert [it["bupo/internal_phase"] for it in found] == [1, 0]
    assert ("critic/vf_loss" in found[0]) == (estimator == "gae")


def test_two_ranks_make_the_steps_of_one(toy, tmp_path):
    settings = (*BUPO, "actor_rollout_ref.actor.ppo_mini_batch_size=8")
    one = train(toy, tmp_path / "one", *settings)
    two = train(toy, tmp_path / "two", *settings, TWO_RANKS)
    for name, value in exported(one, 2, tmp_path).items():
        torch.testing.assert_close(exported(two, 2, tmp_path)[name], value, atol=1e-4, rtol=0)


def test_a_reference_is_the_full_policy(toy, tmp_path):
    # Before the first update reference and actor are equal: the KL of pi_theta is 0, that of pi_l
    # is not. One mini-batch a step, or later ones would be compared after it.
    kl = (
        *("actor_rollout_ref.actor.use_kl_loss=True", "bupo.kl_in_internal_phase=True"),
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    )
    plain = train(toy, tmp_path / "plain", *BUPO, *kl, "bupo.internal_steps=0")
    assert abs(metrics(plain)[0]["actor/kl_loss"]) < 1e-4
    internal = train(toy, tmp_path / "internal", *BUPO, *kl)
    assert metrics(internal)[0]["actor/kl_loss"] > 1e-3


def test_adapters(toy, tmp_path):
    lora = (f"{MODEL}.lora_rank=4", f"{MODEL}.lora.merge=True")
    directory = train(toy, tmp_path / "run", *BUPO, *lora)
    assert [it["bupo/internal_phase"] for it in metrics(directory)] == [1, 0]


def test_auto_ends_the_internal_phase(toy, tmp_path):
    settings = (
        f"bupo.layer={LAYER}",
        *("bupo.internal_steps=auto", "bupo.max_internal_steps=8", "bupo.kl_bound=1e-6"),
        *("bupo.analyze_every=1", "bupo.analyze_responses=8", "trainer.total_training_steps=7"),
        "trainer.save_freq=-1",
    )
    found = metrics(train(toy, tmp_path / "run", *settings))[1:]
    assert [it["bupo/internal_phase"] for it in found] == [1, 1, 1, 1, 1, 0, 0]
    assert found[4]["bupo/internal_phase_ends"] == 1


def test_without_internal_steps_it_is_verls_own_grpo(toy, tmp_path):
    # One mini-batch a step: veRL's order of answers is that of their arrival.
    settings = ("actor_rollout_ref.actor.ppo_mini_batch_size=8", "trainer.total_training_steps=2")
    ours = train(toy, tmp_path / "ours", *settings, f"bupo.layer={LAYER}")
    plain = train(
        toy,
        tmp_path / "plain",
        *settings,
        "trainer.v1.trainer_mode=cpu",
        "ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=bupo.cpu",
    )
    for step in (1, 2):
        found, expected = (exported(it, step, tmp_path) for it in (ours, plain))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)
    kept = [(tmp_path / it / "rollouts" / "2.jsonl").read_text() for it in ("ours", "plain")]
    answers = [sorted(json.loads(line)["output"] for line in it.splitlines()) for it in kept]
    assert answers[0] == answers[1]
