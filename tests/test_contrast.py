"""Two analyses against each other: intervals that cover, pairs of prompts, and what is refused."""

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from profiles import three_stages
from tiny import tiny_model, tiny_tokenizer

import entropylens
from entropylens.contrast import ModelContrast, contrast, impact_of
from entropylens.errors import SettingError
from entropylens.resampling import difference, prompt_sums

LINES = [
    {"prompt": f"{place}+{place}=", "response": f"{place} is what it is{'!' * (place % 5)}"}
    for place in range(1, 25)
]


def analyzed(model, lines, **settings):
    return entropylens.analyze(
        model, lines, tokenizer=tiny_tokenizer(), progress=False, top_tokens=0, **settings
    )


@pytest.fixture(scope="module")
def first():
    return analyzed(tiny_model("llama"), LINES)


@pytest.fixture(scope="module")
def second():
    return analyzed(tiny_model("llama", seed=7), LINES)


def test_differences_are_those_of_the_layers(first, second):
    found = contrast(first, second, ("a", "b"))
    assert found.text == "the same responses"
    for name in ("delta_layer", "delta_attn", "delta_ffn"):
        rows = found.frame[found.frame["quantity"] == name]
        expected = second.layers[name] - first.layers[name]
        np.testing.assert_allclose(rows["difference"], expected, atol=1e-9)
        assert (rows["low"] <= rows["difference"]).all()
        assert (rows["difference"] <= rows["high"]).all()
    before, after = first.layers["delta_ffn"], second.layers["delta_ffn"]
    assert found.impact.correlation == pytest.approx(np.corrcoef(before, after)[0, 1])
    turned = (np.flatnonzero(np.sign(before) != np.sign(after)) + 1).tolist()
    assert list(found.impact.turned) == turned


def test_a_model_against_itself_has_no_impact(first):
    found = contrast(first, first)
    assert found.impact.size == pytest.approx(0)
    assert (found.impact.low, found.impact.high) == (0, 0)
    np.testing.assert_array_equal(found.frame[["difference", "low", "high"]], 0)
    assert (found.boundaries["shift"] == 0).all()
    assert ((found.boundaries["low"] <= 0) & (found.boundaries["high"] >= 0)).all()


def test_what_was_read_is_told(first):
    other = [line | {"response": line["response"][::-1]} for line in LINES]
    assert contrast(first, analyzed(tiny_model("llama"), other)).text == (
        "own responses to the same problems"
    )
    fewer = contrast(first, analyzed(tiny_model("llama"), other[:5]))
    assert fewer.text == "own responses to problems of which 5 are shared"
    assert "5 prompts are too few" in fewer.sentences[-1]
    new = [line | {"prompt": "Q: " + line["prompt"]} for line in LINES]
    assert contrast(first, analyzed(tiny_model("llama"), new)).text == (
        "own responses to different problems"
    )
    foreign = replace(first, settings={"tokenizer": "another"})
    assert contrast(first, foreign).sentences[-1].startswith("Their tokenizers differ")
    assert contrast(first, replace(first, settings={})).same_tokenizer is None


def test_a_problem_is_the_same_for_every_tokenizer(first):
    """Prompts that other token ids stand for are drawn together all the same."""
    moved = first.responses.assign(prompt_id=["x" + it for it in first.responses["prompt_id"]])
    moved = moved.assign(response_key="y" + moved["response_key"])
    found = contrast(first, replace(first, responses=moved))
    assert found.text == "own responses to the same problems"
    np.testing.assert_allclose(found.frame[["difference", "low", "high"]], 0, atol=1e-12)


def test_prompts_that_both_have_are_drawn_together(first, second):
    """One of 24 more or less changes an interval a little; unpaired it would be far wider."""
    rows = second.responses
    fewer = replace(second, responses=rows[rows["response_id"] < 23])
    whole, part = (contrast(first, it).frame for it in (second, fewer))
    widths = [(it["high"] - it["low"]).mean() for it in (whole, part)]
    assert widths[1] == pytest.approx(widths[0], rel=0.35)
    assert contrast(first, fewer).text == "own responses to problems of which 23 are shared"


def test_layers_without_an_ffn_are_left_out(first):
    rows = first.responses
    gap = rows.assign(delta_ffn=rows["delta_ffn"].where(rows["layer"] != 2))
    found = contrast(first, replace(first, responses=gap))
    assert found.impact.size == pytest.approx(0)
    assert found.boundaries.empty
    assert "No boundaries: not every layer has an FFN" in found.sentences[1]


