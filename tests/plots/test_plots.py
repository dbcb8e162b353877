import dataclasses
import re
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from profiles import VOCAB, analysis
from specimens import collection, run
from test_comparison import drawn as graded
from test_scores import evaluation
from tiny import tiny_model

import entropylens
from entropylens import plots
from entropylens.collection import Collection, load_collection
from entropylens.errors import SettingError, TrainingFilesError
from entropylens.plots import FIGURES, PICTURES
from entropylens.plots.style import STAGE_BARS, model_colors, save


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
        (legend,) = axes.figure.legends
        assert label in [text.get_text() for text in legend.get_texts()]


def named(axes):
    """What a panel's lines show, by their labels."""
    return {line.get_label(): line for line in axes.get_lines()}


def below(figure):
    return figure.get_supxlabel()


@pytest.mark.parametrize("picture", PICTURES, ids=[it.stem for it in PICTURES])
@pytest.mark.parametrize("columns", [None, 1, 2])
def test_every_picture_has_the_width_of_its_page_and_no_global_state(picture, columns):
    before = dict(mpl.rcParams)
    stem, figure = plots.draw(picture.numbers[0], collection("regular"), columns=columns)
    assert stem == picture.stem
    assert dict(mpl.rcParams) == before
    width = figure.get_size_inches()[0]
    assert width == {1: 3.35, 2: 6.9}[columns] if columns else width > 3.35
    if columns == 1:  # nothing is squeezed
        figure.draw_without_rendering()
        panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
        assert min(axes.get_window_extent().width / figure.dpi for axes in panels) > 1.2


def test_ticks_made_at_drawing_have_the_look_of_the_rest():
    _, figure = plots.draw("3", collection("regular"), columns=1)
    figure.draw_without_rendering()
    labels = [it for axes in figure.axes for it in axes.get_xticklabels() + axes.get_yticklabels()]
    assert len(labels) > 20
    (size,) = {label.get_fontsize() for label in labels}
    assert size == pytest.approx(0.85 * 8.8)  # seaborn's "paper", smaller on a page


def test_many_models_stand_in_rows():
    models = [analysis(f"m{place}", [0.5 + place, 0.1, -0.5]) for place in range(5)]
    figure = plots.flow(models)
    figure.draw_without_rendering()
    tops = [round(axes.get_position().y1, 3) for axes in figure.axes]
    assert tops[0] == tops[1] == tops[2] > tops[3] == tops[4]
    assert [axes.get_ylabel() for axes in figure.axes].count("policy entropy (nats)") == 2
    assert len({axes.get_ylim() for axes in figure.axes}) == 1


def test_stages_are_the_bars_of_their_layers():
    (qwen, _) = collection("regular").analyses.values()
    (axes,) = plots.stages([qwen]).axes
    bars = {bar.get_x() + bar.get_width() / 2: bar for bar in axes.patches}
    frame = qwen.layers.set_index("layer")
    assert sorted(map(round, bars)) == list(range(1, 37))
    for place, bar in bars.items():
        layer = round(place)
        assert bar.get_height() == frame["delta_ffn"][layer]
        stage = next(
            name
            for name in STAGE_BARS
            if getattr(qwen.stages, name)[0] <= layer <= getattr(qwen.stages, name)[1]
        )
        assert bar.get_facecolor()[:3] == pytest.approx(to_rgb(STAGE_BARS[stage]["facecolor"]))
        assert bar.get_hatch() == STAGE_BARS[stage].get("hatch")
    ends = np.concatenate([it.get_segments() for it in axes.collections])
    for end, name in ((0, "low"), (1, "high")):
        np.testing.assert_allclose(sorted(ends[:, end, 1]), sorted(frame[f"delta_ffn_{name}"]))


def test_stages_can_be_told_apart_in_grey():
    weights = (0.299, 0.587, 0.114)
    grey = [np.dot(to_rgb(it["facecolor"]), weights) for it in STAGE_BARS.values()]
    assert min(abs(one - other) for one, other in combinations(grey, 2)) > 0.25


def test_dynamics_shows_the_metrics():
    runs = [run("GRPO", steps=30), run("BuPO", 6, internal=5, steps=30)]
    figure = plots.dynamics(runs)
    names = ("bupo/reward", "bupo/entropy_policy", "response_length/mean")
    for axes, name in zip(figure.axes, names, strict=True):
        for one in runs:
            line = named(axes)[one.name]
            np.testing.assert_array_equal(line.get_xdata(), one.metrics["step"])
            np.testing.assert_array_equal(line.get_ydata(), one.metrics[name])
        assert any(list(line.get_xdata()) == [5.5, 5.5] for line in axes.get_lines())
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["GRPO", "BuPO", "internal phase ends"]
    styles = {named(figure.axes[0])[one.name].get_linestyle() for one in runs}
    assert len(styles) == 2  # told apart in grey


