"""Workers in Ray actors give the analysis of one process, also where some of them die."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny import tiny_model
from tqdm import tqdm

import entropylens
from entropylens import analysis, workers
from entropylens.errors import (
    AllocationError,
    NonFiniteStatesError,
    SettingError,
    WeightsError,
)
from entropylens.ray_cluster import RayCluster
from entropylens.rundir import RunDirectory
from entropylens.sampling import Sampling
from entropylens.workers import Ready, Workers

LINES = [
    {"prompt_ids": [5 + place] * (1 + place % 4), "response_ids": list(range(9, 12 + place % 7))}
    for place in range(20)
]
OPTIONS = {"batch_tokens": 12, "progress": False}
CORES = 6
LOADING = {"dtype": "auto", "device": "auto", "revision": None, "trust_remote_code": False}


@pytest.fixture(scope="module", autouse=True)
def ray():
    """A cluster for this module, with more cores than there are: its workers hold some idly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as here: their number changes the last digits
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray = pytest.importorskip("ray")
        ray.init(
            address="local", num_cpus=CORES, include_dashboard=False, log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )  # fmt: skip
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def two(ray, model_directory):
    """Two workers, for several tests: a process takes seconds to start."""
    opened = Workers(model_directory, 2, None, LOADING)
    yield opened
    opened.close()


@pytest.fixture
def shared(two, monkeypatch, model_directory):
    """`analyze` with these two workers."""
    monkeypatch.setattr(analysis, "Workers", lambda *_: contextlib.nullcontext(two))
    monkeypatch.setattr(analysis.contextlib, "closing", lambda it: it)

    def run(responses=None, **options):
        return entropylens.analyze(model_directory, responses, workers=2, **OPTIONS, **options)

    return run


@pytest.fixture(scope="module")
def alone(model_directory):
    return entropylens.analyze(model_directory, LINES, **OPTIONS)


def assert_same(left, right):
    pd.testing.assert_frame_equal(left.responses, right.responses, rtol=1e-6)
    pd.testing.assert_frame_equal(left.tokens, right.tokens, rtol=1e-5)
    assert (left.model, left.kernel, left.settings) == (right.model, right.kernel, right.settings)
    assert left.recommendation.layer == right.recommendation.layer


@pytest.fixture
def at_part(monkeypatch):
    """What to do when so many groups are finished; under "written" those that were."""
    todo, add = {"written": []}, RunDirectory.add

    def added(self, rows, tokens):
        add(self, rows, tokens)
        todo["written"].append(rows["response_id"].unique().tolist())
        todo.get(len(todo["written"]), int)()

    monkeypatch.setattr(RunDirectory, "add", added)
    return todo


def all_once(written):
    return sorted(index for group in written for index in group) == list(range(len(LINES)))


def kill_first(them):
    os.kill(them._places[them._copies[0]].process, signal.SIGKILL)


def test_two_give_what_one_gives(shared, alone, tmp_path):
    assert_same(shared(LINES, output=tmp_path / "run"), alone)
    assert_same(entropylens.Analysis.load(tmp_path / "run"), alone)


def test_answers_are_shared_too(shared, model_directory, tmp_path):
    options = {"num_prompts": 4, "template": "plain", "sampling": Sampling(2, 8)}
    alone = entropylens.analyze(model_directory, **OPTIONS, **options, output=tmp_path / "one")
    assert_same(shared(**options, output=tmp_path / "two"), alone)
    one, two = ((tmp_path / it / "completions.jsonl").read_text() for it in ("one", "two"))
    assert sorted(one.splitlines()) == sorted(two.splitlines())


