import numpy as np
import pandas as pd
import pytest

from entropylens.resampling import PromptSums, prompt_sums


def draw_sums(random, prompts, layers=1, effect=0.0):
    """Prompts of very different lengths whose means depend on the length."""
    tokens = random.integers(5, 200, prompts).astype(float)
    level = effect + random.standard_exponential((prompts, layers)) + 0.002 * tokens[:, None]
    return PromptSums((level * tokens[:, None])[..., None], tokens)


def test_means_are_ratios_of_sums():
    frame = pd.DataFrame(
        {
            "prompt_id": ["a", "a", "a", "a", "b", "b"],
            "layer": [1, 2, 1, 2, 1, 2],
            "num_tokens": [10, 10, 30, 30, 60, 60],
            "x": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        }
    )
    sums = prompt_sums(frame, ["x"])
    assert sums.tokens.tolist() == [40, 60]
    assert sums.means()[:, 0].tolist() == pytest.approx([4.0, 5.0])


def test_the_standard_error_is_that_of_repeated_studies():
    random = np.random.default_rng(0)
    studies = [draw_sums(random, 60) for _ in range(3000)]
    truth = np.std([study.means()[0, 0] for study in studies])
    said = np.mean([study.standard_errors()[0, 0] for study in studies])
    assert said == pytest.approx(truth, rel=0.06)


@pytest.mark.parametrize(("prompts", "least"), [(8, 0.89), (24, 0.92)])
def test_intervals_cover(prompts, least):
    """The percentile bootstrap reaches 86 % at 8 prompts and 91 % at 24."""
    random = np.random.default_rng(1)
    everything = draw_sums(random, 2_000_000)
    truth = everything.means()[0, 0]
    hits = 0
    for seed in range(600):
        low, high = draw_sums(random, prompts).draw(400, seed).studentised()
        hits += low[0, 0] <= truth <= high[0, 0]
    assert hits / 600 >= least


def test_simultaneous_intervals_cover_all_layers_at_once():
    random = np.random.default_rng(2)
    truth = draw_sums(random, 2_000_000).means()[0, 0]
    hits = 0
    for seed in range(200):
        spread = draw_sums(random, 40, layers=12).draw(400, seed)
        low, high = spread.studentised(simultaneous=True)
        hits += bool(((low <= truth) & (truth <= high)).all())
    assert hits / 200 >= 0.9


def test_one_or_two_prompts_have_no_interval():
    for prompts in (1, 2):
        sums = draw_sums(np.random.default_rng(3), prompts)
        low, high = sums.draw(50, 0).studentised()
        assert np.isnan(low).all()
        assert np.isnan(high).all()
        assert np.isnan(sums.standard_errors()).all() == (prompts == 1)


def test_a_constant_has_an_interval_of_no_width():
    sums = PromptSums(np.full((5, 1, 1), 20.0), np.full(5, 10.0))
    low, high = sums.draw(50, 0).studentised()
    assert low[0, 0] == pytest.approx(2.0)
    assert high[0, 0] == pytest.approx(2.0)
