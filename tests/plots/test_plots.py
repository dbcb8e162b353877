import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny import tiny_model

import entropylens
from entropylens.plots import FIGURES
from entropylens.plots.style import save
from entropylens.report import report_page


@pytest.fixture(scope="module")
def analyses():
    lines = [{"prompt_ids": [i, 5], "response_ids": [7, i, 9]} for i in range(2, 8)]
    return {
        reading: entropylens.analyze(tiny_model("llama"), lines, reading=reading, progress=False)
        for reading in ("raw", "normed")
    }


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("reading", ["raw", "normed"])
def test_every_figure_is_drawn_and_saved(analyses, name, reading, tmp_path):
    before = dict(mpl.rcParams)
    figure = FIGURES[name]([analyses[reading]])
    assert isinstance(figure, Figure)
    png, pdf = save(figure, tmp_path / name)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert dict(mpl.rcParams) == before


def drawn(axes):
    return [line.get_ydata() for line in axes.get_lines()]


def test_the_pictures_show_the_numbers(analyses):
    analysis = analyses["raw"]
    frame = analysis.layers
    attn, ffn = analysis.plot.change().axes
    for axes, module in ((attn, "attn"), (ffn, "ffn")):
        for name in (f"delta_{module}", f"control_delta_{module}"):
            assert any(np.array_equal(line, frame[name]) for line in drawn(axes))
    (axes,) = analysis.plot.flow().axes
    assert any(np.array_equal(line[1:], frame["entropy_layer"]) for line in drawn(axes)[1:2])
    assert any(np.array_equal(line, [analysis.policy_entropy]) for line in drawn(axes))
    (axes,) = analysis.plot.cosine().axes
    assert any(np.array_equal(line, frame["cos_ffn"]) for line in drawn(axes))


def test_models_stand_side_by_side(analyses):
    figure = FIGURES["figure3_change"]([analyses["raw"]] * 3)
    assert len(figure.axes) == 6


def test_the_report_is_self_contained(analyses):
    pictures = {name: draw([analyses["raw"]]) for name, draw in FIGURES.items()}
    page = report_page(analyses["raw"], pictures)
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert 'src="http' not in page
    assert "href" not in page
    assert "Train first (raw reading)" in page


@pytest.mark.parametrize(
    ("family", "label", "layers"),
    [("qwen3_next", "linear attention", [1, 3]), ("nemotron_h", "state space mixer", [1])],
)
def test_mixers_that_are_no_attention_are_marked(family, label, layers):
    lines = [{"prompt_ids": [i, 5], "response_ids": [7, i, 9]} for i in range(2, 8)]
    analysis = entropylens.analyze(tiny_model(family), lines, progress=False)
    for name, column, shift in (
        ("figure3_change", "delta_attn", 0), ("figure8_cosine", "cos_attn", 0),
        ("figure2_flow", "entropy_attn", 2 / 3),
    ):  # fmt: skip
        axes = FIGURES[name]([analysis]).axes[0]
        (marks,) = [line for line in axes.get_lines() if line.get_label() == label]
        np.testing.assert_allclose(marks.get_xdata(), np.array(layers) - shift)
        there = analysis.layers.set_index("layer")[column][layers]
        np.testing.assert_allclose(marks.get_ydata(), there)
        assert marks.get_markerfacecolor() == "white"
        assert label in [text.get_text() for text in axes.get_legend().get_texts()]
