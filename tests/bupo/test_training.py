"""BuPO through veRL's own trainer, Ray and FSDP2: few runs, much looked at."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from trained import exported, interrupt, metrics, save_toy, start, steps_of, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropylens import Analysis
from entropylens.look import trajectory

LAYER = 2
BUPO = (f"bupo.layer={LAYER}", "bupo.internal_steps=2")
LOOKS = ("bupo.analyze_every=2", "bupo.analyze_responses=8")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """Two internal steps and two of the whole policy, uninterrupted."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return train(toy, directory, *BUPO, *LOOKS, "trainer.total_training_steps=4")


@pytest.fixture(scope="module")
def weights(run, toy, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported")
    start = load_file(toy / "model" / "model.safetensors")
    return [start, *(exported(run, step, target) for step in (1, 2, 3, 4))]


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_inner(name):
    return not (name.startswith("model.norm") or ".layers.2." in name or ".layers.3." in name)


def test_internal_steps_change_embeddings_lm_head_and_layers_up_to_l(weights):
    names = set(weights[0])
    inner = {name for name in names if is_inner(name)}
    assert {"lm_head.weight", "model.embed_tokens.weight"} < inner < names
    assert changed(weights[0], weights[1]) == inner
    assert changed(weights[1], weights[2]) == inner
    assert changed(weights[2], weights[3]) == names
    assert changed(weights[3], weights[4]) == names


def test_metrics_tell_phase_policies_and_time(run):
    first, *found = metrics(run)
    assert (first["step"], first["fixed_set/kl"]) == (0, 0)
    assert [it["step"] for it in found] == [1, 2, 3, 4]
    assert ["fixed_set/kl" in it for it in found] == [False, True, False, True]
    assert [it["bupo/internal_phase"] for it in found] == [1, 1, 0, 0]
    assert [it["bupo/layer"] for it in found] == [LAYER, LAYER, 0, 0]
    for step in found:
        for name in (
            *("bupo/reward", "bupo/accuracy", "response_length/mean", "actor/entropy"),
            *("bupo/nll_layer", "bupo/nll_policy", "bupo/entropy_layer", "bupo/entropy_policy"),
            *("actor/pg_clipfrac", "actor/grad_norm", "timing_s/step", "share/update_actor"),
            "perf/throughput",
        ):
            assert isinstance(step[name], float), name
        assert 0 <= step["bupo/watched_positions"] <= 2048
        internal = step["bupo/internal_phase"] == 1
        # veRL's comparison of actor and rollout holds for pi_theta alone.
        assert ("training/rollout_probs_diff_max" in step) == (not internal)
        trained = "layer" if internal else "policy"
        assert step["actor/entropy"] == pytest.approx(step[f"bupo/entropy_{trained}"], rel=0.05)
    assert found[2]["training/rollout_probs_diff_max"] < 1e-5


def test_tensorboard_and_rollouts_are_kept(run):
    assert list((run / "tensorboard").glob("events.*"))
    rows = [json.loads(line) for line in (run / "rollouts" / "3.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    for row in rows:
        digits = sum(it.isdigit() for it in row["output"]) / max(1, len(row["output"]))
        assert row["score"] == pytest.approx(digits)
        assert "=" in row["input"]


def test_the_fixed_set_is_looked_at_from_step_0(run, weights, toy):
    frame = trajectory(run / "fixed_set")
    assert frame["step"].tolist() == [0, 2, 4]
    assert frame["kl"].iloc[0] == 0
    assert (frame["kl"].iloc[1:] > 0).all()
    # An independent reading of the last look: the exported weights over the same responses.
    model = AutoModelForCausalLM.from_pretrained(toy / "model").double()
    model.load_state_dict({name: it.double() for name, it in weights[4].items()})
    lines = (run / "fixed_set" / "responses.jsonl").read_text().splitlines()
    surprise, count = 0.0, 0
    for response in map(json.loads, lines):
        prompt, answer = response["prompt_ids"], response["response_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1)[range(len(answer)), answer]
        surprise, count = surprise - float(log_probs.sum()), count + len(answer)
    expected = torch.tensor(surprise / count).exp()
    assert frame["perplexity"].iloc[-1] == pytest.approx(float(expected), rel=1e-4)
    similarity = pd.read_csv(run / "fixed_set" / "step_4" / "similarity.csv")
    assert similarity["other"].tolist() == [3, 4]
    assert Analysis.load(run / "fixed_set" / "step_2").num_responses == 8


def test_an_exported_checkpoint_generates(run, tmp_path):
    exported(run, 4, tmp_path)
    path = tmp_path / f"{run.name}-4"
    model, tokenizer = (it.from_pretrained(path) for it in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("1+2=", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_ctrl_c_saves_and_a_new_start_goes_on_to_the_same_weights(run, toy, weights, tmp_path):
    directory = tmp_path / "resumed"
    settings = (*BUPO, *LOOKS, "trainer.total_training_steps=4")
    process = start(toy, directory, *settings, "trainer.save_freq=10")
    assert interrupt(process, directory) == 0
    assert steps_of(directory) == [1]
    train(toy, directory, *settings, "trainer.save_freq=10")
    first, *found = metrics(directory)
    assert [first["step"], *(it["step"] for it in found)] == [0, 1, 2, 3, 4]
    assert [it["bupo/internal_phase"] for it in found] == [1, 1, 0, 0]
    resumed = exported(directory, 4, tmp_path)
    for name, value in weights[4].items():
        torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=0)
    assert (trajectory(directory / "fixed_set")["step"] == [0, 2, 4]).all()
