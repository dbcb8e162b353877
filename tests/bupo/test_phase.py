import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import pytest
from bupo.phase import MIN_STEPS, WINDOW, Phase
from bupo.settings import AUTO, Settings
from hypothesis import given, settings
from hypothesis import strategies as st

STEADY = [0.4, 0.5, 0.6, 0.5]
BOUND = 0.1


def a_phase(directory, steps=AUTO, most=30):
    return Phase(
        Settings(layer=2, internal_steps=steps, max_internal_steps=most, kl_bound=BOUND),
        Path(directory) / "run" / "phase.json",
    )


def run(phase, rewards=(), kl=(), steps=range(1, 31)):
    """The steps that train pi_l, and the reason given at the end; what is not said stays steady."""
    inner, reasons = [], {}
    for step in steps:
        if phase.is_internal(step):
            inner.append(step)
        looked = dict(kl).get(step, 0.0)
        reason = phase.saw(step, dict(rewards).get(step, STEADY), looked)
        if reason is not None:
            reasons[step] = reason
    return inner, reasons


# A number.


@given(steps=st.integers(0, 50))
def test_exactly_s_inter_steps_are_internal(steps):
    phase = a_phase("unused", steps, None)
    assert [step for step in range(1, 101) if phase.is_internal(step)] == list(range(1, steps + 1))


def test_a_number_neither_listens_nor_writes(tmp_path):
    phase = a_phase(tmp_path, 8, None)
    inner, reasons = run(phase, kl=dict.fromkeys(range(1, 31), 9.0))
    assert inner == list(range(1, 9))
    assert not reasons
    assert not list(tmp_path.iterdir())
    phase.resume(20)
    assert phase.last_internal_step == 8


# Decided as the run goes.


def test_a_quiet_run_takes_the_most_steps_and_no_more(tmp_path):
    phase = a_phase(tmp_path, most=9)
    inner, reasons = run(phase)
    assert inner == list(range(1, 10))
    assert list(reasons) == [9]
    assert "9 steps are the most" in reasons[9]


@pytest.mark.parametrize("most", [1, 3, 5, 7])
def test_never_before_the_fifth_step_unless_fewer_are_allowed(tmp_path, most):
    wild = dict.fromkeys(range(1, 31), 9.0)
    inner, _ = run(a_phase(tmp_path, most=most), kl=wild)
    assert inner == list(range(1, min(most, MIN_STEPS) + 1))
    assert MIN_STEPS == 5


def test_kl_over_the_bound_counts_in_two_looks_running(tmp_path):
    once = {6: 9.0, 8: 9.0, 10: 9.0}
    assert run(a_phase(tmp_path / "once"), kl=once)[0] == list(range(1, 31))
    at_it = {6: BOUND, 7: BOUND}
    assert run(a_phase(tmp_path / "at it"), kl=at_it)[0] == list(range(1, 31))
    inner, reasons = run(a_phase(tmp_path / "twice"), kl={7: 0.11, 8: 0.12})
    assert inner == list(range(1, 9))
    assert "0.11 and 0.12 nats a token" in reasons[8]
    assert "bound of 0.1" in reasons[8]


def test_looks_running_need_not_be_steps_running(tmp_path):
    phase = a_phase(tmp_path)
    for step in range(1, 20):
        kl = {8: 0.5, 12: 0.5}.get(step)
        reason = phase.saw(step, STEADY, kl)
        assert (reason is not None) is (step == 12)
        if reason is not None:
            break
    assert not phase.is_internal(13)


def test_reward_that_falls_by_more_than_its_interval_ends_it(tmp_path):
    low = {step: [it - 0.3 for it in STEADY] for step in range(6, 31)}
    inner, reasons = run(a_phase(tmp_path / "low"), rewards=low)
    # Three of the last: step 6 brings one low of three, step 7 two, step 8 three.
    last = inner[-1]
    assert 6 < last <= 8
    assert "reward fell from 0.500" in reasons[last]
    high = {step: [it + 0.3 for it in STEADY] for step in range(6, 31)}
    assert run(a_phase(tmp_path / "high"), rewards=high)[0] == list(range(1, 31))


