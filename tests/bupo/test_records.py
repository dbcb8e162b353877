import json
import math

import numpy as np
import pytest
import torch
from bupo.records import MetricsFile, shares
from hypothesis import given
from hypothesis import strategies as st


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_a_line_that_can_be_read_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.log({"loss": 0.5, "count": 3}, 1)
    assert read(path) == [{"step": 1, "loss": 0.5, "count": 3.0}]
    file.log({"loss": 0.25}, 2)
    assert [record["step"] for record in read(path)] == [1, 2]


def test_only_numbers_are_kept_whatever_their_type(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    numbers = {"numpy": np.float32(0.5), "torch": torch.tensor(0.25), "int": np.int64(4)}
    file.log(numbers | {"text": "a table", "list": [1.0], "none": None}, 1)
    assert read(file.path) == [{"step": 1, "numpy": 0.5, "torch": 0.25, "int": 4.0}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_not_finite_becomes_null(tmp_path, value):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.log({"kl": value}, 1)
    assert file.path.read_text() == '{"step": 1, "kl": null}\n'


def test_a_resumed_run_drops_later_steps_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in range(1, 6):
        first.log({"loss": step / 10}, step)
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    again = MetricsFile(path, 3)
    assert [record["step"] for record in read(path)] == [1, 2, 3]
    again.log({"loss": 0.44}, 4)
    assert read(path)[2:] == [{"step": 3, "loss": 0.3}, {"step": 4, "loss": 0.44}]


@pytest.mark.parametrize("line", ["", "3", "[1]", "{}", '{"step": null}', '{"step": "x"}', "\x00"])
def test_lines_that_are_no_steps_are_dropped(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    MetricsFile(path, 9)
    assert read(path) == [{"step": 1}, {"step": 2}]


def test_a_new_run_in_an_old_directory_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).log({"loss": 1.0}, 1)
    MetricsFile(path, 0)
    assert read(path) == []


parts = st.dictionaries(
    st.text(st.characters(codec="ascii", categories=["L"]), min_size=1).filter("step".__ne__),
    st.floats(0, 100),
    min_size=1,
)


@given(parts=parts, rest=st.floats(0, 10))
def test_shares_are_of_the_whole_step(parts, rest):
    whole = sum(parts.values()) + rest + 0.5
    found = shares(parts | {"step": whole})
    assert found.keys() == {f"share/{name}" for name in parts}
    assert sum(found.values()) == pytest.approx(1 - (rest + 0.5) / whole)
    for name, seconds in parts.items():
        assert found[f"share/{name}"] * whole == pytest.approx(seconds)


@pytest.mark.parametrize("timing", [{}, {"gen": 1.0}, {"gen": 1.0, "step": 0.0}])
def test_without_a_step_there_are_no_shares(timing):
    assert shares(timing) == {}