def test_long_runs_are_running_means_over_their_steps():
    (one,) = runs = [run("GRPO", steps=100)]
    pale, line = plots.dynamics(runs).axes[0].get_lines()
    reward = one.metrics["bupo/reward"]
    np.testing.assert_array_equal(pale.get_ydata(), reward)
    assert line.get_ydata()[50] == pytest.approx(reward[48:53].mean())


def test_a_metric_that_was_never_finite_is_told():
    one = run("GRPO", steps=9)
    gone = dataclasses.replace(one, metrics=one.metrics.assign(**{"bupo/reward": np.nan}))
    assert below(plots.dynamics([gone])) == "GRPO: reward was never finite."
    assert below(plots.dynamics([one])) == ""
    lacking = dataclasses.replace(one, metrics=one.metrics.drop(columns="response_length/mean"))
    with pytest.raises(TrainingFilesError, match=r"run 'GRPO' has no response_length/mean"):
        plots.dynamics([lacking])


def test_features_shows_the_looks():
    one = run("BuPO", 6, internal=30)
    similarity, delta, perplexity = plots.features([one]).axes[:3]
    shown = [7, 12, 17, 21, 26, 31, 36]
    *lines, end = similarity.get_lines()
    assert len(lines) == len(shown)
    for line, other in zip(lines, shown, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), one.looks["step"])
        np.testing.assert_array_equal(line.get_ydata(), one.looks[f"cos_{other}"])
    assert list(end.get_xdata()) == [30.5, 30.5]
    for axes, name in ((delta, "delta_layer"), (perplexity, "perplexity")):
        np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), one.looks[name])
    assert similarity.get_ylabel() == r"$\cos(H^{6}, H^m)$"


def test_features_without_looks_say_what_to_do():
    runs = [run("BuPO", 6), run("GRPO")]
    with pytest.raises(
        TrainingFilesError, match=r"run 'GRPO' has no looks .* bupo.analyze_every=K"
    ):
        plots.features(runs)
    both = Collection({}, {one.name: one for one in runs}, {}, {})
    assert len(plots.draw("5", both)[1].axes) == 4  # BuPO's row and its scale
    with pytest.raises(TrainingFilesError, match="run 'GRPO' has no looks"):
        plots.draw("5", Collection({}, {"GRPO": runs[1]}, {}, {}))


def test_passing_shows_the_scores_in_percent():
    evaluations = collection("regular").evaluations
    figures = {
        "average": plots.passing(evaluations).axes,
        **dict(
            zip(
                ("amc23", "math500", "aime24", "aime25"),
                plots.passing_each(evaluations).axes,
                strict=True,
            )
        ),
    }
    (figures["average"],) = figures["average"]
    for benchmark, axes in figures.items():
        for (name, one), band in zip(evaluations.items(), axes.collections, strict=True):
            scores = one.scores[one.scores["metric"] == "pass@k"]
            scores = scores[scores["benchmark"] == benchmark]
            line = named(axes)[name]
            np.testing.assert_array_equal(line.get_xdata(), scores["k"].astype(float))
            np.testing.assert_allclose(line.get_ydata(), 100 * scores["value"])
            ends = band.get_paths()[0].get_extents()
            assert ends.y0 == pytest.approx(100 * scores["low"].min())
            assert ends.y1 == pytest.approx(100 * scores["high"].max())
        markers = {line.get_marker() for line in axes.get_lines()}
        assert len(markers) == len(evaluations)  # told apart in grey


def test_passing_of_one_benchmark_is_that_benchmark():
    one = {"GRPO": evaluation(graded("aime24", [0.2, 0.6]))}
    assert plots.passing(one).axes[0].get_title("left") == "AIME24"


def test_different_benchmarks_have_no_average():
    mixed = {
        "GRPO": evaluation(graded("aime24", [0.2, 0.6])),
        "BuPO": evaluation(graded("aime24", [0.2, 0.6]), graded("amc23", [0.5])),
    }
    with pytest.raises(SettingError, match=r"different benchmarks.*draw --figure 11"):
        plots.passing(mixed)
    amc, aime = plots.passing_each(mixed).axes
    assert (len(amc.get_lines()), len(aime.get_lines())) == (1, 2)