def test_reward_that_falls_within_its_interval_does_not(tmp_path):
    half, quarter = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]
    rewards = dict.fromkeys(range(1, 6), half) | dict.fromkeys(range(6, 31), quarter)
    assert run(a_phase(tmp_path), rewards=rewards)[0] == list(range(1, 31))


#: A step's rewards (of its prompts), and the look's KL, if there is one.
a_step = st.tuples(
    st.lists(st.integers(0, 8).map(lambda eighths: eighths / 8), min_size=2, max_size=4),
    st.one_of(st.none(), st.floats(0, 0.2)),
)
runs = st.lists(a_step, min_size=12, max_size=12)


def end_by_the_rule(seen, most):
    """The rule of the module, written anew: the last internal step, or None."""
    looks = []
    for step, (_, kl) in enumerate(seen, start=1):
        if kl is not None:
            looks.append(kl)
        if step >= most:
            return step
        if step < 5:
            continue
        if kl is not None and len(looks) > 1 and looks[-1] > BOUND and looks[-2] > BOUND:
            return step
        if step >= 6:
            first = np.concatenate([rewards for rewards, _ in seen[:3]])
            now = np.concatenate([rewards for rewards, _ in seen[step - 3 : step]])
            error = np.hypot(*(it.std(ddof=1) / len(it) ** 0.5 for it in (first, now)))
            if first.mean() - now.mean() > 1.959964 * error:
                return step
    return None


@settings(max_examples=60, deadline=None)
@given(seen=runs, most=st.integers(1, 14))
def test_it_ends_where_the_rule_says(seen, most):
    assert WINDOW == 3
    with tempfile.TemporaryDirectory() as directory:
        phase = a_phase(directory, most=most)
        for step, (rewards, kl) in enumerate(seen, start=1):
            phase.saw(step, rewards, kl)
    assert phase.last_internal_step == end_by_the_rule(seen, most)
    for step in range(1, 13):
        end = phase.last_internal_step
        assert phase.is_internal(step) is (end is None or step <= end)


@settings(max_examples=40, deadline=None)
@given(seen=runs, died=st.integers(1, 12), saved=st.integers(0, 12))
def test_a_resumed_run_decides_as_one_that_never_stopped(seen, died, saved):
    """It died after a step, and goes on from the checkpoint of an earlier one."""
    saved = min(saved, died)
    other = [([1.0, 1.0], 0.3)] * 12  # what it saw in the steps that are made anew
    with tempfile.TemporaryDirectory() as directory:
        first = a_phase(directory, most=11)
        for step, (rewards, kl) in enumerate(seen[:saved] + other[saved:died], start=1):
            first.saw(step, rewards, kl)
        phase = a_phase(directory, most=11)
        phase.resume(saved)
        for step, (rewards, kl) in enumerate(seen[saved:], start=saved + 1):
            phase.saw(step, rewards, kl)
    assert phase.last_internal_step == end_by_the_rule(seen, 11)


def test_a_decision_lasts(tmp_path):
    phase = a_phase(tmp_path)
    run(phase, kl={7: 0.5, 8: 0.5}, steps=range(1, 13))
    again = a_phase(tmp_path)
    again.resume(12)
    assert again.last_internal_step == 8
    assert run(again, steps=range(13, 31)) == ([], {})
    earlier = a_phase(tmp_path)
    earlier.resume(7)  # from before it was made
    assert earlier.last_internal_step is None
    assert earlier.is_internal(8)


def test_without_a_file_there_is_nothing_to_resume(tmp_path):
    phase = a_phase(tmp_path)
    phase.resume(0)
    assert phase.is_internal(1)


def test_it_never_outlasts_the_most_steps_even_if_its_file_is_lost(tmp_path):
    phase = a_phase(tmp_path, most=9)
    phase.resume(20)
    assert not phase.is_internal(21)


def test_the_decision_is_logged_and_kept(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="bupo.phase"):
        _, reasons = run(a_phase(tmp_path), kl={7: 0.5, 8: 0.5}, steps=range(1, 13))
    (record,) = caplog.records
    assert record.getMessage() == f"the internal phase ends with step 8: {reasons[8]}"
    kept = json.loads((tmp_path / "run" / "phase.json").read_text())
    assert kept["ended"] == [8, reasons[8]]
    assert set(kept["kl"]) == set(kept["rewards"]) == {str(step) for step in range(1, 9)}
