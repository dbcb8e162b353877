"""How a layer race is decided, whoever makes the trials."""

import json
import math
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import pytest
from bupo.race import Race, Trial, parse_layers, race, round_steps
from hypothesis import given
from hypothesis import strategies as st

from entropylens.errors import AnalysisFilesError, SettingError

BOUND = 0.1
#: Few values, so that there are ties.
REWARDS = st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 3)
KLS = st.sampled_from([0.0, 0.05, BOUND, 0.2, math.nan])
CANDIDATES = st.lists(st.integers(1, 40), min_size=2, max_size=9, unique=True)


@st.composite
def courses(draw):
    """Candidates, and how each stands in each of the rounds (at most four)."""
    layers = draw(CANDIDATES)
    standings = st.lists(st.tuples(REWARDS, KLS), min_size=4, max_size=4)
    return layers, {layer: draw(standings) for layer in layers}


def running(courses, internal_steps=32):
    """`trials` that follow their courses, and the calls made."""
    ends = round_steps(len(courses), internal_steps)
    calls = []

    def trials(layers, steps):
        calls.append((list(layers), steps))
        at = ends.index(steps)
        return [Trial(layer, steps, *courses[layer][at]) for layer in layers]

    return trials, calls


def settled(layers, courses, internal_steps=32):
    trials, _ = running(courses, internal_steps)
    return race(layers, internal_steps, trials, kl_bound=BOUND)


@given(courses())
def test_the_winner_is_a_candidate_within_the_bound(course):
    layers, stands = course
    found = settled(layers, stands)
    last = {it.layer: it for it in found.rounds[-1]}
    if found.layer is None:
        assert not any(it.kl <= BOUND for it in last.values())
    else:
        assert found.layer in layers
        assert last[found.layer].kl <= BOUND
        within = [it.reward for it in last.values() if it.kl <= BOUND]
        assert last[found.layer].reward == max(within)


@given(courses(), st.data())
def test_their_order_changes_nothing(course, data):
    layers, stands = course
    other = data.draw(st.permutations(layers))
    first, second = settled(layers, stands), settled(other, stands)
    assert (first.layer, first.reason) == (second.layer, second.reason)
    assert first.to_frame().equals(second.to_frame())


@given(courses(), st.data())
def test_who_is_best_throughout_wins(course, data):
    layers, stands = course
    best = data.draw(st.sampled_from(layers))
    stands |= {best: [((1.0, 1.0, 2.0), 0.05)] * 4}
    assert settled(layers, stands).layer == best


@given(courses())
def test_rounds_halve_the_candidates_and_double_the_steps(course):
    layers, stands = course
    trials, calls = running({layer: [(it, 0.0) for it, _ in stands[layer]] for layer in layers})
    race(layers, 32, trials, kl_bound=BOUND)
    assert calls[0][0] == sorted(layers)
    for (before, steps), (after, doubled) in pairwise(calls):
        assert len(after) == math.ceil(len(before) / 2)
        assert set(after) < set(before)
        assert doubled == 2 * steps
    assert calls[-1][1] == 32
    assert math.ceil(len(calls[-1][0]) / 2) == 1


@pytest.mark.parametrize(
    ("stands", "wins"),
    [
        ({2: (0.9, 0.2), 4: (0.1, 0.1)}, 4),  # the bound itself is within
        ({2: (0.9, math.nan), 4: (0.1, 0.0)}, 4),
        ({2: (0.5, 0.08), 4: (0.5, 0.02)}, 4),  # equal rewards: less KL
        ({4: (0.5, 0.02), 2: (0.5, 0.02)}, 2),  # equal in all: the lower layer
        ({2: (math.nan, 0.0), 4: (0.0, 0.0)}, 4),
        ({2: (0.9, 0.2), 4: (0.9, math.nan)}, None),
    ],
)
def test_what_is_better(stands, wins):
    made = {layer: [((reward,), kl)] for layer, (reward, kl) in stands.items()}
    found = settled(list(stands), made, internal_steps=5)
    assert found.layer == wins
    if wins is None:
        assert "after 5 internal steps each of [2, 4] had moved the policy" in found.reason
        with pytest.raises(SettingError, match=r"more than 0\.1 nats.*: pass --layer N"):
            _ = found.winner
    else:
        assert found.winner == wins


