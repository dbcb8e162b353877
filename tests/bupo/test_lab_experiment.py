"""The whole laboratory, smaller than anyone would want it: a taught model, every arm, the page."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import bupo
import pytest
from bupo.lab.experiment import GRID_SEED, Laboratory
from bupo.lab.jobs import side_by_side
from bupo.lab.learner import Rates
from bupo.lab.markdown import filled, points, signed, table
from bupo.lab.plan import FULL, QUICK, Plan
from bupo.lab.run import Course
from bupo.lab.starts import recommended
from bupo.lab.subject import Lesson
from bupo.lab.writeup import write_up

from entropylens.collection import load_collection
from entropylens.errors import AllocationError, OutputDirectoryError, SettingError

LESSON = Lesson(
    seed=1, layers=3, width=64, enough=0.1, bounds=(0.05, 0.9), batch=64, lr=5e-3, look_every=20,
    look_at=64,
)  # fmt: skip
PLAN = Plan(
    lessons=(LESSON,),
    course=Course(steps=4, prompts=8, samples=4, look_every=2, fixed=4, held_out=8),
    internal_steps=2, seeds=3, other_seeds=1, layer=1, problems=8, samples=4,
    analyzed=8, probed=16, learning_rates=(1e-4, 1e-3), race=2,
)  # fmt: skip


def with_bupo():
    """The environment of a process that imports what this one does."""
    return os.environ | {"PYTHONPATH": str(Path(bupo.__file__).parents[1])}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("lab") / "run"


@pytest.fixture(scope="module")
def found(directory):
    return Laboratory(PLAN, directory, workers=1, progress=False).run()


def test_every_arm_has_its_runs(found):
    counts = found.outcomes["arm"].value_counts().to_dict()
    assert counts.pop("GRPO") == counts.pop("BuPO") == 3
    assert set(counts.values()) == {1}
    assert set(counts) == {it.name for it in found.arms[2:]}
    steps = found.outcomes.set_index(["arm", "seed"])["internal_steps"]
    assert steps["BuPO", 101] == 2
    assert steps["InterGRPO throughout", 101] == 4
    assert steps["GRPO", 101] == 0
    assert found.curves["arm"].nunique() == len(found.arms) - 1  # one makes no step


def test_arms_meet_the_same_problems(found):
    """At step 1 all weights are the start's, and so are the answers and their rewards."""
    first = found.curves[(found.curves["step"] == 1) & (found.curves["seed"] == 101)]
    assert first["bupo/reward"].nunique() == 1
    assert found.curves[found.curves["step"] == 1]["bupo/reward"].nunique() > 1


def test_the_grid_chooses_on_the_development_split(found):
    means = found.grid.groupby(["arm", "lr"])["avg"].mean()
    for method in ("GRPO", "BuPO"):
        assert means[method][found.rates[method].lr] == means[method].max()
    assert {it.split for it in found.jobs} == {"test"}


def test_variants_have_the_learning_rate_of_what_they_vary(directory):
    rates = {"GRPO": Rates(lr=1e-5), "BuPO": Rates(lr=1e-3)}
    jobs = Laboratory(PLAN, directory, workers=1).jobs(1, rates)
    used = {it.arm.name: it.course.rates.lr for it in jobs}
    for name in ("GRPO", "PPO", "GRPO, entropy bonus first", "GRPO, s_inter steps fewer"):
        assert used[name] == 1e-5
    for name in ("BuPO", "BuPO, layer 2", "GRPO on layers <= l first", "InterGRPO throughout"):
        assert used[name] == 1e-3


def test_no_two_starts_share_a_seed(directory):
    plan = replace(FULL, layer=2)
    jobs = Laboratory(plan, directory, workers=1).jobs(2, {"GRPO": Rates(), "BuPO": Rates()})
    of_starts = [{it.seed for it in jobs if it.start.name == name} for name in ("start1", "start2")]
    assert not of_starts[0] & of_starts[1]
    bupo = [it for it in jobs if it.arm.name == "BuPO"]
    grpo = [it for it in jobs if it.arm.name == "GRPO"]
    assert [(it.start, it.seed) for it in bupo] == [(it.start, it.seed) for it in grpo]
    assert len({it.seed for it in bupo}) == 8


def test_what_is_finished_is_not_made_again(found, directory):
    def written():
        return {it: it.stat().st_mtime_ns for it in directory.rglob("outcome.json")}

    before, values = written(), found.outcomes.set_index(["arm", "seed"])["avg"]
    lost = directory / "arms" / "bupo" / "start1-seed102"
    shutil.rmtree(lost)
    again = Laboratory(PLAN, directory, workers=1, progress=False).run()
    after = written()
    assert {it for it in before if before[it] != after[it]} == {lost / "outcome.json"}
    assert again.outcomes.set_index(["arm", "seed"])["avg"].equals(values)


def test_a_run_of_other_settings_is_not_taken_for_this_one(found):
    job = found.jobs[0]
    assert job.finished
    assert not replace(job, course=replace(job.course, rates=Rates(lr=0.5))).finished
    assert not replace(job, seed=job.seed + 1).finished


def test_another_plan_does_not_go_there(found, directory):
    with pytest.raises(OutputDirectoryError, match="a run with other settings"):
        Laboratory(replace(PLAN, problems=9), directory, workers=1).run()


