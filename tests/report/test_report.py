"""The page as a file: whole, self-contained, small enough, and escaped."""

import base64
import gzip
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from profiles import analysis, three_stages, weak_llama
from tiny import tiny_model, tiny_tokenizer

import entropylens
from entropylens.contrast import contrast
from entropylens.report import report_page
from entropylens.report.comparison import comparison_page


def held(page):
    """What the page's script unpacks."""
    packed = re.search(r'id="held">([^<]*)<', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def traces(page, chart):
    return {it.get("meta"): it for it in held(page)["charts"][chart]["data"]}


@pytest.fixture(scope="module")
def made():
    return analysis("made/model", three_stages(np.random.default_rng(0)), reading="both")


def test_nothing_is_loaded(made):
    page = report_page(made)
    plain = re.sub(r'<script type="text/plain"[^>]*>[^<]*</script>', "", page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", plain.replace("// ", ""))
    assert re.findall(r'href="(?!#|data:)', plain) == []
    assert "default-src 'none'" in plain


def test_the_charts_hold_the_numbers(made):
    page = report_page(made)
    frame = made.layers
    for chart, columns in {
        "change": ("delta_attn", "delta_ffn", "control_delta_ffn"),
        "normed_change": ("normed_delta_ffn",),
        "flow": ("entropy_attn", "entropy_ffn"),
        "cosine": ("cos_attn", "cos_ffn"),
        "trainability": ("nll_layer", "agree_layer"),
        "scale": ("rms_layer", "rms_attn", "rms_ffn"),
    }.items():
        found = traces(page, chart)
        for column in columns:
            assert found[column]["customdata"] == frame["layer"].tolist()
            np.testing.assert_allclose(found[column]["y"], frame[column])
    assert held(page)["files"]["layers.csv"] == frame.to_csv(index=False)


def test_what_a_layer_lacks_is_a_gap():
    lacking = analysis(
        "gaps", three_stages(np.random.default_rng(0), 3, 8, 12), without_ffn=[2, 4],
        mixers=["ssm", "none", "attention"] * 4,
    )  # fmt: skip
    found = traces(report_page(lacking), "change")
    assert [place for place, it in enumerate(found["delta_ffn"]["y"], 1) if it is None] == [2, 4]
    assert found["delta_attn"]["y"][1] is None
    assert found["delta_attn"]["text"][:3] == ["layer 1, state space mixer", "layer 2", "layer 3"]


def test_one_layer_and_one_response_make_a_page():
    for few in (
        analysis("one", [0.5]),
        analysis("one", three_stages(np.random.default_rng(0)), prompts=1),
    ):
        page = report_page(few)
        assert held(page)["views"] == []
        assert "kept no tokens" in page


def test_text_is_escaped(made):
    page = report_page(replace(made, model="<script>alert(1)</script>"))
    assert "<script>alert" not in page


def test_every_setting_and_version_is_told():
    found = entropylens.analyze(
        tiny_model("llama"), [{"prompt": "1+1=", "response": "2, I say"}],
        tokenizer=tiny_tokenizer(), progress=False,
    )  # fmt: skip
    page = report_page(found)
    assert found.settings["device"] == "cpu"
    facts = found.to_dict()
    told = {name: facts[name] for name in ("reading", "kernel", "seed", "dtype", "num_prompts")}
    for name, value in (told | found.settings | found.versions).items():
        text = value if isinstance(value, str) else json.dumps(value)
        assert f"<dt>{name}</dt><dd>{text}</dd>" in page
    assert len(held(page)["views"]) == 1


def test_the_largest_stays_under_6_megabytes():
    """80 layers, 3 responses of 256 tokens with 5 top tokens each, both readings."""
    random = np.random.default_rng(0)
    large = analysis("large", three_stages(random, 14, 58, 80), reading="both")
    words = np.array(["".join(random.choice(list("abcdefghij "), 6)) for _ in range(5000)])
    rows = 3 * 256 * 80
    tokens = pd.DataFrame(
        {
            "response_id": np.repeat([0, 1, 2], 256 * 80),
            "position": np.tile(np.repeat(np.arange(1, 257), 80), 3),
            "layer": np.tile(np.arange(1, 81), 3 * 256),
            "token_id": np.repeat(random.integers(0, 5000, 3 * 256), 80),
        }
    )
    tops = random.integers(0, 5000, (rows, 5))
    tokens["token"] = words[tokens["token_id"]]
    tokens["entropy_layer"] = random.uniform(0, 11, rows)
    tokens["delta_layer"] = random.normal(0, 1, rows)
    tokens["top_token_ids"], tokens["top_tokens"] = list(tops), list(words[tops])
    tokens["top_probs"] = list(random.dirichlet(np.ones(5), rows))
    tokens["rank"] = random.integers(1, 5000, rows)
    page = report_page(replace(large, tokens=tokens))
    views = held(page)["views"]
    assert len(views) == 3
    assert (
        "its first 128 of 256 tokens" in views[0]
    )  # text as random as this leaves no room for 256
    assert len(page.encode()) < 6e6


def test_several_models_make_one_page():
    random = np.random.default_rng(0)
    models = {
        "one": analysis("one", three_stages(random)),
        "two": analysis("two", three_stages(random, 8), seed=1),
        "short": analysis("short", weak_llama(random, 28)),
    }
    contrasts = [contrast(models["one"], models[it], ("one", it)) for it in ("two", "short")]
    page = comparison_page(models, contrasts)
    rows = contrasts[0].frame
    rows = rows[rows["quantity"] == "delta_ffn"]
    found = traces(page, "difference")["two - one delta_ffn"]
    np.testing.assert_allclose(found["y"], rows["difference"])
    change = traces(page, "change")
    np.testing.assert_allclose(change["two delta_ffn"]["y"], models["two"].layers["delta_ffn"])
    assert max(change["short delta_ffn"]["x"]) == 1  # depths differ: shares of depth
    for one in contrasts:
        assert one.sentences[0].replace("'", "&#x27;") in page
    assert "of different depth" in page
    files = held(page)["files"]
    assert files["layers.csv"].count("\n") == 1 + 36 + 36 + 28
