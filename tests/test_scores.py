"""Scores from written grades, against numbers counted by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from entropylens.errors import EvaluationFilesError, SettingError
from entropylens.metrics import pass_at_k, problems_interval, sampling_interval
from entropylens.scores import Evaluation, GradedBenchmark, powers_of_two

RIGHT, WRONG, SILENT = ("7", "correct"), ("8", "wrong"), (None, "no answer")


def graded(name, problems, grader="math-verify 0.9.0", digest="d"):
    """Grades of a benchmark: one list of (answer, verdict) a problem."""
    rows = [
        {
            "benchmark": name, "problem": problem, "sample": sample, "answer": answer,
            "verdict": verdict, "num_tokens": 10 * (problem + 1), "truncated": answer is None,
        }
        for problem, answers in enumerate(problems)
        for sample, (answer, verdict) in enumerate(answers)
    ]  # fmt: skip
    meta = GradedBenchmark(
        name, f"{name}.parquet", None, len(problems), len(problems[0]), digest, grader
    )
    return meta, pd.DataFrame(rows)


def evaluation(*benchmarks, ks=(), model="m"):
    metas, frames = zip(*benchmarks, strict=True)
    grades = pd.concat(frames, ignore_index=True)
    return Evaluation(model, "f", {"engine": "hf"}, metas, grades, ks, {})


FOUR = graded(
    "four",
    [
        [RIGHT, RIGHT, WRONG, SILENT],
        [WRONG, WRONG, RIGHT, ("9", "timeout")],
        [SILENT] * 4,
        [RIGHT] * 4,
    ],
)
TWO = graded("two", [[RIGHT, WRONG], [SILENT, WRONG]], digest="e")


def test_scores_are_counted_right():
    found = evaluation(FOUR)
    assert found.score("four") == pytest.approx((2 + 1 + 0 + 4) / 16)
    assert found.score("four", "pass@k", 2) == pytest.approx((5 / 6 + 1 / 2 + 0 + 1) / 4)
    assert found.score("four", "pass@k", 4) == 0.75
    # Of the first problem all draws of 4 hold two right ones against one; of the second two wrong
    # ones that are alike beat the right one.
    assert found.score("four", "maj@k", 4) == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert found.score("four", "maj@k", 1) == found.score("four")
    row = found.scores.iloc[0]
    assert (row["metric"], row["k"], row["n"], row["problems"]) == ("avg@k", 4, 4, 4)
    assert (row["solved"], row["few_solved"]) == (3, True)
    assert (row["truncated"], row["no_answer"], row["unjudged"]) == (5 / 16, 5 / 16, 1 / 16)
    assert row["mean_tokens"] == 25
    assert row["grader"] == "math-verify 0.9.0"
    assert found.scores["metric"].tolist() == ["avg@k", *["pass@k"] * 3, *["maj@k"] * 3]
    assert found.scores["k"].tolist() == [4, 1, 2, 4, 1, 2, 4]


def test_intervals_are_those_of_the_metrics():
    scores = evaluation(FOUR).scores
    correct = np.array([2, 1, 0, 4])
    for _, row in scores[scores["metric"] != "maj@k"].iterrows():
        k = 1 if row["metric"] == "avg@k" else row["k"]
        over = problems_interval(np.array([pass_at_k(4, c, k) for c in correct]))
        within = sampling_interval(4, correct, k)
        assert (row["low"], row["high"]) == (over.low, over.high)
        assert (row["sampling_low"], row["sampling_high"]) == (within.low, within.high)
    assert scores[scores["metric"] == "maj@k"]["sampling_low"].isna().all()


def test_wrong_answers_vote_by_what_they_say():
    spelled = [("\\frac12", "wrong"), ("1/2", "wrong"), ("0.5", "wrong"), RIGHT, RIGHT]
    found = evaluation(graded("spelled", [spelled]))
    assert found.score("spelled", "maj@k", 4) == pytest.approx(maj_by_hand(), abs=1e-12)


def maj_by_hand():
    """4 of 3 alike wrong and 2 right: all 5 draws hold a majority of wrong ones or a tie."""
    ties = 3 / 5  # one of the wrong ones is left out: 2 to 2
    return ties / 2


def test_the_average_is_unweighted():
    scores = evaluation(FOUR, TWO).scores
    average = scores[scores["benchmark"] == "average"].set_index(["metric", "k"])
    single = scores.set_index(["benchmark", "metric", "k"])
    assert math.isclose(
        scores[scores["benchmark"] == "average"]["value"].iloc[0], (7 / 16 + 1 / 4) / 2
    )
    assert {k for metric, k in average.index if metric == "pass@k"} == {1, 2}
    row = average.loc[("pass@k", 2)]
    both = [single.loc[(name, "pass@k", 2)] for name in ("four", "two")]
    assert row["value"] == pytest.approx(sum(it["value"] for it in both) / 2)
    below = math.hypot(*(it["value"] - it["low"] for it in both)) / 2
    assert row["low"] == pytest.approx(row["value"] - below)
    assert scores[scores["benchmark"] == "average"]["k"].isna().sum() == 1  # avg@4 and avg@2


def test_problems_one_by_one():
    frame = evaluation(FOUR).problems
    assert frame["correct"].tolist() == [2, 1, 0, 4]
    assert frame["answered"].tolist() == [3, 4, 0, 4]
    assert frame["answer"].fillna("none").tolist() == ["7", "8", "none", "7"]


def test_k_is_checked_and_chosen():
    assert powers_of_two(300) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert evaluation(FOUR, ks=(3,)).scores["k"].tolist() == [4, 3, 3]
    with pytest.raises(SettingError, match="K = 8 of n = 4"):
        evaluation(FOUR, ks=(8,))
    with pytest.raises(SettingError, match="K = 8 of n = 4"):
        evaluation(FOUR).values("four", "pass@k", 8)


def test_it_is_saved_and_loaded(tmp_path):
    evaluation(FOUR, TWO, ks=(1, 2)).save(tmp_path)
    found = Evaluation.load(tmp_path)
    pd.testing.assert_frame_equal(found.scores, evaluation(FOUR, TWO, ks=(1, 2)).scores)
    written = pd.read_csv(tmp_path / "scores.csv")
    assert list(written)[:9] == [
        *("benchmark", "metric", "k", "value", "low", "high"),
        *("sampling_low", "sampling_high", "n"),
    ]
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["avg"]["four"] == pytest.approx(7 / 16)
    content["schema_version"] = 99
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(EvaluationFilesError, match=r"schema_version 99.*upgrade"):
        Evaluation.load(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(EvaluationFilesError, match=r"evaluation.json is missing"):
        Evaluation.load(tmp_path)


def test_a_torn_save_is_not_read(tmp_path):
    evaluation(FOUR).save(tmp_path)
    evaluation(FOUR).grades.iloc[:-1].to_parquet(tmp_path / "grades.parquet")
    with pytest.raises(EvaluationFilesError, match="of another call"):
        Evaluation.load(tmp_path)


def test_judges_are_not_averaged_together():
    strict = graded("two", [[RIGHT, WRONG]] * 2, grader="strict, entropylens 1", digest="e")
    assert "average" not in evaluation(FOUR, strict).scores["benchmark"].tolist()


def test_other_problems_of_the_same_name_are_refused():
    with pytest.raises(SettingError, match="other problems called 'two'"):
        evaluation(graded("two", [[RIGHT]], digest="other")).with_others(evaluation(TWO))
    with pytest.raises(SettingError, match="two with n = 2, fewer than --k 4"):
        evaluation(FOUR, ks=(4,)).with_others(evaluation(TWO))
    renamed = graded("again", [[RIGHT, WRONG]] * 2, digest=TWO[0].digest)
    found = evaluation(renamed).with_others(evaluation(TWO))
    assert [one.name for one in found.benchmarks] == ["again"]


def test_benchmarks_of_an_earlier_call_stay():
    again = graded("two", [[RIGHT, RIGHT], [SILENT, WRONG]], digest="e")
    found = evaluation(again).with_others(evaluation(FOUR, TWO))
    assert [one.name for one in found.benchmarks] == ["four", "two"]
    assert found.score("two") == 0.5
    assert found.score("four") == pytest.approx(7 / 16)
