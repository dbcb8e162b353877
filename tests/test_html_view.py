"""What a notebook shows: the numbers, and nothing from elsewhere."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer

import entropylens
from entropylens.doubts import BOUNDS
from entropylens.errors import SettingError
from entropylens.html_view import spark_line, stage_bar
from entropylens.recommend import paper_rule_layer
from entropylens.stages import stages_of
from entropylens.token_view import token_view

LINES = [
    {"prompt": f"{place}+{task}=", "response": f"{place} {task}!", "task": task}
    for place in range(1, 5)
    for task in "ab"
]
VOID = {"br", "line", "polyline", "circle", "rect", "img", "meta", "input"}


@pytest.fixture(scope="module")
def analysis():
    return entropylens.analyze(
        tiny_model("llama"), LINES, tokenizer=tiny_tokenizer(), reading="both",
        keep_tokens=["entropy_layer", "delta_ffn"], top_tokens=5, progress=False,
    )  # fmt: skip


class Checked(HTMLParser):
    """Every element is closed in its order, and nothing is loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append(dict(attrs))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass


def test_an_analysis_shows_itself(analysis):
    page = analysis._repr_html_()
    Checked(page)
    assert "Train first (raw reading)" in page
    assert "Train first (normed reading)" in page
    told = "; ".join(
        f"{place}: {value:.4g}" for place, value in enumerate(analysis.layers["delta_ffn"], 1)
    )
    assert told in page
    assert html.escape(analysis.recommendation.reason) in page
    assert page.count("<svg") == 10


def test_a_recommendation_shows_itself(analysis):
    page = analysis.recommendation._repr_html_()
    Checked(page)
    assert f"applies: {analysis.recommendation.applies}" in page


def test_what_would_change(analysis):
    frame = analysis.what_would_change()
    assert frame["choice"].unique().tolist() == ["rule", "bound", "reading", "task", "prompts"]
    given = analysis.recommendation.layer
    layers = frame["layer"].astype(object)
    frame["answer"] = layers.where(~frame["layer"].isna(), None)
    assert frame["same"].tolist() == [it == given for it in frame["answer"]]
    means = analysis.layers["delta_ffn"].to_numpy()
    bounds = frame[frame["choice"] == "bound"]["answer"].tolist()
    assert bounds == [paper_rule_layer(means, bound) for bound in BOUNDS]
    tasks = frame[frame["choice"] == "task"]
    assert tasks["value"].tolist() == ["a", "b"]
    normed = frame[frame["choice"] == "reading"].iloc[0]
    assert normed["answer"] == analysis.recommendations["normed"].layer
    count = analysis.num_prompts
    assert frame[frame["choice"] == "prompts"]["value"].tolist() == [
        f"the first {part}" for part in (count // 4, count // 2) if part >= 3
    ]


def test_no_layer_is_said(analysis):
    responses = analysis.responses.assign(delta_ffn=-1 - analysis.responses["delta_ffn"].abs())
    page = replace(analysis, reading="raw", responses=responses)._repr_html_()
    assert "no layer" in page
    assert ">none</td>" in page


def test_spark_lines_have_gaps_where_nothing_is():
    line = spark_line([1.0, 2.0, float("nan"), 4.0, -1.0])
    assert line.count("<polyline") == 2
    assert line.count("<line") == 1
    assert spark_line([float("nan")]) == ""
    assert "<circle" in spark_line([3.0])


def test_stage_bars_name_their_layers():
    bar = stage_bar(stages_of(2, 5, 8), 8)
    assert "exploration: layers 1 to 2" in bar
    assert "convergence: layers 6 to 8" in bar
    assert stage_bar(stages_of(0, 0, 8), 8).count("<rect") == 1


@pytest.mark.parametrize("quantity", [None, "delta_ffn", "top_token"])
def test_the_token_view_tells_the_kept_numbers(analysis, quantity):
    page = token_view(analysis, 2, quantity)
    cells = Checked(page).cells
    assert f'value="{quantity or "entropy_layer"}" checked>' in page
    tokens = analysis.tokens
    frame = tokens[tokens["response_id"] == tokens["response_id"].unique()[1]]
    assert len(cells) == len(frame)
    row = frame[(frame["layer"] == frame["layer"].max()) & (frame["position"] == 1)].iloc[0]
    told = cells[0]["title"].split("\n")
    assert told[0] == f"layer {row['layer']}, position 1: {row['token']!r}"
    assert f"entropy_layer {row['entropy_layer']:.4g}" in told
    assert f"1. {row['top_tokens'][0]!r} {row['top_probs'][0]:.3f}" in told
    assert told[-1] == f"rank of the produced token: {row['rank']}"


def test_darker_is_more(analysis):
    page = token_view(analysis, 1, "entropy_layer")
    cells = Checked(page).cells
    value = [float(re.search(r"entropy_layer (\S+)", it["title"])[1]) for it in cells]
    shade = [it["class"].split()[0] for it in cells]
    letter = shade[0][0]
    assert shade[int(np.argmin(value))] == f"{letter}0"
    assert shade[int(np.argmax(value))] == f"{letter}8"
    chosen = '.token-view:has(input[value="entropy_layer"]:checked)'
    assert f"{chosen} .{letter}0{{background:#fee838}}" in page
    assert f"{chosen} .{letter}8{{background:#00224e;color:#fff}}" in page


def test_a_change_is_coloured_by_its_sign(analysis):
    page = token_view(analysis, 1, "delta_ffn")
    for cell in Checked(page).cells:
        value = float(re.search(r"delta_ffn (\S+)", cell["title"])[1])
        step = int(cell["class"].split()[1][1])
        assert (step - 4) * value >= 0  # the middle one of nine is about zero


def test_text_is_escaped():
    lines = [{"prompt": "1", "response": "<b>&\n<i>"}, *LINES]
    found = entropylens.analyze(
        tiny_model("llama"), lines, tokenizer=tiny_tokenizer(), top_tokens=2, progress=False
    )
    page = token_view(found, 1)
    Checked(page)
    assert "<th>&lt;</th>" in page
    assert "<b>" not in page
    assert "<th>\u21b5</th>" in page


def test_what_cannot_be_shown(analysis):
    with pytest.raises(SettingError, match="kept no tokens"):
        replace(analysis, tokens=None).token_view()
    with pytest.raises(SettingError, match="no response 9"):
        analysis.token_view(9)
    with pytest.raises(SettingError, match="'cos_ffn' was not kept"):
        analysis.token_view(1, "cos_ffn")
    assert analysis.token_view()._repr_html_().startswith("<div")
