"""One run twice: in this process, and through veRL's trainer, Ray and FSDP2."""

import pandas as pd
import pytest
from bupo.lab.arms import Arm
from bupo.lab.jobs import Job
from bupo.lab.learner import Rates
from bupo.lab.run import Course
from bupo.lab.subject import start
from bupo.lab.task import MAX_PROMPT_TOKENS, Sum, make_tokenizer
from bupo.lab.twin import HERE, VERL, run_twins, write_problems
from test_lab_experiment import LESSON

COURSE = Course(
    steps=4, prompts=8, samples=4, rates=Rates(lr=1e-3), look_every=2, fixed=4,
    held_out=4,
)  # fmt: skip
BUPO = Arm("BuPO", layer=1, internal_steps=2, internal=True)


def job_in(directory):
    return Job(BUPO, COURSE, directory / "start", 3, directory / "here", 1, "test", 4, 2)


def test_problems_are_those_of_the_run_in_their_order(tmp_path):
    write_problems(job_in(tmp_path), tmp_path / "sums.parquet")
    rows = pd.read_parquet(tmp_path / "sums.parquet")
    assert [it["index"] for it in rows["extra_info"]] == list(range(32))
    assert rows["prompt"].iloc[0][0]["content"].endswith("=")


def test_no_prompt_is_longer_than_promised():
    assert len(make_tokenizer()(Sum((20, 20, 20)).prompt)["input_ids"]) == MAX_PROMPT_TOKENS


@pytest.mark.train
def test_both_are_one_run(tmp_path):
    job = job_in(tmp_path)
    start(LESSON, job.start, progress=False)
    found = run_twins(job, tmp_path / "twins")
    here, there = (found[name].metrics.set_index("step") for name in (HERE, VERL))
    assert here["bupo/internal_phase"].tolist() == [1, 1, 0, 0]
    for name in ("bupo/reward", "bupo/internal_phase", "response_length/mean"):
        assert there[name].tolist() == pytest.approx(here[name].tolist(), abs=1e-6), name
    for name in ("actor/grad_norm", "bupo/entropy_policy", "bupo/nll_layer"):
        assert there[name].tolist() == pytest.approx(here[name].tolist(), rel=1e-3), name