def test_no_layer_where_all_that_are_left_move_too_far_later():
    stands = {1: [((0.9,), 0.05), ((0.9,), 0.3)], 2: [((0.8,), 0.05), ((0.8,), 0.2)]}
    stands |= {3: [((0.1,), 0.0), ((0.1,), 0.0)]}
    found = settled([1, 2, 3], stands, internal_steps=8)
    assert found.layer is None
    assert "after 8 internal steps each of [1, 2]" in found.reason
    assert found.to_frame()["goes_on"].tolist() == [True, True, False, False, False]


def test_the_margin_is_a_paired_t_interval():
    first, second = (1.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.5)
    found = settled([3, 5], {3: [(second, 0.0)], 5: [(first, 0.0)]})
    differences = [1.0, 0.0, 0.0, 0.5]
    quantile = 3.182446305  # of Student's t with 3 degrees of freedom, 97.5 %
    half = quantile * stdev(differences) / math.sqrt(4)
    assert found.margin == pytest.approx((mean(differences), half))
    assert "Layer 5 is left of [3, 5]" in found.reason
    assert "+0.375 (95 % half-width 0.762), which does not settle it" in found.reason
    clear = settled([3, 5], {3: [((0.0,) * 4, 0.0)], 5: [((1.0,) * 4, 0.0)]})
    assert clear.margin == (1.0, 0.0)
    assert "settle" not in clear.reason
    alone = settled([3, 5], {3: [(second, 0.5)], 5: [(first, 0.0)]})
    assert all(map(math.isnan, alone.margin))
    assert "[3] moved the policy by more than 0.1 nats" in alone.reason


def test_a_winner_whose_own_reward_fell_is_told_of():
    good, poor = (1.0, 0.9, 1.0, 0.8), (0.3, 0.1, 0.2, 0.2)
    stands = {1: [(good, 0.0), (poor, 0.0)], 2: [(good, 0.01), (poor, 0.5)], 3: [(poor, 0.0)]}
    found = settled([1, 2, 3], stands, internal_steps=8)
    assert "Its own reward fell from 0.925 after 4 steps to 0.200 after 8" in found.reason
    one_round = {layer: stands[layer] for layer in (1, 3)}
    assert "Its own reward" not in settled([1, 3], one_round, internal_steps=8).reason
    stands[1][1] = ((0.9, 1.0, 0.7, 1.0), 0.0)  # within the error
    assert "Its own reward" not in settled([1, 2, 3], stands, internal_steps=8).reason


@given(courses())
def test_it_comes_back_as_it_was_saved(course):
    found = settled(*course)
    with tempfile.TemporaryDirectory() as place:
        found.save(Path(place) / "race")
        back = Race.load(Path(place) / "race")
        text = (Path(place) / "race" / "race.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["reason"] == found.reason
    assert back.to_frame().equals(found.to_frame())
    assert (back.layer, back.kl_bound, repr(back)) == (found.layer, BOUND, repr(found))


def test_a_directory_without_a_race(tmp_path):
    with pytest.raises(AnalysisFilesError, match="no readable race"):
        Race.load(tmp_path)
    (tmp_path / "race.json").write_text('{"rounds": [[{"layer": 1}]]}')
    with pytest.raises(AnalysisFilesError, match="no readable race"):
        Race.load(tmp_path)


def test_candidates_are_different_inner_layers():
    assert parse_layers("race:6,2,4", 8) == [6, 2, 4]
    for text in ("race:", "race:3", "race:3,3", "race:0,3", "race:3,8", "race:a,b", "race:1,-2"):
        with pytest.raises(SettingError, match="from 1 to 7"):
            parse_layers(text, 8)


def test_rounds_end_at_the_internal_steps_or_just_below():
    assert round_steps(2, 5) == [5]
    assert round_steps(3, 5) == [2, 4]
    assert round_steps(8, 30) == [7, 14, 28]
    with pytest.raises(SettingError, match="give --internal-steps 4 or more"):
        round_steps(8, 3)