def test_one_prompt_gives_no_interval(first):
    rows = first.responses
    alone = replace(first, responses=rows[rows["response_id"] == 0])
    found = contrast(alone, alone)
    assert found.boundaries[["low", "high"]].isna().all(axis=None)
    assert found.frame[["low", "high"]].isna().all(axis=None)
    assert "(" not in found.sentences[1]


def test_models_of_different_depth_have_boundaries_alone(first):
    deep = analyzed(tiny_model("llama", layers=6), LINES)
    found = contrast(first, deep, ("a", "b"))
    assert found.frame.empty
    assert found.impact is None
    assert set(found.boundaries["unit"]) == {"% of depth"}
    assert "of different depth" in found.sentences[0]


def test_other_readings_are_refused(first):
    with pytest.raises(SettingError, match="not measured in the normed reading"):
        contrast(first, first, reading="normed")


def test_it_is_saved(first, second, tmp_path):
    found = contrast(first, second, ("a", "b"))
    found.save(tmp_path)
    loaded = ModelContrast.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.frame, found.frame)
    pd.testing.assert_frame_equal(loaded.boundaries, found.boundaries)
    assert loaded.sentences == found.sentences
    assert loaded.impact == found.impact


def _sums(random, means, shared, own, tokens):
    """Responses to P prompts: layers [L] with prompt effects `shared` [P, L] and noise."""
    prompts, layers = shared.shape
    values = means + shared + own * random.standard_normal((prompts, layers))
    frame = pd.DataFrame(
        {
            "prompt_id": np.repeat(np.arange(prompts), layers),
            "layer": np.tile(np.arange(layers), prompts),
            "num_tokens": np.repeat(tokens, layers),
            "delta_ffn": values.ravel(),
        }
    )
    return prompt_sums(frame, ["delta_ffn"])


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_cover_the_difference(paired):
    random = np.random.default_rng(0)
    layers, prompts, runs = 6, 24, 100
    truth = np.linspace(-0.3, 0.4, layers)
    inside, width, covariant = [], [], []
    for run in range(runs):
        shared = random.standard_normal((prompts, layers))
        other = shared if paired else random.standard_normal((prompts, layers))
        tokens = random.integers(20, 60, prompts)
        one = _sums(random, 0.0, shared, 0.3, tokens)
        two = _sums(random, truth, other, 0.3, tokens, start=0 if paired else prompts)
        found = difference(*_together(one, two), resamples=400, seed=run)
        inside.append((found.low[:, 0] <= truth) & (truth <= found.high[:, 0]))
        width.append((found.high - found.low).mean())
        covariant.append(found.errors.mean())
    # Those of one run are related by their prompts: three standard errors of 100 runs and more.
    assert np.mean(inside) == pytest.approx(0.95, abs=0.04)
    # What prompts have in common cancels; uneven lengths widen the rest a little.
    expected = np.sqrt(2 * (0.09 if paired else 1.09) / prompts)
    assert np.mean(covariant) == pytest.approx(expected, rel=0.2)
    assert np.mean(width) > 2 * np.mean(covariant)


@pytest.mark.parametrize(("away", "common"), [(0.1, 0.0), (0.5, 0.5), (1.0, 0.5)])
@pytest.mark.parametrize("paired", [True, False])
def test_impact_is_found_and_covered(away, common, paired):
    """Prompts move all layers together by `common`, which the layers' own noise does not show."""
    random = np.random.default_rng(1)
    base = three_stages(random)
    step = random.standard_normal(len(base))
    step *= away * np.linalg.norm(base) / np.linalg.norm(step)
    sizes, covered = [], []
    for seed in range(120):
        effects = [
            common * random.standard_normal((24, 1)) + 0.2 * random.standard_normal((24, len(base)))
            for _ in range(2)
        ]
        tokens = random.integers(20, 60, 24)
        one = _sums(random, base, effects[0], 0.2, tokens)
        shared, start = (effects[0], 0) if paired else (effects[1], 24)
        two = _sums(random, base + step, shared, 0.2, tokens, start=start)
        found = impact_of(difference(*_together(one, two), resamples=400, seed=seed), 0)
        sizes.append(found.size)
        covered.append(found.low <= away <= found.high)
    assert np.median(sizes) == pytest.approx(away, rel=0.1)
    # 95 % less three standard errors of 120 runs.
    assert np.mean(covered) >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 120)


def test_impact_of_equal_models_covers_zero():
    random = np.random.default_rng(2)
    base = three_stages(random)
    zero = []
    for seed in range(60):
        shared = 0.3 * random.standard_normal((24, len(base)))
        tokens = random.integers(20, 60, 24)
        pair = [_sums(random, base, shared, 0.2, tokens) for _ in range(2)]
        zero.append(impact_of(difference(*_together(*pair), resamples=400, seed=seed), 0).low == 0)
    assert np.mean(zero) >= 0.9


