import json
import math

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_model

import entropylens
from entropylens import Analysis
from entropylens.errors import AnalysisFilesError, SettingError

CONTRACT = {
    *("layer", "mixer", "entropy_layer", "entropy_attn", "entropy_ffn"),
    *("delta_layer", "delta_attn", "delta_ffn", "cos_attn", "cos_ffn", "cos_final"),
    *("rms_layer", "rms_attn", "rms_ffn", "rms_attn_in", "rms_mid", "rms_ffn_in"),
    *("nll_layer", "agree_layer", "kl_layer", "control_delta_attn", "control_delta_ffn"),
    *(f"delta_{site}_{end}" for site in ("layer", "attn", "ffn") for end in ("low", "high")),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def analysis(model, responses):
    return entropylens.analyze(model, responses, reading="both", progress=False)


def test_files_of_the_contract(model, responses, tmp_path):
    run = tmp_path / "run"
    analysis = entropylens.analyze(model, responses, output=run, progress=False)
    names = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    figures = (
        "figure1c_stages",
        "figure2_flow",
        "figure3_change",
        "figure8_cosine",
        "trainability",
    )
    assert names == {
        "run.json", "layers.csv", "responses.parquet", "tokens.parquet", "analysis.json",
        "report.html",
        *(f"figures/{name}.{kind}" for name in figures for kind in ("png", "pdf")),
    }  # fmt: skip
    frame = pd.read_csv(run / "layers.csv")
    assert set(frame.columns) == CONTRACT
    assert frame["layer"].tolist() == [1, 2, 3, 4]
    content = json.loads((run / "analysis.json").read_text())
    for field in (
        "schema_version", "model", "revision", "num_layers", "num_responses", "num_tokens",
        "dtype", "reading", "kernel", "policy_entropy", "policy_nll", "policy_perplexity",
        "stages", "recommendation", "versions",
    ):  # fmt: skip
        assert field in content
    assert set(content["stages"]) == {"exploration", "integration", "convergence"}
    for field in (
        "layer", "rule", "applies", "stability", "sensitivity", "paper_rule_layer", "reason",
        "alternatives", "readings",
    ):  # fmt: skip
        assert field in content["recommendation"]
    assert content["num_tokens"] == sum(response.num_tokens for response in responses)
    rows = pd.read_parquet(run / "responses.parquet")
    assert len(rows) == len(responses) * 4
    assert {"response_id", "prompt_id", "layer", "num_tokens", "truncated"} <= set(rows.columns)
    assert analysis.num_prompts == 5


def test_means_are_over_tokens_not_responses(analysis):
    rows = analysis.responses[analysis.responses["layer"] == 2]
    expected = np.average(rows["delta_ffn"], weights=rows["num_tokens"])
    assert analysis.layers["delta_ffn"][1] == pytest.approx(expected)
    assert analysis.policy_perplexity == pytest.approx(math.exp(analysis.policy_nll))


def test_save_and_load(analysis, tmp_path):
    analysis.save(tmp_path)
    loaded = Analysis.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.layers, analysis.layers)
    assert loaded.to_dict() == analysis.to_dict()
    assert set(loaded.recommendations) == {"raw", "normed"}


def test_what_cannot_be_loaded(analysis, tmp_path):
    with pytest.raises(AnalysisFilesError, match=r"analysis.json is missing"):
        Analysis.load(tmp_path)
    analysis.save(tmp_path)
    path = tmp_path / "analysis.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(AnalysisFilesError, match="schema_version 99"):
        Analysis.load(tmp_path)
    path.write_text(json.dumps(content)[:100])
    with pytest.raises(AnalysisFilesError, match="cannot be read"):
        Analysis.load(tmp_path)
    path.write_text(json.dumps(content))
    rows = tmp_path / "responses.parquet"
    frame = analysis.responses
    frame.assign(delta_ffn=frame["delta_ffn"].where(frame.index != 5)).to_parquet(rows)
    with pytest.raises(
        AnalysisFilesError, match="delta_ffn is no number in some responses at layer 2"
    ):
        Analysis.load(tmp_path)
    frame.iloc[:-1].to_parquet(rows)
    with pytest.raises(AnalysisFilesError, match="rows are missing"):
        Analysis.load(tmp_path)
    rows.write_bytes(b"PAR1")
    with pytest.raises(AnalysisFilesError, match="cannot be read"):
        Analysis.load(tmp_path)


def test_recommend_takes_rule_reading_and_task(analysis):
    assert analysis.recommend().rule == "stages"
    assert analysis.recommend("paper").layer == analysis.recommendation.paper_rule_layer
    assert analysis.recommend(reading="normed").reading == "normed"
    for wrong in ({"rule": "best"}, {"reading": "other"}, {"task": "none"}):
        with pytest.raises(SettingError):
            analysis.recommend(**wrong)


def test_a_reading_alone_has_its_columns_alone(model, responses):
    normed = entropylens.analyze(model, responses, reading="normed", progress=False)
    assert "normed_delta_ffn" in normed.layers
    assert "delta_ffn" not in normed.layers
    assert normed.recommendation.reading == "normed"
    assert {"cos_attn", "rms_layer"} <= set(normed.layers)


def test_an_analysis_cannot_be_changed(analysis):
    with pytest.raises(AttributeError):
        analysis.model = "other"
