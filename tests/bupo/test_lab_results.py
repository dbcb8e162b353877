import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from bupo.lab.arms import Arm
from bupo.lab.jobs import Job
from bupo.lab.questions import calibration, collapses, cost, layers, ranking, similarity
from bupo.lab.results import AVERAGE, contrast, contrasts, curves, in_common, mean_run, outcomes
from bupo.lab.run import HELD_OUT, Course, config_of
from bupo.layer_probe import LayerProbe
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats


def frame(**arms):
    """Outcomes: values by (start, seed), in that order of two starts."""
    rows = []
    for name, values in arms.items():
        for place, value in enumerate(values):
            start = f"start{1 + place % 2}"
            rows.append({"arm": name, "start": start, "seed": place // 2, AVERAGE: value})
    return pd.DataFrame(rows)


def test_a_contrast_is_a_paired_t_test():
    first, second = [0.6, 0.7, 0.5, 0.65], [0.55, 0.72, 0.4, 0.6]
    found = contrast(frame(a=first, b=second), "a", "b")
    expected = stats.ttest_rel(first, second)
    assert (found.pairs, found.p) == (4, pytest.approx(expected.pvalue))
    low, high = expected.confidence_interval(0.95)
    assert found.difference - found.half_width == pytest.approx(low)
    assert found.difference + found.half_width == pytest.approx(high)


def test_pairs_are_those_that_both_have_whatever_their_order():
    whole = frame(a=[0.6, 0.7, 0.5, 0.65], b=[0.5, 0.5])
    found = contrast(whole.sample(frac=1, random_state=0), "a", "b")
    assert (found.pairs, found.difference) == (2, pytest.approx(0.15))


@pytest.mark.parametrize("count", [1, 2])
def test_few_pairs_have_a_difference_and_no_interval(count):
    found = contrast(frame(a=[0.6] * count, b=[0.5] * count), "a", "b")
    assert found.difference == pytest.approx(0.1)
    assert math.isnan(found.half_width)
    assert not found.shown


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=2, max_size=6))
def test_holm_is_at_least_p_and_at_most_bonferroni_and_keeps_the_order(values):
    base = [0.1, 0.2, 0.3, 0.45]
    arms = {f"a{n}": it for n, it in enumerate(values)}
    found = contrasts(frame(b=base, **arms), [(name, "b", AVERAGE) for name in arms])
    assert (found["p_holm"] >= found["p"] - 1e-15).all()
    assert (found["p_holm"] <= (found["p"] * len(found)).clip(upper=1) + 1e-15).all()
    ordered = found.sort_values(["p", "p_holm"])
    assert ordered["p_holm"].is_monotonic_increasing


def test_holm_by_hand():
    arms = {"a": [0.5, 0.7, 0.62, 0.66], "c": [0.11, 0.19, 0.32, 0.41]}
    found = contrasts(
        frame(b=[0.1, 0.2, 0.3, 0.45], **arms), [("a", "b", AVERAGE), ("c", "b", AVERAGE)]
    ).set_index("arm")
    small, large = found.loc["a"], found.loc["c"]
    assert small["p"] < large["p"]
    assert small["p_holm"] == pytest.approx(2 * small["p"])
    assert large["p_holm"] == pytest.approx(max(large["p"], 2 * small["p"]))


@pytest.fixture
def jobs(tmp_path):
    """Two finished runs of an arm and an unfinished one."""
    arm, found = Arm("BuPO", layer=1, internal_steps=2, internal=True), []
    for seed in (1, 2, 3):
        directory = tmp_path / f"seed{seed}"
        directory.mkdir()
        steps = [{"step": 0, HELD_OUT: 0.5}]
        steps += [
            {"step": it, "bupo/reward": seed / it, "bupo/internal_phase": float(it <= 2)}
            for it in (1, 2, 3)
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(it) + "\n" for it in steps))
        if seed < 3:
            (directory / "config.yaml").write_text(config_of(arm, Course(), seed, 1))
            told = {"split": "test", "samples": 4, "right": [0, 1, 4], "seconds": 2.0}
            (directory / "outcome.json").write_text(json.dumps(told))
        found.append(Job(arm, Course(), tmp_path / "start1", seed, directory, 1, "test", 3, 4))
    return found


def test_outcomes_are_of_finished_runs(jobs):
    found = outcomes(jobs)
    assert found["seed"].tolist() == [1, 2]
    assert found[AVERAGE].tolist() == pytest.approx([5 / 12] * 2)
    assert found["pass@1"].tolist() == pytest.approx([5 / 12] * 2)
    assert found["pass@2"].tolist() == pytest.approx([(0 + 0.5 + 1) / 3] * 2)
    assert found["pass@4"].tolist() == pytest.approx([2 / 3] * 2)
    assert found["internal_steps"].tolist() == [2, 2]


def test_curves_and_their_mean(jobs):
    found = curves(jobs)
    assert len(found) == 8
    assert found[found["step"] == 0][HELD_OUT].tolist() == [0.5, 0.5]
    mean = mean_run(jobs[0].arm, jobs)
    assert mean.metrics["bupo/reward"].tolist() == pytest.approx([1.5, 0.75, 0.5])
    assert (mean.name, mean.internal_steps, mean.looks) == ("BuPO", 2, None)
    other = replace(jobs[0], arm=Arm("GRPO"))
    assert mean_run(jobs[0].arm, [*jobs, other]).metrics.equals(mean.metrics)