def test_the_command_says_in_a_line_what_is_wrong(tmp_path):
    (tmp_path / "thesis.tex").touch()
    command = [sys.executable, "-m", "bupo.lab", "--quick", "-o", str(tmp_path)]
    found = subprocess.run(command, env=with_bupo(), capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: '{tmp_path}' holds something else: ")
    assert len(found.stderr.splitlines()) == 1
    assert [it.name for it in tmp_path.iterdir()] == ["thesis.tex"]


def test_force_replaces_a_laboratory_and_nothing_else(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.png").touch()
    flat = replace(PLAN, lessons=(replace(LESSON, most_steps=1),))
    for _ in range(2):  # the second finds a laboratory of that plan there
        with pytest.raises(SettingError, match="after 1 steps"):
            Laboratory(flat, tmp_path, workers=1, progress=False).run(force=True)
        assert (tmp_path / "figures" / "mine.png").exists() == (_ == 0)


def test_runs_are_drawn_by_the_commands_of_any_run(found, directory):
    collection = load_collection([directory / "arms" / "bupo" / "start1-seed101"])
    assert len(collection.runs) == 1


def test_the_page_has_a_picture_of_each_kind_and_no_claim_without_an_interval(found, tmp_path):
    text = write_up(found, tmp_path).read_text()
    for name in (
        "profile",
        "arms",
        "figure4",
        "figure5",
        "figure6",
        "figure7",
        "layers",
        "collapse",
    ):
        assert f"figures/{name}.png" in text
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 5000
    assert "half-width" in text
    for line in text.splitlines():
        assert "|" not in line or line.startswith("| ")  # tables are left as they are
    quick = replace(found, plan=replace(PLAN, intervals=False), races={})
    text = write_up(quick, tmp_path).read_text()
    for word in ("half-width", "half_width", "p_holm", "confirmed", "cosine_low", "95 %"):
        assert word not in text


def test_a_flat_profile_is_refused(tmp_path):
    flat = replace(LESSON, enough=0.0, bounds=(0.0, 1.0), look_every=1)
    with pytest.raises(SettingError, match="is flat"):
        Laboratory(replace(PLAN, lessons=(flat,)), tmp_path / "x", workers=1, progress=False).run()


def test_all_starts_must_recommend_one_layer():
    class Told:
        def __init__(self, **readings):
            self.readings = readings

        def recommend(self, *, reading):
            layer, applies = self.readings[reading]
            return type("Choice", (), {"layer": layer, "applies": applies})

    one = Told(raw=(5, "no"), normed=(2, "yes"))
    assert recommended([one, one]) == (2, "normed")
    raw = Told(raw=(3, "yes"), normed=(2, "yes"))
    assert recommended([raw]) == (3, "raw")
    with pytest.raises(SettingError, match=r"raw: 5 \(no\), 3 \(yes\)"):
        recommended([one, Told(raw=(3, "yes"), normed=(1, "yes"))])


@pytest.mark.parametrize("workers", [1, 2])
def test_side_by_side_keeps_the_order(workers):
    found = side_by_side(abs, [-3, 1, -2], abs, workers=workers, title="x", progress=False)
    assert found == [3, 1, 2]


def _odd(item):
    if item % 2:
        raise SettingError(f"{item} is odd", "give an even one")
    return item


def test_an_error_does_not_keep_the_others_from_being_finished():
    done = []
    with pytest.raises(SettingError, match="1 is odd"):
        side_by_side(_odd, [1, 2, 4], lambda it: done.append(it) or it, workers=2, title="x")
    assert set(done[3:]) >= {2, 4}


def _end(_item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_told_of():
    with pytest.raises(AllocationError, match="a process was killed while teaching"):
        side_by_side(_end, [1, 2], abs, workers=2, title="teaching", progress=False)


def test_processes_end_with_their_parent(tmp_path):
    """Not even a kill leaves a run behind that nobody waits for."""
    script = (
        "import os, time\nfrom pathlib import Path\nfrom bupo.lab.jobs import side_by_side\n"
        "def work(place):\n    Path(place).write_text(str(os.getpid()))\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        f"    side_by_side(work, ['{tmp_path}/a', '{tmp_path}/b'], len, workers=2, title='x')\n"
    )
    (tmp_path / "parent.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=with_bupo())
    while not all((tmp_path / it).is_file() and (tmp_path / it).read_text() for it in "ab"):
        assert parent.poll() is None
        time.sleep(0.1)
    workers = [int((tmp_path / it).read_text()) for it in "ab"]
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{it}").exists() for it in workers):  # or the test never ends
        time.sleep(0.1)


def test_plans_are_what_they_promise():
    assert len(FULL.lessons) * FULL.seeds == 8
    assert len(FULL.lessons) * FULL.other_seeds >= 4
    assert not QUICK.intervals
    assert FULL.seeds < GRID_SEED
    assert json.dumps(FULL, default=vars)


def test_markdown():
    import pandas as pd

    frame = pd.DataFrame({"a": ["x", "y"], "b": [0.12345, float("nan")], "c": [3, 4]})
    assert table(frame, {"b": "B"}).splitlines() == [
        "", "| a | B | c |", "| --- | --- | --- |", "| x | 0.123 | 3 |", "| y |  | 4 |",
    ]  # fmt: skip
    assert (points(0.1234), signed(0.1234), signed(-0.5)) == ("12.3", "+12.3", "-50.0")
    assert filled("| a |\n| b |\n\nc\nd") == "| a |\n| b |\n\nc d"
    assert filled("# a\n\n\n| b |\n| c |") == "# a\n\n| b |\n| c |"