def test_trainability_shows_how_well_layers_know_the_text():
    it = collection("regular")
    figure = plots.draw("trainability", it)[1]
    for (model, one), own in zip(
        it.analyses.items(), (figure.axes[:3], figure.axes[3:]), strict=True
    ):
        for axes, name in zip(own, ("nll_layer", "agree_layer"), strict=False):
            np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), one.layers[name])
        level = named(own[0])[r"$\ln V$"].get_ydata()
        assert level == pytest.approx([np.log(VOCAB)] * 2)
        if model in it.probes:
            np.testing.assert_array_equal(
                own[2].get_lines()[-1].get_ydata(), it.probes[model]["cosine"]
            )
        else:
            assert [text.get_text() for text in own[2].texts] == ["no layer probe"]
    assert len(plots.trainability([*it.analyses.values()]).axes) == 4


def test_lines_go_on_over_layers_without_the_module_and_the_figure_says_so():
    (hybrid, _) = collection("gaps").analyses.values()
    attn, ffn = plots.change([hybrid]).axes
    frame = hybrid.layers.set_index("layer")
    for axes, layers, name in ((attn, range(1, 12, 2), "attn"), (ffn, range(2, 13, 2), "ffn")):
        (line,) = [
            it for it in axes.get_lines() if it.get_marker() == "o" and it.get_linestyle() == "-"
        ]
        assert list(line.get_xdata()) == list(layers)
        np.testing.assert_array_equal(line.get_ydata(), frame[f"delta_{name}"][list(layers)])
    told = "Nemotron-H-tiny: no mixer in 6 of 12 layers, no FFN in 6 of 12 layers."
    for draw in (plots.change, plots.flow, plots.cosine):
        assert below(draw([hybrid])) == told
    assert below(plots.stages([hybrid])) == "Nemotron-H-tiny: no FFN in 6 of 12 layers."


def test_what_few_prompts_do_not_show_is_told():
    single = analysis("m", [0.5, -0.5], prompts=1)
    for draw in (plots.change, plots.stages):
        assert below(draw([single])) == "m: no intervals under 3 prompts."
        assert below(draw([analysis("m", [0.5, -0.5], prompts=3)])) == ""


def color_of(axes, name):
    return named(axes)[name].get_color()


def test_a_run_has_one_color_in_all_figures():
    it = collection("regular")
    drawn, _ = plots.everything(it)
    colors = {
        color_of(drawn["figure4_dynamics"].axes[0], "BuPO"),
        drawn["figure5_features"].axes[1].get_lines()[0].get_color(),
        color_of(drawn["figure6_passing"].axes[0], "BuPO"),
        color_of(drawn["figure11_passing"].axes[3], "BuPO"),
    }
    assert len(colors) == 1
    assert colors != {color_of(drawn["figure4_dynamics"].axes[0], "GRPO")}


def test_a_name_has_its_color_without_others():
    names = ["GRPO", "BuPO", "PPO", "RLOO"]
    together = model_colors(names)
    assert len(set(together.values())) == 4
    first = names[0]
    assert model_colors([first]) == {first: together[first]}


def test_figures_that_cannot_be_drawn_say_why():
    it = collection("regular")
    with pytest.raises(SettingError, match=r"no figure '12'.*choose one of 1c, 2, 9, 3, 10"):
        plots.draw("12", it)
    empty = Collection({}, {}, {}, {})
    for picture in PICTURES:
        with pytest.raises(SettingError) as caught:
            plots.draw(picture.stem, empty)
        assert picture.needs in caught.value.cause
        assert picture.hint in caught.value.remedy


