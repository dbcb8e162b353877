import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import entropylens
from entropylens.errors import (
    AllocationError,
    NonFiniteStatesError,
    OutputDirectoryError,
    SettingError,
)
from entropylens.sampling import Sampling


def assert_same(left, right):
    pd.testing.assert_frame_equal(left.responses, right.responses, check_exact=True)
    assert left.to_dict() == right.to_dict()


def test_an_interrupted_run_resumes_without_computing_again(responses, tmp_path, monkeypatch):
    model = tiny_model("llama")
    options = {"batch_tokens": 12, "progress": False}
    whole = entropylens.analyze(model, responses, output=tmp_path / "whole", **options)

    from entropylens import meter

    groups = []
    pieces = meter.pieces

    def counted(anatomy, items, group, batch_tokens):
        groups.append(list(group))
        if len(groups) == 3:
            raise KeyboardInterrupt
        return pieces(anatomy, items, group, batch_tokens)

    monkeypatch.setattr(meter, "pieces", counted)
    with pytest.raises(KeyboardInterrupt):
        entropylens.analyze(model, responses, output=tmp_path / "cut", **options)
    done = {index for group in groups[:2] for index in group}
    resumed = entropylens.analyze(model, responses, output=tmp_path / "cut", **options)
    again = {index for group in groups[3:] for index in group}
    assert done | again == set(range(len(responses)))
    assert not done & again
    assert_same(resumed, whole)

    groups.clear()
    assert_same(entropylens.analyze(model, responses, output=tmp_path / "cut", **options), whole)
    assert groups == []


@pytest.mark.parametrize("after", [1, 2, 4])
def test_kill_9_in_the_middle(model_directory, tmp_path, after):
    """The process is killed once `after` parts are there; the next one goes on from them."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import time
            import entropylens
            from entropylens import meter
            from entropylens.sampling import Sampling
            pieces = meter.pieces
            def slowly(*args):
                time.sleep(0.3)
                return pieces(*args)
            meter.pieces = slowly
            entropylens.analyze(
                {str(model_directory)!r}, num_prompts=6, template="plain", sampling=Sampling(1, 12),
                batch_tokens=14, output={str(tmp_path / "cut")!r}, progress=False,
            )
            """
        )
    )
    # As many threads as here: the number of threads changes the last digits.
    process = subprocess.Popen([sys.executable, script], env=os.environ | {"OMP_NUM_THREADS": "1"})
    parts = tmp_path / "cut" / "parts"
    while process.poll() is None and len(list(parts.glob("*.parquet"))) < after:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {part.name: part.stat().st_mtime_ns for part in parts.glob("*.parquet")}
    assert len(kept) >= after
    assert not (tmp_path / "cut" / "analysis.json").exists()

    options = {
        "num_prompts": 6, "template": "plain", "sampling": Sampling(1, 12),
        "batch_tokens": 14, "progress": False,
    }  # fmt: skip
    rewritten = []
    from entropylens.rundir import RunDirectory

    add = RunDirectory.add

    def watched(self, rows, tokens):
        rewritten.append(f"{int(rows['response_id'].iloc[0]):08d}.parquet")
        add(self, rows, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "add", watched)
        resumed = entropylens.analyze(str(model_directory), output=tmp_path / "cut", **options)
    assert not set(rewritten) & set(kept)
    whole = entropylens.analyze(str(model_directory), output=tmp_path / "whole", **options)
    assert_same(resumed, whole)
    assert not parts.exists()


def test_other_settings_do_not_mix(responses, tmp_path):
    model = tiny_model("llama")
    entropylens.analyze(model, responses, output=tmp_path / "run", progress=False)
    for change in ({"seed": 1}, {"reading": "both"}):
        with pytest.raises(OutputDirectoryError, match="other settings"):
            entropylens.analyze(model, responses, output=tmp_path / "run", progress=False, **change)
    other = tiny_model("llama", seed=5)
    with pytest.raises(OutputDirectoryError, match="other settings"):
        entropylens.analyze(other, responses, output=tmp_path / "run", progress=False)
    replaced = entropylens.analyze(
        other, responses, output=tmp_path / "run", force=True, progress=False
    )
    assert_same(entropylens.Analysis.load(tmp_path / "run"), replaced)


def test_tasks_are_shown_one_by_one(tmp_path):
    for name, problems in (("sums", ["1+1", "2+3"]), ("words", ["abc", "xyz"])):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"problem": problem}) for problem in problems)
        )
    analysis = entropylens.analyze(
        tiny_model("llama"),
        tokenizer=tiny_tokenizer(),
        datasets=[str(tmp_path / "sums.jsonl"), str(tmp_path / "words.jsonl")],
        sampling=Sampling(2, 8),
        progress=False,
    )
    assert analysis.tasks == ("sums", "words")
    assert set(analysis.by_task) == {"sums", "words"}
    assert analysis.num_responses == 8
    assert analysis.num_prompts == 4
    layers = {found.layer for found in analysis.by_task.values()}
    assert analysis.tasks_agree == (len(layers) == 1)
    assert set(analysis.to_dict()["tasks"]) == {"sums", "words"}


def test_states_that_are_not_finite_name_layer_and_response(responses):
    model = tiny_model("llama")
    read = {token for response in responses[:3] for token in response.prompt_ids}
    token = next(token for token in responses[3].prompt_ids if token not in read)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.inf
    with pytest.raises(NonFiniteStatesError, match=r"layer 1 .* in response 4"):
        entropylens.analyze(model, responses[:4], progress=False)


def test_an_allocation_that_fails_names_the_smaller_setting(responses, monkeypatch):
    from entropylens import meter

    def refuse(*_args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 TB")

    monkeypatch.setattr(meter, "raw_reading", refuse)
    with pytest.raises(AllocationError, match="try --batch-tokens 128"):
        entropylens.analyze(tiny_model("llama"), responses, progress=False)


def test_senseless_settings(responses):
    model = tiny_model("llama")
    for wrong, says in (
        ({"reading": "both of them"}, "no reading"),
        ({"kernel": "cuda"}, "no kernel"),
        ({"seed": -1}, "seed is -1"),
        ({"template": "chat"}, "not both"),
    ):
        with pytest.raises(SettingError, match=says):
            entropylens.analyze(model, responses, **wrong)
    with pytest.raises(SettingError, match="batch_tokens"):
        entropylens.analyze(model, responses, batch_tokens=0, progress=False)
    with pytest.raises(SettingError, match="not both"):
        entropylens.analyze(model, responses, datasets=["bundled"])


def test_one_response_alone(responses):
    analysis = entropylens.analyze(tiny_model("gpt2"), responses[:1], progress=False)
    assert np.isnan(analysis.layers["delta_ffn_low"]).all()
    assert analysis.recommendation.stability is None
