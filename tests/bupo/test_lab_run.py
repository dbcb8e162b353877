import json
from dataclasses import replace

import pytest
import torch
from bupo.lab.arms import Arm, arms
from bupo.lab.learner import Rates
from bupo.lab.run import HELD_OUT, Course, evaluate, train
from bupo.lab.subject import Lesson, make_model
from bupo.lab.task import make_tokenizer

from entropylens.errors import SettingError
from entropylens.training_run import TrainingRun

RATES = Rates(lr=1e-3)
COURSE = Course(
    steps=3, prompts=4, samples=4, rates=RATES, look_every=2, fixed=4, held_out=4
)  # fmt: skip
LAYER = 1
INNER = Arm("BuPO", layer=LAYER, internal_steps=3, internal=True)


def subject():
    """Untaught, three layers: its answers are noise, so its rewards are made up in the tests."""
    return make_model(Lesson(seed=0, layers=3, width=32))


@pytest.fixture(autouse=True)
def _some_answers_earn(monkeypatch):
    """Half the answers, told by their text alone."""

    def score(_source, text, _gold, mode):
        assert mode == "strict"
        return {"score": float(sum(map(ord, text)) % 2)}

    monkeypatch.setattr("bupo.lab.answering.compute_score", score)


def trained(tmp_path, arm, course=COURSE, seed=0):
    """The weights, and the records of all steps but step 0, without their seconds."""
    model, directory = subject(), tmp_path / f"{arm.slug}-{seed}"
    train(
        model, make_tokenizer(), arm, course, seed, directory, watched=LAYER, progress=False
    )  # fmt: skip
    lines = (directory / "metrics.jsonl").read_text().splitlines()[1:]
    records = [json.loads(line) for line in lines]
    for record in records:
        assert record.pop("timing_s/update_actor") > 0
    return model.state_dict(), records


def changed(weights):
    before = subject().state_dict()
    return {name for name in before if not torch.equal(before[name], weights[name])}


def inner_names(*, unembedding=True):
    """Those of layers 1..l, and E_u, which is tied."""
    return {
        name
        for name in subject().state_dict()
        if "layers.0." in name or (unembedding and ("embed_tokens" in name or "lm_head" in name))
    }


def test_grpo_trains_everything_and_tells_each_step(tmp_path):
    weights, records = trained(tmp_path, Arm("GRPO"))
    assert changed(weights) == set(weights)
    assert [it["step"] for it in records] == [1, 2, 3]
    for record in records:
        assert 0 < record["bupo/reward"] < 1
        assert record["bupo/internal_phase"] == 0
        assert 0 < record["bupo/entropy_policy"] <= 3.4658  # ln 32
        assert record["actor/grad_norm"] > 0


@pytest.mark.parametrize(
    ("arm", "unembedding"),
    [
        (INNER, True),
        (replace(INNER, internal=False, only_lower=True), True),
        (replace(INNER, freeze_unembedding=True), False),
    ],
)
def test_the_first_steps_leave_alone_what_they_should(tmp_path, arm, unembedding):
    weights, records = trained(tmp_path, arm)
    assert changed(weights) == inner_names(unembedding=unembedding)
    assert {it["bupo/internal_phase"] for it in records} == {float(arm.internal)}


def test_after_the_internal_steps_all_is_trained(tmp_path):
    weights, records = trained(tmp_path, replace(INNER, internal_steps=2))
    assert changed(weights) == set(weights)
    assert [it["bupo/internal_phase"] for it in records] == [1, 1, 0]


def test_a_run_can_be_repeated_and_another_seed_differs(tmp_path):
    weights, records = trained(tmp_path, INNER)
    again, same = trained(tmp_path / "again", INNER)
    assert records == same
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert trained(tmp_path, INNER, seed=1)[1] != records


@pytest.mark.parametrize(
    "difference", [{"shuffled": True}, {"entropy_coeff": 0.1}, {"reset_optimizer": True}]
)
def test_every_control_differs_from_what_it_controls(tmp_path, difference):
    plain = replace(INNER, internal_steps=1)
    weights, _ = trained(tmp_path, plain)
    other, records = trained(tmp_path, replace(plain, name="other", **difference))
    assert not all(torch.equal(weights[name], other[name]) for name in weights)
    assert len(records) == 3


def test_resetting_the_optimizer_changes_nothing_before_the_switch(tmp_path):
    weights, _ = trained(tmp_path, INNER)
    other, _ = trained(tmp_path / "reset", replace(INNER, reset_optimizer=True))
    assert all(torch.equal(weights[name], other[name]) for name in weights)


def test_fewer_steps_are_the_first_ones(tmp_path):
    _, whole = trained(tmp_path, Arm("GRPO"))
    _, fewer = trained(tmp_path, Arm("fewer", skipped=1))
    assert fewer == whole[:2]


def test_the_arms_have_names_of_their_own_and_begin_with_the_primary_contrast():
    found = arms(layer=4, num_layers=6, internal_steps=10, steps=100)
    assert [it.name for it in found[:2]] == ["GRPO", "BuPO"]
    assert len({it.slug for it in found}) == len(found)
    of_layers = {it.layer for it in found if it.name.startswith("BuPO, layer")}
    assert of_layers == {1, 2, 3, 5}
    assert len({it.name for it in found}) == len(found)
    assert len(set(found)) == len(found)
    assert [it.name for it in found if it.skipped == 100] == ["no training"]
    assert next(it for it in found if it.name == "InterGRPO throughout").internal_steps == 100
    with pytest.raises(SettingError, match="needs a layer"):
        Arm("BuPO", internal=True)


def test_fewer_steps_end_with_a_look_of_their_own(tmp_path):
    _, whole = trained(tmp_path, Arm("GRPO"))
    assert [HELD_OUT in it for it in whole] == [False, True, True]


def test_ppo_learns_values_and_trains_everything(tmp_path):
    weights, records = trained(tmp_path, Arm("PPO", estimator="gae"))
    assert changed(weights) == set(weights)
    grpo, _ = trained(tmp_path, Arm("GRPO"))
    assert not all(torch.equal(weights[name], grpo[name]) for name in weights)
    again, same = trained(tmp_path / "again", Arm("PPO", estimator="gae"))
    assert records == same
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_auto_ends_the_internal_phase(tmp_path):
    course = replace(COURSE, steps=8, look_every=1, kl_bound=1e-9)
    _, records = trained(tmp_path, replace(INNER, internal_steps="auto"), course)
    assert [it["bupo/internal_phase"] for it in records] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert (tmp_path / "bupo-0" / "phase.json").is_file()


def test_a_run_can_be_drawn_as_any_other(tmp_path):
    trained(tmp_path, replace(INNER, internal_steps=2))
    run = TrainingRun.load(tmp_path / "bupo-0")
    assert (run.layer, run.internal_steps, len(run.metrics)) == (LAYER, 2, 3)
    trained(tmp_path, Arm("GRPO"))
    assert TrainingRun.load(tmp_path / "grpo-0").layer is None
    assert run.looks["step"].tolist() == [0, 2, 3]
    assert run.looks["kl"].iloc[0] == 0 < run.looks["kl"].iloc[1]


def test_an_examination_asks_and_draws_the_same_again():
    model, tokenizer = subject(), make_tokenizer()
    first = evaluate(model, tokenizer, "test", 6, 4, 1)
    assert len(first) == 6
    assert all(0 <= right <= 4 for right in first)
    assert evaluate(model, tokenizer, "test", 6, 4, 1) == first
    assert evaluate(model, tokenizer, "test", 6, 4, 2) != first
