import json

import pandas as pd
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import entropylens
from entropylens import Series
from entropylens.errors import AnalysisFilesError, SettingError

RESPONSES = [{"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6]}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints, the later one written first, of one unsharded process."""
    root = tmp_path_factory.mktemp("run")
    for step in (40, 5):
        actor = root / f"global_step_{step}" / "actor"
        model = tiny_model("llama", seed=step)
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.save_pretrained(actor / "huggingface")
        tiny_tokenizer().save_pretrained(actor / "huggingface")
        torch.save(model.state_dict(), actor / "model_world_size_1_rank_0.pt")
        (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    return root


def test_one_frame_of_all_steps(run, tmp_path):
    series = entropylens.analyze_series(run, iter(RESPONSES), output=tmp_path, progress=False)
    frame = series.to_frame()
    assert frame["step"].tolist() == [5] * 4 + [40] * 4
    for step in (5, 40):
        expected = entropylens.analyze(tiny_model("llama", seed=step), RESPONSES, progress=False)
        rows = frame[frame["step"] == step].drop(columns="step").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, expected.layers, atol=1e-6)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "series.csv"), frame)
    pd.testing.assert_frame_equal(Series.load(tmp_path).layers, frame)
    series.save(tmp_path / "again")
    pd.testing.assert_frame_equal(Series.load(tmp_path / "again").layers, frame)


def test_one_checkpoint_is_a_model(run):
    found = entropylens.analyze(run / "global_step_5", RESPONSES, progress=False)
    expected = entropylens.analyze(tiny_model("llama", seed=5), RESPONSES, progress=False)
    pd.testing.assert_frame_equal(found.layers, expected.layers, atol=1e-6)


def test_several_checkpoints_are_no_model(run):
    with pytest.raises(SettingError, match=r"2 steps: name one, such as global_step_40"):
        entropylens.analyze(run, RESPONSES, progress=False)


def test_nothing_to_read(tmp_path):
    with pytest.raises(SettingError, match="no veRL checkpoints"):
        entropylens.analyze_series(tmp_path, RESPONSES)
    with pytest.raises(AnalysisFilesError, match="no series"):
        Series.load(tmp_path)


def test_the_command_line_takes_a_run(entropylens, run, tmp_path):
    lines = tmp_path / "responses.jsonl"
    lines.write_text(json.dumps(RESPONSES[0]) + "\n")
    done = entropylens("analyze", run, "--responses", lines, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("step 5:") < done.stdout.index("step 40:")
    assert (tmp_path / "out" / "series.csv").is_file()
    assert (tmp_path / "out" / "step_40" / "report.html").is_file()
