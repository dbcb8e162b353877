import math

import numpy as np
import pytest
from profiles import block, isolated, negative, positive, ramp, studied, three_stages, weak_llama

from entropylens.profile import Profile
from entropylens.recommend import paper_rule_layer, recommend
from entropylens.resampling import PromptSums


def answer(profile, **options):
    return recommend(Profile(means=profile), **options)


@pytest.mark.parametrize(
    ("make", "layer", "applies"),
    [
        (three_stages, 6, "yes"),
        (lambda r: three_stages(r, plunge=30), 6, "yes"),
        (lambda r: weak_llama(r, 28), 27, "weakly"),
        (lambda r: weak_llama(r, 32), 31, "weakly"),
        (negative, None, "no"),
        (positive, 23, "no"),
        (isolated, 6, "weakly"),
        (block, 8, "weakly"),
    ],
)
def test_the_cases_come_out_in_95_of_100_draws(make, layer, applies, monkeypatch):
    monkeypatch.setattr("entropylens.recommend._prompts_needed", lambda *_arguments: None)
    random = np.random.default_rng(9)
    found = [recommend(studied(random, make(random)), resamples=60) for _ in range(100)]
    assert np.mean([one.layer == layer for one in found]) >= 0.95
    assert np.mean([one.applies == applies for one in found]) >= 0.95


@pytest.mark.parametrize("bottom", [-1, -0.3])
def test_a_ramp_has_no_boundary(bottom):
    random = np.random.default_rng(0)
    found = recommend(studied(random, ramp(random, -bottom, bottom)))
    assert found.stability < 0.5
    assert found.applies == "weakly"
    assert "no boundary stands out" in found.reason


def test_never_the_final_layer():
    for layers in (2, 3, 5, 24):
        found = answer(np.full(layers, 1.0))
        assert found.layer == layers - 1
        assert found.applies == "no"
        assert "penultimate policy collapsed" in found.reason
        assert "exploration without end" in found.reason
    assert answer(np.array([1.0])).layer is None


def test_positive_everywhere_is_stable():
    found = recommend(studied(np.random.default_rng(0), positive(np.random.default_rng(1))))
    assert found.layer == 23
    assert found.stability >= 0.9


def test_the_literal_rule_is_always_there():
    random = np.random.default_rng(3)
    profile = isolated(random)
    found = answer(profile)
    assert (found.layer, found.paper_rule_layer) == (6, 32)
    assert "names layer 32" in found.reason
    literal = answer(profile, rule="paper")
    assert (literal.layer, literal.rule) == (32, "paper")
    assert literal.stages == found.stages
    assert literal.reason.startswith("Layer 32 is the last below L")
    assert paper_rule_layer(np.array([-1.0, -1.0, 5.0])) is None


def test_sensitivity_is_the_range_of_the_bound():
    profile = np.array([1.0, 0.8, 0.02, -0.03, 0.04, -0.02, -1.0, -2.0])
    found = answer(profile)
    assert found.layer == 2
    assert found.sensitivity == pytest.approx((0.04, 0.8))
    for bound in (0.041, 0.79):
        assert paper_rule_layer(profile, bound) == 2
    for bound in (0.039, 0.81):
        assert paper_rule_layer(profile, bound) != 2
    assert answer(-np.ones(5)).sensitivity == (0.0, math.inf)
    assert answer(-np.ones(5)).to_dict()["sensitivity"] == [0.0, None]


def test_a_boundary_that_the_data_cannot_tell_names_both():
    random = np.random.default_rng(4)
    truth = three_stages(random, noise=0.05)
    truth[:6], truth[6] = [1.1, 0.9, 1.2, 0.8, 1.0, 0.9], 0.3
    found = recommend(studied(random, truth, prompts=24, spread=0.6))
    named = {found.layer} | {other.layer for other in found.alternatives}
    assert {6, 7} <= named
    assert found.stability < 0.9
    assert "do not settle it" in found.reason
    shares = found.stability + sum(other.share for other in found.alternatives)
    assert shares == pytest.approx(1.0, abs=0.1)
    assert found.to_frame()["chosen"].sum() == 1


def test_norm_effects_are_said():
    random = np.random.default_rng(5)
    truth = three_stages(random)
    effect = recommend(studied(random, truth, control=truth * 1.02))
    assert "norm effect" in effect.reason
    assert effect.applies == "weakly"
    own = recommend(studied(random, truth, control=random.normal(0, 0.05, 36)))
    assert "norm effect" not in own.reason
    assert own.applies == "yes"
    assert "on what is left the rule names layer 6, too" in own.reason


def test_too_few_prompts_are_said_with_how_many_would_do():
    random = np.random.default_rng(6)
    few = recommend(studied(random, three_stages(random), prompts=5))
    assert "Too few prompts: 5" in few.reason
    assert few.prompts_needed >= 20
    one = recommend(studied(random, three_stages(random), prompts=1))
    assert one.stability is None
    assert "at least 20" in one.reason
    noisy = recommend(studied(random, three_stages(random), prompts=24, spread=4.0))
    assert noisy.stability < 0.9
    assert noisy.prompts_needed > 24
    assert f"about {noisy.prompts_needed} would do" in noisy.reason
    many = recommend(studied(random, three_stages(random), prompts=200, spread=0.1))
    assert many.prompts_needed is None


def test_samples_of_a_prompt_are_no_independent_data():
    random = np.random.default_rng(7)
    seen = studied(random, three_stages(random), prompts=12)
    doubled = PromptSums(seen.sums.sums * 5, seen.sums.tokens * 5)
    assert Profile(seen.means, doubled).errors() == pytest.approx(
        Profile(seen.means, seen.sums).errors()
    )


def test_stability_is_calibrated(monkeypatch):
    """Over 1,000 studies, answers said to be stable are right in at least 88 %."""
    monkeypatch.setattr("entropylens.recommend._prompts_needed", lambda *_arguments: None)
    random = np.random.default_rng(8)
    right = []
    for _ in range(1000):
        layers = int(random.integers(12, 37))
        b1 = int(random.integers(0, layers // 2))
        b2 = int(random.integers(b1, layers))
        noise = float(random.choice([0.02, 0.05, 0.1]))
        truth = three_stages(random, b1, b2, layers, noise)
        prompts = int(random.choice([8, 24, 60]))
        spread = float(random.choice([0.1, 0.5, 2.0]))
        found = recommend(studied(random, truth, prompts, spread), resamples=40)
        if found.stability >= 0.9:
            right.append(found.layer == (b1 or None))
    assert len(right) >= 200
    assert np.mean(right) >= 0.88


@pytest.mark.parametrize(
    ("missing", "says", "literal"), [([1, 3], "not every layer ([1, 3] not)", 2),
                                     ([1, 2, 3, 4], "no layer has an FFN", None)]
)  # fmt: skip
def test_layers_without_an_ffn_leave_the_rule_nothing_to_say(missing, says, literal):
    profile = np.array([1.0, 0.5, 0.2, -1.0])
    profile[np.array(missing) - 1] = np.nan
    found = answer(profile)
    assert (found.layer, found.applies, found.stability) == (None, "no", None)
    assert found.paper_rule_layer == literal
    assert says in found.reason
    assert found.stages.of(1) is None