def test_a_run_goes_on_with_any_number_of_workers(
    shared, alone, tmp_path, at_part, model_directory
):
    def interrupt():
        raise KeyboardInterrupt

    at_part[3] = at_part[6] = interrupt
    with pytest.raises(KeyboardInterrupt):
        entropylens.analyze(model_directory, LINES, output=tmp_path / "run", **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        shared(LINES, output=tmp_path / "run")
    done = entropylens.analyze(model_directory, LINES, output=tmp_path / "run", **OPTIONS)
    assert_same(done, alone)
    assert all_once(at_part["written"])


def test_one_that_cannot_compute_as_the_others_decides_for_all(two, monkeypatch, responses):
    fast, exact = {"precision": "fast", "precision_error": 0.1}, {"precision": "exact"}
    said = iter(
        [
            [Ready("compiled", 1, fast), Ready("eager", 2, exact)],
            [Ready("eager", 1, exact), Ready("eager", 2, exact)],
        ]
    )
    monkeypatch.setattr(two, "_get", lambda _: next(said))
    settings = {
        "reading": "raw", "batch_tokens": 8, "kernel": "auto", "num_logits": 1.0, "seed": 0,
        "precision": "fast",
    }  # fmt: skip
    assert two.begin(responses, None, settings) == ("eager", 2, exact)
    assert (two._task[2]["kernel"], two._task[2]["precision"]) == ("eager", "exact")


def test_the_work_of_a_killed_one_is_done_again(two, shared, alone, tmp_path, at_part, caplog):
    at_part[2] = lambda: kill_first(two)
    with caplog.at_level(logging.WARNING):
        assert_same(shared(LINES, output=tmp_path / "run"), alone)
    (lost,) = [record.message for record in caplog.records if "is lost" in record.message]
    assert "responses are measured again, another is started" in lost
    assert all_once(at_part["written"])


def test_the_last_group_of_a_lost_one_goes_to_one_that_is_idle_by_then():
    class Gone(Exception):
        pass

    class Actor:
        def __init__(self, *results):
            self.measure = SimpleNamespace(remote=lambda group: (group, next(left)))
            left = iter(results)

    def get(reference):
        if reference[1] is Gone:
            raise Gone
        return reference

    them = Workers.__new__(Workers)
    them._copies = [Actor("first", "third"), Actor(Gone)]
    them._cluster = SimpleNamespace(
        lost=(Gone,),
        get=get,
        ray=SimpleNamespace(wait=lambda waits, timeout: (waits[:1], waits[1:]), kill=id),
    )
    them.name, them._places, them._replacements, them._lengths = "m", {}, 0, [2, 3]
    bar = tqdm(total=5, disable=True)
    found = list(them.measured([(0,), (1,)], bar))
    assert found == [((0,), "first"), ((1,), "third")]


def test_a_replacement_goes_on_alone_and_what_is_finished_when_all_are_lost_is_kept(
    model_directory, alone, tmp_path, at_part, monkeypatch
):
    monkeypatch.setattr(workers, "REPLACEMENTS", 1)
    seen, opened = [], Workers.__init__

    def watched(self, *args):
        opened(self, *args)
        seen.append(self)

    monkeypatch.setattr(Workers, "__init__", watched)
    at_part[2] = at_part[5] = lambda: kill_first(seen[0])
    options = {"output": tmp_path / "run", **OPTIONS}
    with pytest.raises(AllocationError, match=r"every worker .* is lost.*is kept"):
        entropylens.analyze(model_directory, LINES, workers=1, **options)
    assert len(at_part["written"]) == 5
    assert_same(entropylens.analyze(model_directory, LINES, **options), alone)
    assert all_once(at_part["written"])


def test_what_a_worker_raises_is_raised_here(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.inf
    model.save_pretrained(tmp_path)
    bad = {"prompt_ids": [77], "response_ids": [9, 10]}
    with pytest.raises(NonFiniteStatesError, match=r"layer 1 .* in response 21"):
        entropylens.analyze(tmp_path, [*LINES, bad], workers=1, **OPTIONS)


def test_other_weights_on_another_machine_are_refused(model_directory, tmp_path, monkeypatch):
    tiny_model("llama", seed=5).save_pretrained(tmp_path / "other")
    sources = iter([str(model_directory), str(tmp_path / "other")])
    source = property(lambda _: next(sources), lambda *_: None)
    monkeypatch.setattr(Workers, "_source", source, raising=False)
    with pytest.raises(WeightsError, match="opened other weights"):
        Workers("tiny", 2, None, LOADING)


def test_what_cannot_travel_or_be_had():
    model = tiny_model("llama")
    for wrong, says in (
        ({"workers": 2}, "a loaded one cannot travel"),
        ({"workers": 0}, "workers is 0"),
        ({"workers": 2, "remote": True}, "remote="),
        ({"ray_address": "auto"}, "--workers"),
    ):
        with pytest.raises(SettingError, match=says):
            entropylens.analyze(model, LINES, **wrong)
    with pytest.raises(SettingError, match="1000 copies need 1000 cpus"):
        Workers("tiny", 1000, None, LOADING)


def test_the_command_line_joins_a_cluster_and_leaves_nothing_behind_at_ctrl_c(
    ray, two, model_directory, tmp_path
):
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps(line) for line in LINES * 20))
    command = [sys.executable, "-m", "entropylens.cli", "analyze", model_directory]
    command += ["--responses", lines, "--batch-tokens", "12", "-o", tmp_path / "run"]
    command += ["--workers", "2", "--ray-address", ray.get_runtime_context().gcs_address]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "run" / "parts"
    while process.poll() is None and not list(parts.glob("[0-9]*.parquet")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "resumes" in said.splitlines()[-1]
    cores = None
    for _ in range(100):
        cores = ray.available_resources()["CPU"]
        if cores == CORES - 2:  # but for those of `two`
            break
        time.sleep(0.2)
    assert cores == CORES - 2

    done = entropylens.analyze(model_directory, lines, output=tmp_path / "run", **OPTIONS)
    assert done.num_responses == len(LINES) * 20


def test_no_cluster_at_an_address(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"):
        with pytest.raises(SettingError, match=f"no Ray cluster answers at '{address}'"):
            RayCluster("--workers", address)