def _sums(random, means, shared, own, tokens, start=0):
    """Responses to P prompts: layers [L] with prompt effects `shared` [P, L] and noise."""
    prompts, layers = shared.shape
    values = means + shared + own * random.standard_normal((prompts, layers))
    return pd.DataFrame(
        {
            "prompt_id": np.repeat(np.arange(start, start + prompts), layers),
            "layer": np.tile(np.arange(layers), prompts),
            "num_tokens": np.repeat(tokens, layers),
            "delta_ffn": values.ravel(),
        }
    )


def _together(*frames):
    units = sorted(set().union(*(it["prompt_id"] for it in frames)))
    return [prompt_sums(it, ["delta_ffn"], units=units) for it in frames]


# ------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory, first, second, model_directory):
    """Three analyses, the second's model known by its directory, and its answers' file."""
    path = tmp_path_factory.mktemp("saved")
    third = analyzed(tiny_model("llama", layers=6), LINES[:8])
    moved = second.responses.assign(response_key="x" + second.responses["response_key"])
    known = replace(second, model=str(model_directory), responses=moved)
    for name, one in (("a", first), ("b", known), ("c", third)):
        one.save(path / name)
    (path / "a" / "completions.jsonl").write_text("{}")
    return path


def test_compare_writes_a_page_and_tables(entropylens, saved, tmp_path):
    done = entropylens("compare", saved / "a", saved / "b", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "b against a, raw reading, on own responses to the same problems" in words
    hint = re.search(r"On the same responses: entropylens (.*); then name", words)[1]
    assert hint.startswith("analyze")
    assert "--reading raw --dtype float32" in hint
    names = {"comparison.html", "contrast.json", "differences.csv", "boundaries.csv"}
    assert {it.name for it in (tmp_path / "out").iterdir()} == names
    told = json.loads((tmp_path / "out" / "contrast.json").read_text())
    assert told["boundaries"][0]["boundary"] == "last exploring layer"
    page = tmp_path / "out" / "comparison.html"
    page.write_text("a page of someone's own")
    done = entropylens("compare", saved / "b", saved / "a", "-o", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "exists already" in done.stderr
    assert page.read_text() == "a page of someone's own"
    done = entropylens("compare", saved / "b", saved / "a", "-o", tmp_path / "out", "--force")
    assert done.returncode == 0, done.stderr
    assert "a against b" in page.read_text()


def test_the_same_responses_are_had_as_it_says(entropylens, model_directory, tmp_path):
    """Two models answer; the command that is printed reads the first's answers with the second."""
    other = tmp_path / "other"
    tiny_model("llama", seed=7).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    (tmp_path / "problems.jsonl").write_text(
        "".join(json.dumps({"problem": f"{it}+{it}", "answer": "2"}) + "\n" for it in range(4))
    )
    for model, name in ((model_directory, "a"), (other, "b")):
        done = entropylens(
            "analyze", model, "--dataset", tmp_path / "problems.jsonl", "--template", "plain",
            "--max-new-tokens", "6", "-o", tmp_path / name,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    done = entropylens("compare", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "own")
    assert "on own responses to the same problems" in " ".join(done.stdout.split())
    (command,) = re.findall(r"On the same responses: entropylens (.*); then", done.stdout)
    done = entropylens(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    names = [tmp_path / it for it in ("a", "b", "b-same-responses")]
    done = entropylens("compare", *names, "-o", tmp_path / "all", "--json")
    assert done.returncode == 0, done.stderr
    texts = [it["text"] for it in json.loads(done.stdout)]
    assert texts == ["own responses to the same problems", "the same responses"]


def test_compare_of_three_as_json(entropylens, saved, tmp_path):
    names = [saved / it for it in "abc"]
    done = entropylens("compare", *names, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [it["second"] for it in told] == ["b", "c"]
    assert told[0]["impact"]["size"] > 0
    assert told[1]["impact"] is None
    assert len(told[0]["rows"]) == 3 * 4
    assert (tmp_path / "out" / "c" / "contrast.json").is_file()


def test_what_compare_refuses(entropylens, saved, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run" / "config.yaml").write_text("bupo: {layer: 2}\n")
    for arguments, says in (
        ([saved / "a"], "there is one directory"),
        ([saved / "a", saved / "a"], "named twice"),
        ([saved / "a", saved / "b", "--k", "2"], "--k is about evaluations"),
        ([saved / "a", tmp_path / "run"], "not all of one kind"),
        ([saved / "a", tmp_path], "holds no finished result"),
    ):
        done = entropylens("compare", *arguments, "-o", tmp_path / "out")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert says in done.stderr
    assert not (tmp_path / "out").exists()
