"""Pass@K and Maj@K against exact enumeration, and the coverage of both intervals by simulation."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entropylens.metrics import maj_at_k, pass_at_k, problems_interval, sampling_interval


def test_pass_at_k_equals_rational_arithmetic():
    """1 - prod (n - c - i) / (n - i), the k draws one after the other."""
    for n in range(1, 41):
        for correct in range(n + 1):
            none = Fraction(1)
            for k in range(1, n + 1):
                none *= Fraction(n - correct - (k - 1), n - (k - 1))
                assert pass_at_k(n, correct, k) == float(1 - none)


@pytest.mark.parametrize(
    ("n", "correct", "k", "value"),
    [(300, 4, 4, 0.0525), (16, 4, 4, 0.728), (300, 30, 16, 0.823), (300, 1, 256, 256 / 300)],
)
def test_known_values_of_pass_at_k(n, correct, k, value):
    assert pass_at_k(n, correct, k) == pytest.approx(value, abs=6e-4 if value > 0.1 else 5e-5)


@pytest.mark.parametrize("wrong", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_senseless_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="n=4"):
        pass_at_k(*wrong)


def majority(votes):
    """The share of the point that the right answer, 0, has; None is no vote."""
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [vote for vote, times in counts.items() if times == most]
    return (0 in winners) / len(winners)


@settings(max_examples=150, deadline=None)
@given(
    correct=st.integers(0, 5),
    wrong=st.lists(st.integers(1, 4), max_size=3),
    silent=st.integers(0, 3),
    data=st.data(),
)
def test_maj_at_k_equals_the_mean_over_all_draws(correct, wrong, silent, data):
    votes = [0] * correct + [None] * silent
    for name, times in enumerate(wrong, start=1):
        votes += [name] * times
    if not votes:
        return
    k = data.draw(st.integers(1, min(len(votes), 9)))
    draws = [majority(draw) for draw in itertools.combinations(votes, k)]
    found = maj_at_k(correct, wrong, silent, k)
    assert found == pytest.approx(sum(draws) / len(draws), abs=1e-12)
    assert len(draws) == math.comb(len(votes), k)


def test_maj_at_k_of_many_answers():
    """All drawn: a plain count. One drawn: the share of right ones."""
    assert maj_at_k(40, [40, 30, 1], 189, 300) == 0.5
    assert maj_at_k(41, [40, 30, 1], 188, 300) == pytest.approx(1)
    assert maj_at_k(41, [40, 30, 1], 188, 1) == pytest.approx(41 / 300)
    with pytest.raises(ValueError, match="k=301"):
        maj_at_k(41, [40, 30, 1], 188, 301)


def simulated(problems, n, mean, size, runs, seed):
    """Runs of a benchmark whose problems' chances are Beta distributed, alike where size is inf."""
    random = np.random.default_rng(seed)
    if math.isinf(size):
        chances = np.full((runs, problems), mean)
    else:
        chances = random.beta(mean * size, (1 - mean) * size, (runs, problems))
    return chances, random.binomial(n, chances)


def passed_chance(mean, size, k):
    """E 1 - (1 - p)^k."""
    if math.isinf(size):
        return 1 - (1 - mean) ** k
    right, wrong = mean * size, (1 - mean) * size
    none = math.lgamma(wrong + k) - math.lgamma(wrong)
    none -= math.lgamma(right + wrong + k) - math.lgamma(right + wrong)
    return 1 - math.exp(none)


def coverage(problems, n, k, mean, size, runs=300, seed=0):
    chances, correct = simulated(problems, n, mean, size, runs, seed)
    table = np.array([pass_at_k(n, c, k) for c in range(n + 1)])
    population = passed_chance(mean, size, k)
    drawn = (1 - (1 - chances) ** k).mean(1)
    hit = np.zeros((runs, 2), dtype=bool)
    for run in range(runs):
        over, within = (
            problems_interval(table[correct[run]]),
            sampling_interval(n, correct[run], k),
        )
        hit[run] = (
            over.low <= population <= over.high,
            within.low - 1e-9 <= drawn[run] <= within.high + 1e-9,
        )
    return hit.mean(0)


#: Two standard errors of a coverage of 95 % (90 %) in 300 runs.
SLACK_95, SLACK_90 = 2 * math.sqrt(0.95 * 0.05 / 1200), 2 * math.sqrt(0.9 * 0.1 / 300)


@pytest.mark.parametrize("size", [0.5, 2.0])
@pytest.mark.parametrize("k", [1, 4])
def test_intervals_over_500_problems_cover_what_they_say(size, k):
    found = np.mean(
        [
            coverage(500, 16, k, mean, size, seed=seed)
            for seed, mean in enumerate((0.1, 0.3, 0.5, 0.7))
        ],
        axis=0,
    )
    assert (found >= 0.93 - SLACK_95).all(), found
    assert (found <= 0.97 + SLACK_95).all(), found


@pytest.mark.parametrize("mean", [0.005, 0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [0.3, 1.0, math.inf])
@pytest.mark.parametrize("problems", [30, 40])
def test_intervals_over_few_problems_cover_90_percent(problems, size, mean):
    found = coverage(problems, 32, 1, mean, size)
    assert (found >= 0.90 - SLACK_90).all(), found


def test_no_answer_right_still_leaves_an_interval():
    none = problems_interval(np.zeros(30))
    assert (none.low, round(none.high, 2)) == (0.0, 0.08)
    within = sampling_interval(32, np.zeros(30, dtype=int), 1)
    assert within.low == 0
    assert within.high < none.high
    every = problems_interval(np.ones(30))
    assert (every.low, every.high) == pytest.approx((1 - none.high, 1.0))


@settings(max_examples=100, deadline=None)
@given(
    correct=st.lists(st.integers(0, 8), min_size=1, max_size=40),
    k=st.sampled_from([1, 2, 4, 8]),
)
def test_an_interval_holds_its_estimate(correct, k):
    values = np.array([pass_at_k(8, c, k) for c in correct])
    for found in (problems_interval(values), sampling_interval(8, np.array(correct), k)):
        assert 0 <= found.low <= values.mean() + 1e-12
        assert values.mean() - 1e-12 <= found.high <= 1
