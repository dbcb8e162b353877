"""Two analyses against each other: intervals that cover, pairs of prompts, and what is refused."""

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
        "own responses to the same prompts"
    )
    fewer = contrast(first, analyzed(tiny_model("llama"), other[:5]))
    assert fewer.text == "own responses to different prompts"
    assert "5 prompts are too few" in fewer.sentences[-1]
    foreign = replace(first, settings={"tokenizer": "another"})
    assert contrast(first, foreign).sentences[-1].startswith("Their tokenizers differ")
    assert contrast(first, replace(first, settings={})).same_tokenizer is None


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
        two = _sums(random, truth, other, 0.3, tokens)
        found = difference(one, two, paired=paired, resamples=400, seed=run)
        inside.append((found.low[:, 0] <= truth) & (truth <= found.high[:, 0]))
        width.append((found.high - found.low).mean())
        covariant.append(found.errors.mean())
    # Those of one run are related by their prompts: three standard errors of 100 runs and more.
    assert np.mean(inside) == pytest.approx(0.95, abs=0.04)
    # What prompts have in common cancels; uneven lengths widen the rest a little.
    expected = np.sqrt(2 * (0.09 if paired else 1.09) / prompts)
    assert np.mean(covariant) == pytest.approx(expected, rel=0.2)
    assert np.mean(width) > 2 * np.mean(covariant)


def test_impact_is_without_the_noise():
    """Of equal models it covers 0; of a model 10 % away it finds 10 %."""
    random = np.random.default_rng(1)
    base = three_stages(random)
    step = random.standard_normal(len(base))
    step *= 0.1 * np.linalg.norm(base) / np.linalg.norm(step)
    zero, sizes, covered = [], [], []
    for seed in range(60):
        shared = 0.3 * random.standard_normal((24, len(base)))
        tokens = random.integers(20, 60, 24)
        one, same, far = (
            _sums(random, base + move, shared, 0.2, tokens) for move in (0.0, 0.0, step)
        )
        found = [difference(one, it, paired=True, resamples=400, seed=seed) for it in (same, far)]
        none, some = (impact_of(one.means(), it, 0) for it in found)
        zero.append(none.low == 0)
        sizes.append(some.size)
        covered.append(some.low <= 0.1 <= some.high)
    assert np.mean(zero) >= 0.9
    assert np.median(sizes) == pytest.approx(0.1, rel=0.15)
    assert np.mean(covered) >= 0.85
