import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import isolated, negative, three_stages, weak_llama

from entropylens.stages import cut_weights, stages_of

ERROR = 1e-3


def cuts(weights):
    return np.stack([weights.sum(2).argmax(1), weights.sum(1).argmax(1)], axis=1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda r: three_stages(r), (6, 26)),
        (lambda r: three_stages(r, noise=0.1), (6, 26)),
        (lambda r: three_stages(r, plunge=30), (6, 26)),
        (lambda r: three_stages(r, noise=0.1, plunge=30), (6, 26)),
        (isolated, (6, 26)),
        (lambda r: weak_llama(r, 28), (27, 27)),
        (lambda r: weak_llama(r, 32), (31, 31)),
        (negative, (0, 0)),
    ],
)
def test_boundaries_come_out_in_95_of_100_draws(make, expected):
    random = np.random.default_rng(5)
    profiles = np.stack([make(random) for _ in range(200)])
    found = cuts(cut_weights(profiles, np.full(profiles.shape[1], ERROR)))
    assert np.mean((found == expected).all(axis=1)) >= 0.95


@settings(max_examples=50, deadline=None)
@given(
    profile=st.lists(st.floats(-12, 12, allow_nan=False), min_size=1, max_size=40),
    error=st.floats(1e-6, 1.0),
)
def test_weights_are_probabilities_of_ordered_cuts(profile, error):
    weights = cut_weights(np.array([profile]), np.full(len(profile), error))[0]
    assert weights.sum() == pytest.approx(1.0)
    assert (np.tril(weights, -1) == 0).all()
    assert (weights >= 0).all()


def test_resamples_are_independent():
    random = np.random.default_rng(1)
    profiles = np.stack([three_stages(random) for _ in range(3)])
    together = cut_weights(profiles, np.full(36, ERROR))
    for place, profile in enumerate(profiles):
        np.testing.assert_allclose(
            together[place], cut_weights(profile, np.full(36, ERROR))[0], atol=1e-12
        )


def test_a_layer_between_two_stages_splits_the_weight():
    random = np.random.default_rng(2)
    profile = three_stages(random, noise=0.1)
    profile[:6], profile[6] = [1.4, 1.1, 0.9, 1.0, 0.6, 0.7], 0.25
    share = cut_weights(profile, np.full(36, ERROR))[0].sum(1)
    assert share[6] > 0.1
    assert share[7] > 0.1
    assert share[6] + share[7] > 0.9


def test_a_large_error_hides_a_small_change():
    profile = np.concatenate([np.full(6, 1.0), [0.3], np.tile([0.02, -0.02], 8), np.full(8, -1.0)])
    sure = cut_weights(profile, np.full(len(profile), 0.01))[0].sum(1)
    unsure = cut_weights(profile, np.full(len(profile), 0.3))[0].sum(1)
    assert sure[7] > 0.5
    assert unsure[7] < sure[7]


def test_stages_as_spans():
    stages = stages_of(6, 26, 36)
    assert stages.to_dict() == {
        "exploration": [[1, 6]], "integration": [[7, 26]], "convergence": [[27, 36]]
    }  # fmt: skip
    assert [stages.of(layer) for layer in (6, 7, 27)] == [
        "exploration", "integration", "convergence"
    ]  # fmt: skip
    assert stages_of(0, 0, 5).to_dict()["exploration"] == []
    assert stages.of(37) is None
