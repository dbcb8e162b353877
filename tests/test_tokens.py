import logging

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import entropylens
from entropylens import Analysis, analysis, meter
from entropylens.errors import SettingError
from entropylens.tokens import Extent

NAMES = ("entropy_layer", "delta_ffn", "normed_nll_layer")


@pytest.mark.parametrize("batch_tokens", [5, 512])
def test_every_token_is_the_plain_one(responses, batch_tokens):
    model = tiny_model("llama", torch.float64)
    found = entropylens.analyze(
        model, responses, reading="both", keep_tokens=NAMES, top_tokens=3,
        batch_tokens=batch_tokens, tokenizer=tiny_tokenizer(), progress=False,
    )  # fmt: skip
    tokens = found.tokens
    assert len(tokens) == 4 * found.num_tokens
    tokenizer = tiny_tokenizer()
    for index, response in enumerate(responses):
        rows = tokens[(tokens["response_id"] == index) & (tokens["layer"] == 2)]
        assert rows["position"].tolist() == list(range(1, response.num_tokens + 1))
        assert rows["token_id"].tolist() == list(response.response_ids)
        assert rows["token"].tolist() == [tokenizer.decode([it]) for it in response.response_ids]
        ids = (*response.prompt_ids, *response.response_ids)
        log_probs = entropylens.internal_policy(model, ids, 2)[len(response.prompt_ids) - 1 : -1]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        np.testing.assert_allclose(rows["entropy_layer"], entropy, atol=1e-6)
        best = log_probs.exp().topk(3, dim=-1)
        assert np.stack(rows["top_token_ids"]).tolist() == best.indices.tolist()
        np.testing.assert_allclose(np.stack(rows["top_probs"]), best.values, atol=1e-6)
        own = log_probs.gather(-1, torch.tensor(response.response_ids)[:, None])
        assert rows["rank"].tolist() == ((log_probs > own).sum(-1) + 1).tolist()
        texts = [[tokenizer.decode([token]) for token in row] for row in best.indices.tolist()]
        assert [list(row) for row in rows["top_tokens"]] == texts
    # Their means are the means that are kept anyway.
    means = tokens.groupby("layer")[list(NAMES)].mean()
    np.testing.assert_allclose(means, found.layers[list(NAMES)], rtol=1e-5, atol=1e-6)


def test_they_are_saved_sized_and_resumed(responses, tmp_path, monkeypatch, caplog):
    model = tiny_model("llama")
    options = {"keep_tokens": ["kl_layer"], "top_tokens": 2, "batch_tokens": 12, "progress": False}
    with caplog.at_level(logging.INFO, logger="entropylens"):
        whole = entropylens.analyze(model, responses, **options)
    assert "single tokens are kept: about 0.0 MB" in caplog.text

    pieces = meter.pieces
    calls = []

    def broken(*arguments):
        calls.append(arguments[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pieces(*arguments)

    monkeypatch.setattr(meter, "pieces", broken)
    with pytest.raises(KeyboardInterrupt):
        entropylens.analyze(model, responses, output=tmp_path / "run", **options)
    entropylens.analyze(model, responses, output=tmp_path / "run", **options)
    loaded = Analysis.load(tmp_path / "run").tokens
    pd.testing.assert_frame_equal(_plain(loaded), _plain(whole.tokens))
    assert len(calls) < 2 * 3 + 3
    with pytest.raises(entropylens.EntropyLensError, match="other settings"):
        entropylens.analyze(model, responses, output=tmp_path / "run", progress=False)


def _plain(frame):
    """Without nested columns, whose container parquet changes."""
    lists = [name for name in frame if name.startswith("top_")]
    flat = {name: [str(list(np.round(row, 5))) for row in frame[name]] for name in lists}
    return frame.drop(columns=lists).assign(**flat)


def test_a_quantity_that_is_not_measured(responses):
    with pytest.raises(SettingError, match="no quantity 'normed_nll_layer' in the raw reading"):
        entropylens.analyze(
            tiny_model("llama"), responses, keep_tokens=["normed_nll_layer"], progress=False
        )
    with pytest.raises(SettingError, match="top_tokens is -1"):
        entropylens.analyze(tiny_model("llama"), responses, top_tokens=-1, progress=False)


@pytest.mark.parametrize("batch_tokens", [5, 512])
@pytest.mark.parametrize("reading", ["raw", "normed"])
def test_unasked_a_page_full_is_kept(responses, batch_tokens, reading, monkeypatch):
    monkeypatch.setattr(analysis, "SHOWN", Extent(3, 8))
    settings = {"reading": reading, "batch_tokens": batch_tokens, "progress": False}
    model = tiny_model("llama", torch.float64)
    tokens = entropylens.analyze(model, responses, **settings).tokens
    prefix = "normed_" if reading == "normed" else ""
    names = [f"{prefix}entropy_layer", f"{prefix}delta_layer"]
    full = entropylens.analyze(model, responses, keep_tokens=names, top_tokens=5, **settings).tokens
    kept = full[(full["response_id"] < 3) & (full["position"] <= 8)].reset_index(drop=True)
    pd.testing.assert_frame_equal(_plain(tokens), _plain(kept))
    assert len(tokens) == 4 * (8 + 4 + 1)


@pytest.mark.parametrize("asked", [{"keep_tokens": ()}, {"top_tokens": 0}])
def test_none_are_kept_where_none_are_wanted(responses, tmp_path, asked):
    options = {"output": tmp_path, "progress": False}
    found = entropylens.analyze(tiny_model("llama"), responses, **options, **asked)
    assert found.tokens is None
    assert not (tmp_path / "tokens.parquet").exists()
