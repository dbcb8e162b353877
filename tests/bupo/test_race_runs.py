"""A layer race through runs, which are faked up to the test at the end."""

import json
import math
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from bupo import launch, race_runs
from bupo.race import Race
from bupo.race_runs import plan_race
from omegaconf import OmegaConf
from trained import metrics, save_toy, steps_of, train

from entropylens.errors import (
    AnalysisFilesError,
    DatasetError,
    OutputDirectoryError,
    SettingError,
    TrainingFilesError,
)
from entropylens.look import Look


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy, some of its problems being held out."""
    path = save_toy(tmp_path_factory.mktemp("toy"))
    rows = pd.read_parquet(path / "train.parquet")
    rows[:16].to_parquet(path / "val.parquet")
    rows[16:].to_parquet(path / "train.parquet")
    return path


def overrides(toy, *more):
    return [
        f"actor_rollout_ref.model.path={toy / 'model'}",
        f"data.train_files={toy / 'train.parquet'}",
        f"data.val_files={toy / 'val.parquet'}",
        f"reward.custom_reward_function.path={toy / 'reward.py'}",
        "bupo.internal_steps=4",
        *more,
    ]


@pytest.fixture
def a_race(toy, tmp_path):
    def made(*more, layers="race:1,2,3"):
        return plan_race("tiny-cpu", tmp_path / "run", overrides(toy, *more), layers)

    return made


PROBLEMS = ("1+1=", "2+2=", "3+4=")
#: Mean rewards and KL of a layer after 2 and 4 steps: 3 leads, then 2.
COURSES = {
    1: {2: ((0.0, 0.0, 0.0), 0.01), 4: ((0.0, 0.0, 0.0), 0.02)},
    2: {2: ((0.5, 0.0, 0.0), 0.01), 4: ((1.0, 0.5, 1.0), 0.02)},
    3: {2: ((0.5, 0.5, 0.0), 0.01), 4: ((0.5, 0.5, 0.5), 0.02)},
}


class VeRL:
    """In the place of `launch.start`: writes what a run does, from its last checkpoint on.

    `broken` names (layer, step) and how the run ends there: an exit code, "stopped" before the
    step, or "killed" between its checkpoint and its look.
    """

    def __init__(self, courses=COURSES):
        self.courses, self.broken = courses, {}
        self.started, self.made = [], []

    def __call__(self, planned, *, force=False):
        launch.claim(planned, force=force)
        config, place = planned.config, planned.directory
        layer, last = config.bupo.layer, config.trainer.total_training_steps
        self.started.append((layer, last))
        tracker = place / "checkpoints" / "latest_checkpointed_iteration.txt"
        done = int(tracker.read_text()) if tracker.is_file() else 0
        for look in (place / "fixed_set").glob("step_*"):  # of steps that are made anew
            if int(look.name.removeprefix("step_")) > done:
                shutil.rmtree(look)
        for step in range(done + 1, last + 1):
            how = self.broken.pop((layer, step), None)
            if how is not None and how != "killed":
                return 0 if how == "stopped" else how
            self.made.append((layer, step))
            if step % config.trainer.save_freq == 0:
                (tracker.parent / f"global_step_{step}" / "actor").mkdir(parents=True)
                tracker.write_text(str(step))
            if how == "killed":
                return 137
            if step % config.bupo.analyze_every == 0:
                self.look(place / "fixed_set" / f"step_{step}", layer, step)
            if step % config.trainer.test_freq == 0:
                self.answers(config.trainer.validation_data_dir, layer, step)
        return 0

    def look(self, place, layer, step):
        kl = self.courses[layer][step][1]
        if not math.isnan(kl):
            place.mkdir(parents=True)
            told = (step, layer, "raw", 9, 2.0, kl, (math.nan, math.nan), 1.0, 0.1, 3.0, {4: 0.5})
            Look(*told).save(place)

    def answers(self, place, layer, step):
        """Two a problem, in an order that differs from run to run."""
        rows = [
            {
                "input": problem,
                "output": "a\u2028b",
                "gts": "7",
                "score": score + more,
                "step": step,
            }
            for problem, score in zip(PROBLEMS, self.courses[layer][step][0], strict=True)
            for more in (-0.25, 0.25)
        ]
        rows = rows[layer:] + rows[:layer]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        file = launch.Path(place) / f"{step}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def planned(toy, tmp_path_factory):
    """A real plan."""
    place = tmp_path_factory.mktemp("planned")
    return launch.plan("tiny-cpu", place, overrides(toy, "bupo.layer=1"))


@pytest.fixture
def verl(monkeypatch, planned):
    """No run is started; a plan is made of the real one, in no time."""

    def composed(_config, given):
        config = planned.config.copy()
        config.merge_with(OmegaConf.from_dotlist(list(given)))
        return config

    def plan(config, directory, given, *, check_machine=True):
        given = [*launch.places(directory), *given]
        directory = directory.absolute()
        return replace(planned, config=composed(config, given), directory=directory)

    fake = VeRL()
    monkeypatch.setattr(launch, "start", fake)
    monkeypatch.setattr(launch, "plan", plan)
    monkeypatch.setattr(launch, "with_model", composed)
    return fake


def places(run):
    return sorted(it.name for it in (run / "race").glob("layer*/checkpoints/global_step_*"))


def test_each_round_goes_on_from_the_last(a_race, verl):
    racing = a_race()
    found = racing.run()
    assert found.layer == 2
    assert verl.started == [(1, 2), (2, 2), (3, 2), (2, 4), (3, 4)]
    assert verl.made == [
        *((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)),
        *((2, 3), (2, 4), (3, 3), (3, 4)),
    ]
    frame = found.to_frame()
    assert frame["layer"].tolist() == [1, 2, 3, 2, 3]
    assert frame["reward"].tolist() == pytest.approx([0, 1 / 6, 1 / 3, 2.5 / 3, 0.5])
    assert frame["kl"].tolist() == [0.01, 0.01, 0.01, 0.02, 0.02]
    assert found.rounds[1][0].rewards == (1.0, 0.5, 1.0)  # ordered by problem
    saved = Race.load(racing.place)
    assert saved == found
    assert pd.read_csv(racing.place / "race.csv")["goes_on"].tolist() == [0, 1, 1, 1, 0]
    assert places(racing.directory) == []  # who is out or through keeps no checkpoint


def test_a_trial_is_internal_throughout_and_keeps_to_its_directory(a_race, tmp_path):
    elsewhere = f"trainer.default_local_dir={tmp_path / 'elsewhere'}"
    racing = a_race(elsewhere, "trainer.save_freq=-1", "bupo.kl_bound=0.5", "bupo.layer=1")
    config = racing.candidate(3).plan(2).config
    place = tmp_path / "run" / "race" / "layer3"
    assert config.bupo.layer == 3
    assert config.bupo.internal_steps == 4
    assert config.bupo.analyze_every == config.trainer.test_freq == config.trainer.save_freq == 2
    assert config.trainer.total_training_steps == 2
    assert config.trainer.default_local_dir == str(place / "checkpoints")
    assert config.trainer.validation_data_dir == str(place / "validation")
    assert config.trainer.max_actor_ckpt_to_keep == 1
    assert racing.kl_bound == 0.5


def test_the_same_call_reads_what_is_finished(a_race, verl):
    first = a_race().run()
    verl.started.clear()
    assert a_race().run() == first
    assert verl.started == []
    assert a_race().run(force=True) == first
    assert len(verl.started) == 5


@pytest.mark.parametrize(
    ("where", "how"),
    [
        *(((1, 1), 1), ((2, 2), "stopped"), ((2, 2), "killed"), ((3, 1), "killed")),
        *(((3, 3), 1), ((2, 4), "stopped"), ((2, 4), "killed"), ((3, 3), "killed")),
    ],
)
def test_an_interrupted_race_goes_on(a_race, verl, where, how):
    verl.broken[where] = how
    layer, step = where
    with pytest.raises(TrainingFilesError, match=f"layer{layer}.*the same command") as refusal:
        a_race().run()
    said = {1: "exit code 1", "stopped": "before step", "killed": "exit code 137"}[how]
    assert said in refusal.value.line
    before = list(verl.made)
    found = a_race().run()
    assert found.layer == 2
    # Nothing is made twice but the round that broke off, and of that what was not saved whole.
    end = 2 if step <= 2 else 4
    again = [it for it in verl.made[len(before) :] if it in before]
    assert all(it[0] == layer and end - 2 < it[1] <= end for it in again)
    assert not places(a_race().directory)


def test_a_layer_that_cannot_be_looked_at_has_moved_too_far(a_race, verl):
    collapsed = {2: ((1.0, 1.0, 1.0), math.nan), 4: ((1.0, 1.0, 1.0), math.nan)}
    verl.courses = COURSES | {3: collapsed}
    assert a_race(layers="race:2,3").run().layer == 2
    verl.courses = {layer: collapsed | {2: collapsed[2]} for layer in COURSES}
    again = a_race(layers="race:2,3").run(force=True)
    assert again.layer is None
    verl.started.clear()
    assert repr(a_race(layers="race:2,3").run()) == repr(again)
    assert verl.started == []  # a collapse is not tried again
    with pytest.raises(SettingError, match="pass --layer N"):
        _ = again.winner


def test_another_bound_is_tried_on_the_same_trials(a_race, verl):
    assert a_race(layers="race:1,2").run().layer == 2
    verl.started.clear()
    assert a_race("bupo.kl_bound=0.015", layers="race:1,2").run().layer is None
    assert verl.started == []


def test_other_settings_are_no_resumption(a_race, verl):
    a_race().run()
    other = a_race("actor_rollout_ref.actor.optim.lr=1e-5")
    with pytest.raises(OutputDirectoryError, match=r"layer1.*other settings.*--force"):
        other.run()
    assert other.run(force=True).layer == 2


def test_the_directory_must_be_free_for_the_winners_run(toy, a_race, verl, tmp_path):
    there = overrides(toy, "bupo.layer=3")
    launch.claim(launch.plan("tiny-cpu", tmp_path / "run", there))
    assert a_race().run().layer == 2  # an earlier race's winner might go on
    with pytest.raises(OutputDirectoryError, match="other settings"):
        a_race(layers="race:1,2").run()
    shutil.rmtree(tmp_path / "run")
    racing = a_race()
    racing.run()
    launch.claim(launch.plan("tiny-cpu", tmp_path / "run", overrides(toy, "bupo.layer=2")))


def test_no_room_for_a_checkpoint_of_each(a_race, verl, monkeypatch):
    one = a_race().candidate(1).plan(2).estimate.checkpoint
    monkeypatch.setattr(race_runs, "free_disk", lambda _path: 2.5 * one)
    with pytest.raises(OutputDirectoryError, match="for each of 3 layers"):
        a_race().run()
    assert verl.started == []
    assert a_race(layers="race:1,2").run().layer == 2


def test_other_held_out_problems_are_no_comparison(a_race, verl, monkeypatch):
    verl.broken[2, 1] = "stopped"
    with pytest.raises(TrainingFilesError):
        a_race().run()
    monkeypatch.setattr(f"{__name__}.PROBLEMS", ("1+1=", "2+2=", "3+5="))
    with pytest.raises(TrainingFilesError, match="different held-out problems"):
        a_race().run()


@pytest.mark.parametrize("damage", ["", "{", '{"input": "1+1="}\n'])
def test_damaged_answers_are_made_again(a_race, verl, damage):
    whole = verl.answers

    def damaged(place, layer, step):
        whole(place, layer, step)
        (launch.Path(place) / f"{step}.jsonl").write_text(damage)

    verl.answers = damaged
    with pytest.raises(TrainingFilesError, match=r"validation/2\.jsonl.*makes it again"):
        a_race().run()
    verl.answers = whole
    assert a_race().run().layer == 2


def test_a_damaged_trial_is_named(a_race, verl):
    a_race().run()
    (a_race().place / "layer1" / "trial_2.json").write_text("{}")
    with pytest.raises(AnalysisFilesError, match=r"trial_2\.json.*remove it"):
        a_race().run()


REFUSED = [
    ("race:1,2", ["data.val_files=${data.train_files}"], SettingError, "held-out problems"),
    ("race:1,4", [], SettingError, "from 1 to 3"),
    ("race:2", [], SettingError, "different inner layers"),
    ("race:1,2,3", ["bupo.internal_steps=1"], SettingError, "--internal-steps 2 or more"),
    ("race:1,2", ["bupo.internal_steps=auto"], SettingError, "--internal-steps as a number"),
    ("race:1,2", ["bupo.kl_bound=0"], SettingError, "nats a token, more than 0"),
    ("race:1,2", ["actor_rollout_ref.actor.strategy=fsdp"], SettingError, "fsdp2"),
    ("race:1,2", ["data.val_files=no.parquet"], DatasetError, "no.parquet does not exist"),
]


@pytest.mark.parametrize(("layers", "more", "error", "says"), REFUSED)
def test_refused_before_anything_starts(a_race, layers, more, error, says):
    with pytest.raises(error, match=says) as refusal:
        a_race(*more, layers=layers)
    assert "\n" not in refusal.value.line


def test_a_dry_run_shows_the_rounds_and_a_trial(toy, entropylens, tmp_path):
    run = tmp_path / "run"
    command = ("train", "--config", "tiny-cpu", "-o", run, "--layer", "race:3,1,2")
    done = entropylens(*command, "--internal-steps", "5", "--dry-run", *overrides(toy))
    assert done.returncode == 0, done.stderr
    assert "round 1: 3 layers to internal step 2\n  round 2: 2 layers to internal step 4" in (
        done.stdout
    )
    assert "total_training_steps: 2" in done.stdout
    assert f"bupo.run_dir={run}/race/layer1" in done.stdout
    assert not run.exists()
    refused = entropylens(*command, "--probe-layers", *overrides(toy))
    assert refused.returncode == 2
    assert "give one of them" in refused.stderr


def test_the_command_goes_on_with_the_winner(toy, verl, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from entropylens import cli_training
    from entropylens.cli import app

    monkeypatch.setattr(cli_training, "prepare_process", lambda: None)
    run = tmp_path / "run"
    command = ["train", "--config", "tiny-cpu", "-o", str(run), "--layer", "race:1,2,3"]
    winners = []

    def start(planned, *, force=False):
        if planned.directory == run:
            launch.claim(planned, force=force)
            winners.append(planned.config.bupo)
            return 0
        return verl(planned, force=force)

    monkeypatch.setattr(launch, "start", start)
    done = CliRunner().invoke(app, [*command, *overrides(toy)])
    assert done.exit_code == 0, done.output
    assert [(it.layer, it.internal_steps) for it in winners] == [(2, 4)]
    assert "0.8333" in done.output
    assert "Layer 2 is left of [1, 2, 3]" in done.output
    near = overrides(toy, "bupo.kl_bound=1e-3")
    none = CliRunner().invoke(app, [*command, "--force", *near])
    assert none.exit_code == 2
    assert "No layer" in none.output
    assert len(winners) == 1


@pytest.mark.train
def test_two_layers_race_through_ray(toy, tmp_path):
    settings = (
        *("--layer", "race:1,2", "--internal-steps", "2", "bupo.analyze_responses=8"),
        *(f"data.val_files={toy / 'val.parquet'}", "trainer.total_training_steps=3"),
        *("bupo.kl_bound=1000", "trainer.save_freq=1"),
    )
    run = train(toy, tmp_path / "run", *settings)
    found = Race.load(run / "race")
    assert [it.layer for it in found.rounds[0]] == [1, 2]
    for trial in found.rounds[0]:
        place = run / "race" / f"layer{trial.layer}"
        lines = (place / "validation" / "2.jsonl").read_text().splitlines()
        assert len(lines) == 16
        assert len(trial.rewards) == len({json.loads(line)["input"] for line in lines})
        assert trial.kl > 0
        steps = metrics(place)
        assert [it["bupo/layer"] for it in steps[1:]] == [trial.layer] * 2
        scores = [json.loads(line)["score"] for line in lines]
        name = "val-aux/sums/reward/mean@1"
        assert sum(scores) / 16 == pytest.approx(steps[-1][name])
        assert steps_of(place) == []
    trained = metrics(run)
    assert [it["bupo/layer"] for it in trained] == [found.layer, found.layer, 0]
    assert found.reason in (tmp_path / "run.log").read_text()