def looks(arm="InterGRPO throughout", start="start1", seed=1, **columns):
    return pd.DataFrame({"arm": arm, "start": start, "seed": seed, **columns})


def test_a_collapse_is_half_of_the_first_accuracy_in_two_looks_running():
    steps = {"step": [0, 5, 10, 15, 20]}
    curve = pd.concat(
        [looks(**steps, **{HELD_OUT: [0.6, 0.25, 0.31, 0.29, 0.1]}),
         looks(seed=2, **steps, **{HELD_OUT: [0.6, 0.5, 0.2, 0.5, 0.55]})]
    )  # fmt: skip
    found = collapses(curve, ["InterGRPO throughout"])
    assert found["step"].tolist()[0] == 20
    assert math.isnan(found["step"].tolist()[1])
    assert found["last"].tolist() == [0.1, 0.55]


def test_calibration_is_what_the_phase_would_do():
    kl, held_out = [0.0, 0.2, 0.05, 0.2, 0.3, 0.9], [0.5, 0.5, 0.5, 0.45, 0.4, 0.1]
    curve = looks(step=[0, 2, 4, 6, 8, 10], **{"fixed_set/kl": kl, HELD_OUT: held_out})
    found = calibration(curve, [0.01, 0.1, 0.25, 2.0]).set_index("kl_bound")
    # 0.01: over it at 2 and 4, but no decision falls before step 5.
    assert found["step"].tolist()[:3] == [6, 8, 10]
    assert found["change"].tolist()[:3] == pytest.approx([-0.05, -0.1, -0.4])
    assert found["stopped"].tolist() == [1, 1, 1, 0]
    # A model that cannot be looked at any more is over every bound.
    blind = curve.assign(**{"fixed_set/kl": [0.0, 0.0, 0.0, 0.0, math.nan, math.nan]})
    assert calibration(blind, [2.0])["step"].tolist() == [10]


def test_similarity_counts_the_runs_in_which_it_rises():
    def run(arm, seed, values):
        return looks(arm, seed=seed, step=[0, 5, 10], **{"fixed_set/cos_final": values})

    curve = pd.concat(
        [run("BuPO", 1, [0.2, 0.3, 0.9]), run("BuPO", 2, [0.4, 0.1, 0.5]),
         run("BuPO", 3, [0.3, 0.5, 0.7]), run("GRPO", 1, [0.2, 0.25, 0.3]),
         run("GRPO", 3, [0.3, 0.6, 0.7])]
    )  # fmt: skip
    found = similarity(curve, ["BuPO"], "GRPO", 4).iloc[0]
    assert (found["start"], found["s_inter"], found["last"]) == pytest.approx((0.3, 0.3, 0.7))
    assert (found["runs"], found["rises"], found["above"]) == (3, 2, 1)


def test_the_cost_of_an_internal_step_is_a_ratio_of_medians():
    curve = looks(
        step=[0, 1, 2, 3, 4],
        **{"bupo/internal_phase": [np.nan, 1, 1, 0, 0],
           "timing_s/update_actor": [np.nan, 1.0, 3.0, 3.0, 5.0]},
    )  # fmt: skip
    assert cost(curve).tolist() == [0.5]


def test_layers_are_ranked_by_what_they_lead_to():
    whole = frame(
        **{"BuPO": [0.5, 0.6], "BuPO, layer 1": [0.6, 0.5], "BuPO, layer 3": [0.7, 0.2]}
    )  # fmt: skip
    names = {1: "BuPO, layer 1", 2: "BuPO", 3: "BuPO, layer 3"}
    found = layers(whole, names)
    assert found["start1"].tolist() == [0.6, 0.5, 0.7]
    cosines = pd.DataFrame({"layer": [1, 2, 3], "cosine": [0.1, 0.3, 0.9]})
    probe = LayerProbe(cosines, 0.1, 4, 8, 32, 8, 8, 1.0, 0)

    class Told:
        def recommend(self, *, reading):
            layers = {"raw": (None, 3), "normed": (2, 1)}[reading]
            return SimpleNamespace(layer=layers[0], paper_rule_layer=layers[1])

    told = SimpleNamespace(analysis=Told(), probe=probe)
    ranked = ranking(found, {"start1": told, "start2": told}).set_index("start")
    assert ranked["best"].tolist() == [3, 2]
    assert ranked["paper"].tolist() == [3, 3]
    assert ranked["paper_rank"].tolist() == [1, 3]
    assert ranked["normed_rank"].tolist() == [3, 1]
    assert ranked["cosine_rank"].tolist() == [1, 3]
    assert ranked["spearman"].tolist() == pytest.approx([0.5, -0.5])


def test_a_table_of_what_all_have():
    whole = frame(a=[0.6, 0.7, 0.5, 0.65], b=[0.5, 0.5])
    assert in_common(whole)["seed"].tolist() == [0, 0, 0, 0]
    assert sorted(in_common(whole)["arm"]) == ["a", "a", "b", "b"]