def test_everything_is_drawn_that_can_be_and_the_rest_explained():
    it = collection("regular")
    drawn, missing = plots.everything(it)
    assert list(drawn) == [picture.stem for picture in PICTURES]
    assert missing == {}
    runs = {"GRPO": run("GRPO")}
    drawn, missing = plots.everything(Collection(it.analyses, runs, {}, {}))
    assert set(missing) == {"figure5_features", "figure6_passing", "figure11_passing"}
    assert "bupo.analyze_every" in missing["figure5_features"]
    assert missing["figure6_passing"].startswith("entropylens evaluate")
    assert set(drawn) | set(missing) == {picture.stem for picture in PICTURES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories as the commands leave them: an analysis, a run, an evaluation."""
    root = tmp_path_factory.mktemp("saved")
    analysis("a/raw", [0.5, 0.1, -0.5], prompts=4).save(root / "raw")
    analysis("a/normed", [0.5, 0.1, -0.5], prompts=4, reading="normed").save(root / "normed")
    (root / "train" / "layer_probe").mkdir(parents=True)
    run("x", 6, steps=9).metrics.to_json(
        root / "train" / "metrics.jsonl", orient="records", lines=True
    )
    probe = {"layer": [1, 2], "cosine": [0.1, 0.2], "cosine_low": 0.0, "cosine_high": 0.3}
    pd.DataFrame(probe).to_csv(root / "train" / "layer_probe" / "layer_probe.csv", index=False)
    evaluation(graded("aime24", [0.2, 0.6])).save(root / "eval")
    return root


def test_a_collection_is_loaded_from_its_directories(saved):
    it = load_collection([saved / name for name in ("raw", "train", "eval")])
    assert (list(it.analyses), list(it.runs), list(it.evaluations)) == (
        ["raw"],
        ["train"],
        ["eval"],
    )
    assert it.runs["train"].name == "train"
    # Its directory holds no analysis: it belongs to the only one.
    assert it.probes["a/raw"]["cosine"].tolist() == [0.1, 0.2]
    assert load_collection([saved / "train"]).probes == {}


def test_directories_of_one_name_stay_apart(saved, tmp_path):
    other = tmp_path / "train"
    other.mkdir()
    (other / "metrics.jsonl").write_text((saved / "train" / "metrics.jsonl").read_text())
    it = load_collection([saved / "train", other])
    names = [saved.name + "-train", tmp_path.name + "-train"]
    assert [one.name for one in it.runs.values()] == names
    labels = plots.draw("4", it)[1].legends[0].get_texts()
    assert [text.get_text() for text in labels] == names


def test_what_cannot_be_collected_is_refused(saved, tmp_path):
    with pytest.raises(
        SettingError, match=r"different readings \(raw: raw, normed: normed\): analyze all with"
    ):
        load_collection([saved / "raw", saved / "normed"])
    with pytest.raises(SettingError, match="holds no finished result: name directories"):
        load_collection([saved / "raw", tmp_path])
    broken = tmp_path / "broken" / "layer_probe"
    broken.mkdir(parents=True)
    (broken / "layer_probe.csv").write_text("layer,other\n1,2\n")
    with pytest.raises(TrainingFilesError, match=r"cannot be read .*--probe-layers"):
        load_collection([broken.parent])


def test_plot_from_the_command_line_fits_a_column(saved, entropylens, tmp_path):
    done = entropylens("plot", saved / "raw", "--figure", "10", "-o", tmp_path, "--columns", 1)
    assert done.returncode == 0, done.stderr
    png, pdf = (tmp_path / f"figure3_change.{kind}" for kind in ("png", "pdf"))
    assert done.stdout.split() == [str(png), str(pdf)]
    assert int.from_bytes(png.read_bytes()[16:20], "big") == 670  # 3.35 inches of 200 dots
    width = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", pdf.read_bytes())
    assert float(width[1]) == pytest.approx(3.35 * 72)
    assert b"/FontFile2" in pdf.read_bytes()  # embedded, as TrueType


def test_figures_from_the_command_line_says_what_is_missing(saved, entropylens, tmp_path):
    done = entropylens("figures", saved / "raw", saved / "train", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    stems = ("figure1c_stages", "figure2_flow", "figure3_change", "figure4_dynamics",
             "figure8_cosine", "trainability")  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")
    }
    told = dict(line.split(": ")[1:3] for line in done.stderr.splitlines())
    assert set(told) == {
        *("figure5_features", "figure6_passing", "figure11_passing", "table1", "table5"),
    }
    assert told["figure5_features"] == "run 'train' has no looks at a fixed set"
    assert told["table5"] == "run 'train' has no config.yaml"
    (mine,) = tmp_path.glob("figure4*.png")
    mine.write_text("retouched by hand")
    for command in (("figures", saved / "raw", saved / "train"),
                    ("plot", saved / "train", "--figure", "4")):  # fmt: skip
        done = entropylens(*command, "-o", tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "exists already: choose another directory with -o, or pass --force" in done.stderr
    assert mine.read_text() == "retouched by hand"
    assert entropylens(*command, "-o", tmp_path, "--force").returncode == 0
    assert mine.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_figure_ends_in_one_line(saved, entropylens, tmp_path):
    done = entropylens("plot", saved / "eval", "--figure", "2", "-o", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: figure 2 is drawn from analyses, and none is named: make one: "
        "entropylens analyze MODEL -o DIR\n"
    )
    assert not list(tmp_path.iterdir())
