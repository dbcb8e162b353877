"""Paired comparisons: sure ones, undecided ones, and how often they are wrong."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from test_scores import FOUR, RIGHT, TWO, WRONG, evaluation, graded

from entropylens.comparison import Comparison, compare
from entropylens.errors import SettingError


def drawn(name, chances, n=8, seed=0, **options):
    """A benchmark of problems with these chances."""
    random = np.random.default_rng(seed)
    right = random.random((len(chances), n)) < np.asarray(chances)[:, None]
    return graded(name, [[RIGHT if it else WRONG for it in row] for row in right], **options)


def test_a_clear_difference_is_told():
    first = evaluation(drawn("b", np.full(40, 0.2), seed=1), model="weak")
    second = evaluation(drawn("b", np.full(40, 0.6), seed=2), model="strong")
    found = compare(first, second)
    row = found.frame.iloc[0]
    assert (row["benchmark"], row["metric"], row["k"], row["verdict"]) == (
        "b",
        "avg@k",
        8,
        "second",
    )
    assert row["difference"] == pytest.approx(second.score("b") - first.score("b"))
    assert 0.2 < row["low"] < row["difference"] < row["high"] < 0.6
    assert found.sentences[0].endswith("over 40 problems: strong is better on this data.")
    assert "not two methods" in found.sentences[-1]
    turned = compare(second, first).frame.iloc[0]
    assert turned["verdict"] == "first"
    assert turned["difference"] == -row["difference"]


def test_what_cannot_be_told_apart():
    alike = evaluation(drawn("b", np.full(30, 0.4), seed=1))
    found = compare(alike, evaluation(drawn("b", np.full(30, 0.42), seed=2)))
    assert found.frame.iloc[0]["verdict"] == "cannot be told apart"
    assert "cannot be told apart with this data." in found.sentences[0]
    same = compare(alike, alike).frame.iloc[0]
    assert (same["difference"], same["differing"]) == (0, 0)
    assert np.isnan(same["low"])


def test_few_differing_problems_decide_nothing():
    first = np.zeros(30)
    second = np.where(np.arange(30) < 4, 1.0, 0.0)
    found = compare(evaluation(drawn("b", first)), evaluation(drawn("b", second)))
    assert found.frame.iloc[0]["verdict"] == "cannot be told apart"
    assert "(only 4 problems differ)" in found.sentences[0]


@pytest.mark.parametrize(
    ("problems", "n", "mean"), [(40, 16, 0.33), (30, 32, 0.05), (300, 1, 0.02)]
)
def test_a_difference_is_found_by_chance_in_5_percent(monkeypatch, problems, n, mean):
    """Two models of equal chances, that differ problem by problem; few problems are solved."""
    monkeypatch.setattr("entropylens.comparison.RESAMPLES", 2000)
    random = np.random.default_rng(5)
    wrong = 0
    for seed in range(200):
        chances = random.beta(1.2 * mean, 1.2 * (1 - mean), problems)
        other = random.permutation(chances)
        first = evaluation(drawn("b", chances, n, seed))
        second = evaluation(drawn("b", other, n, 999 + seed))
        found = compare(first, second, ks=(1,))
        wrong += found.frame.iloc[0]["verdict"] != "cannot be told apart"
    assert wrong <= 16  # 5 % and two standard errors


def test_the_average_joins_the_benchmarks():
    first = evaluation(drawn("a", np.full(40, 0.2)), drawn("b", np.full(40, 0.3)))
    second = evaluation(drawn("a", np.full(40, 0.5)), drawn("b", np.full(40, 0.5), seed=3))
    frame = compare(first, second).frame
    average = frame[(frame["benchmark"] == "average") & (frame["metric"] == "avg@k")].iloc[0]
    single = frame[frame["metric"] == "avg@k"].iloc[:2]
    assert average["difference"] == pytest.approx(single["difference"].mean())
    assert average["verdict"] == "second"
    assert average["high"] - average["low"] < (single["high"] - single["low"]).min()


def test_a_benchmark_without_an_interval_leaves_the_average_undecided():
    first = evaluation(drawn("a", np.full(40, 0.2)), graded("two", [[WRONG], [WRONG]]))
    second = evaluation(drawn("a", np.full(40, 0.5)), graded("two", [[RIGHT], [WRONG]]))
    frame = compare(first, second).frame
    average = frame[(frame["benchmark"] == "average") & (frame["metric"] == "avg@k")].iloc[0]
    assert np.isnan(average["low"])
    assert average["verdict"] == "cannot be told apart"
    assert pd.isna(average["k"])


def test_what_was_drawn_differently_is_said():
    first, second = evaluation(FOUR), evaluation(FOUR)
    warmer = dataclasses.replace(second, sampling={"engine": "hf", "temperature": 0.6})
    found = compare(first, warmer)
    assert "They were not drawn alike: temperature None and 0.6." in found.sentences


def test_senseless_settings_are_refused():
    for options in ({"ks": (0,)}, {"seed": -1}):
        with pytest.raises(SettingError, match=r"is -?[01]"):
            compare(evaluation(FOUR), evaluation(FOUR), **options)


def test_other_problems_or_judges_are_refused():
    mine = evaluation(FOUR)
    with pytest.raises(SettingError, match="no benchmark in common"):
        compare(mine, evaluation(TWO))
    rows = [[RIGHT] * 4] * 4
    with pytest.raises(SettingError, match="the problems differ"):
        compare(mine, evaluation(graded("four", rows, digest="other")))
    with pytest.raises(SettingError, match=r"judges differ \(math-verify 0.9.0 and strict"):
        compare(mine, evaluation(graded("four", rows, grader="strict, entropylens 1")))


def test_another_number_of_samples_is_compared_where_it_can_be():
    found = compare(
        evaluation(drawn("b", np.full(9, 0.5), 4)), evaluation(drawn("b", np.full(9, 0.5), 16))
    ).frame
    assert found["k"].isna().sum() == 1
    assert found["k"].max() == 4


def test_it_is_saved_and_loaded(tmp_path):
    found = compare(evaluation(FOUR), evaluation(FOUR), ("a", "b"))
    found.save(tmp_path)
    again = Comparison.load(tmp_path)
    assert (again.first, again.second) == ("a", "b")
    pd.testing.assert_frame_equal(again.frame, found.frame)
    assert again.sentences == found.sentences
