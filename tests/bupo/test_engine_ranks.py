import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import group, is_inner, save_model
from one_rank import both_phases

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
FAMILIES = ("llama", "qwen3-tied")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {name: save_model(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, directories):
    """What rank 0 and rank 1 found, a family each."""
    target = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join([str(ROOT / "training"), str(HERE), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    given = [target / "store", target, *directories.values()]
    running = [
        subprocess.Popen(
            [sys.executable, HERE / "one_rank.py", str(rank), *given],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=400)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in running:
            process.kill()
    found = [torch.load(target / f"{rank}.pt") for rank in range(2)]
    return {name: [it[place] for it in found] for place, name in enumerate(FAMILIES)}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_do_what_one_does(directories, two_ranks, family):
    with group():
        expected_reading, expected = both_phases(directories[family], slice(None))
    for rank, (reading, found) in enumerate(two_ranks[family]):
        assert len(reading) == 4  # log-probabilities and entropies of both policies
        for name, rows in reading.items():
            for row, wanted in zip(rows, expected_reading[name][rank::2], strict=True):
                torch.testing.assert_close(row, wanted, atol=1e-5, rtol=0)
        start, inner, end, told = found
        assert told.keys() == end.keys()
        for name, weight in start.items():
            assert torch.equal(weight, expected[0][name])
            assert torch.equal(weight, inner[name]) is not is_inner(name), name
            assert not torch.equal(inner[name], end[name]), name
            assert torch.equal(told[name], end[name]), name
        for step, wanted in zip(found, expected, strict=True):
            for name, weight in step.items():
                torch.testing.assert_close(weight, wanted[name], atol=1e-5, rtol=0)
