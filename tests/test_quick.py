"""recommend_layer(): equal to analyze() where it reads all, unbiased where it samples, and sure."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from profiles import (
    SEQUENTIAL_CASES,
    negative,
    ramp,
    simulated_decisions,
    studied,
    three_stages,
)
from tiny import tiny_model
from typer.testing import CliRunner

import entropylens
from entropylens import Decision, Response, analyze, recommend_layer
from entropylens.cli import app
from entropylens.errors import (
    AnalysisFilesError,
    NonFiniteStatesError,
    OutputDirectoryError,
    SettingError,
)
from entropylens.ffn_meter import entropies, full_products, sampled_positions
from entropylens.kernels.fused import FUSED
from entropylens.looks import (
    FIRST_LOOK,
    agreement_bound,
    check_until_sure,
    look_at,
    planned_looks,
)
from entropylens.policy import EAGER, Unembedding, entropy_float64
from entropylens.profile import Profile
from entropylens.recommend import recommend
from entropylens.resampling import PromptSums


def some_responses(count=12, longest=40, seed=0, prompts=None):
    """Random responses; with `prompts`, so many different prompts."""
    random = np.random.default_rng(seed)

    def ids(length):
        return tuple(random.integers(2, 90, length).tolist())

    asked = [ids(4) for _ in range(prompts or count)]
    lengths = random.integers(3, longest, count)
    return [
        Response(asked[place % len(asked)], ids(length)) for place, length in enumerate(lengths)
    ]


def quick(model, responses, **options):
    return recommend_layer(model, responses, progress=False, **options)


def whole(model, responses, **options):
    return analyze(model, responses, progress=False, keep_tokens=(), top_tokens=0, **options)


def side_by_side(analysis, decision, reading):
    """Both frames by response and layer."""
    keys = ["response_key", "layer"]
    ours, theirs = decision.measured[reading], analysis.responses
    return (it.sort_values(keys, ignore_index=True) for it in (ours, theirs))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("gpt2", torch.float32),
        ("gemma2", torch.float32),  # a soft cap, post-norms
        ("gptj", torch.float32),  # parallel branches, a bias
        ("nemotron_h", torch.float32),  # layers without FFN
        ("granite", torch.bfloat16),
        ("qwen3", torch.float64),
    ],
)
def test_at_all_positions_it_is_what_analyze_gives(family, dtype):
    model, responses = tiny_model(family, dtype), some_responses()
    analysis = whole(model, responses, reading="both")
    for reading in ("raw", "normed"):
        decision = quick(model, responses, positions=None, reading=reading)
        ours, theirs = side_by_side(analysis, decision, reading)
        names = [name for name in ours.columns if name.endswith("delta_ffn")]
        for name in (*names, "policy_entropy", "policy_nll", "num_tokens"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
        expected = analysis.recommend(reading=reading)
        assert decision.layer == expected.layer
        assert decision.recommendation.applies == expected.applies
        if expected.stability is not None:
            assert decision.recommendation.stability == pytest.approx(expected.stability)
    assert names == ["normed_delta_ffn"]


def test_batches_change_nothing():
    model, responses = tiny_model("llama"), some_responses(longest=60)
    one = quick(model, responses, positions=7)
    other = quick(model, responses, positions=7, batch_tokens=16)  # some are walked in pieces
    for (_, first), (_, second) in zip(one.measured.items(), other.measured.items(), strict=True):
        pd.testing.assert_frame_equal(first, second, rtol=1e-5, atol=1e-6)


def test_the_fused_kernel_reads_the_same():
    generator = torch.Generator().manual_seed(0)
    groups = tuple(torch.randn(3, 5, 16, generator=generator) for _ in range(2))
    unembedding = Unembedding(torch.randn(300, 16, generator=generator))
    fused = entropies(groups, unembedding, FUSED)
    for states, ours, eager in zip(
        groups, fused, entropies(groups, unembedding, EAGER), strict=True
    ):
        oracle = entropy_float64(states.flatten(0, 1), unembedding).unflatten(0, (3, 5))
        assert torch.allclose(ours, oracle, atol=1e-5)
        assert torch.allclose(eager, oracle, atol=1e-5)


def test_positions_are_drawn_by_content():
    first, second = some_responses(2, longest=80, seed=4)
    drawn = sampled_positions(first, 5, 0)
    assert drawn.tolist() == sampled_positions(first, 5, 0).tolist()
    assert drawn.tolist() != sampled_positions(first, 5, 1).tolist()
    assert set(drawn) <= set(sampled_positions(first, 9, 0))
    assert len(set(drawn)) == 5
    assert (np.diff(drawn) > 0).all()
    for count in (None, 10_000):
        every = sampled_positions(second, count, 0)
        assert every.tolist() == list(range(second.num_tokens))


def test_sampled_sums_are_unbiased_and_their_intervals_cover():
    """Token values drift within a response and differ between prompts of unequal length."""
    random = np.random.default_rng(0)
    population = []
    for _ in range(400):
        tokens = int(random.integers(5, 120))
        values = random.normal(0.2, 0.3) + np.linspace(-1, 1, tokens) + random.normal(size=tokens)
        population.append((Response((1,), tuple(random.integers(0, 90, tokens).tolist())), values))
    truth = sum(it.sum() for _, it in population) / sum(map(len, (it for _, it in population)))
    covered, means, fixed = [], [], []
    for study in range(400):
        chosen = random.integers(0, 400, 60)
        sums, counts = [], []
        for place in chosen:
            response, values = population[place]
            drawn = sampled_positions(response, 8, study)
            sums.append(values[drawn].mean() * len(values))
            counts.append(len(values))
        prompts = PromptSums(np.array(sums)[:, None, None], np.array(counts, float))
        low, high = prompts.draw(400, study).studentised()
        covered.append(low[0, 0] <= truth <= high[0, 0])
        means.append(prompts.means()[0, 0])
        response, values = population[0]
        fixed.append(values[sampled_positions(response, 8, study)].mean())
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)
    assert np.mean(means) == pytest.approx(truth, abs=3 * np.std(means) / 20)
    values = population[0][1]
    assert np.mean(fixed) == pytest.approx(values.mean(), abs=3 * np.std(fixed) / 20)


def planted(scales):
    """A model whose FFNs write little (they raise the entropy) or much (they lower it)."""
    model = tiny_model("llama", layers=len(scales))
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, scales, strict=True):
            layer.mlp.down_proj.weight.mul_(scale)
    return model


@pytest.mark.parametrize(
    ("scales", "layer", "readings"),
    [
        ([0.01] * 4 + [5.0] * 4, 4, ["raw"]),
        ([0.01] * 7 + [8.0], 7, ["raw"]),
        ([5.0] * 8, None, ["raw", "normed"]),
        ([0.003] * 8, 7, ["raw", "normed"]),
    ],
)
def test_a_clear_profile_takes_a_tenth_of_the_products(scales, layer, readings):
    model, responses = planted(scales), some_responses(60, longest=150)
    decision = quick(model, responses, until_sure=0.95)
    assert decision.decided
    assert decision.layer == layer == whole(model, responses).recommendation.layer
    assert decision.prompts == FIRST_LOOK
    assert decision.products <= 0.1
    assert list(decision.readings) == readings
    assert f"Decided after {FIRST_LOOK} of 60 prompts" in decision.sentence
    if "normed" in readings:
        assert decision.measured["normed"]["num_positions"].max() == 8
        assert "at most 8 positions" in decision.readings["normed"].reason


def test_products_are_counted():
    model, responses = tiny_model("llama"), some_responses()
    tokens = sum(it.num_tokens for it in responses)
    everything = quick(model, responses, positions=None, reading="raw")
    assert everything.products == pytest.approx((2 * 4 + 1) / (4 * 4 + 2))
    some = quick(model, responses, positions=5, reading="raw")
    read = sum(min(5, it.num_tokens) for it in responses)
    assert some.products == pytest.approx(everything.products * read / tokens)
    assert full_products(4, "bfloat16") == 22


def test_looks_are_doublings_that_share_an_error():
    assert planned_looks(500) == (20, 40, 80, 160, 320, 500)
    assert planned_looks(30) == (20, 30)
    assert planned_looks(24) == (24,)  # four prompts fewer would save nothing
    assert planned_looks(3) == (3,)
    assert agreement_bound(0.95, 1) == pytest.approx(0.95)
    assert agreement_bound(0.95, 5) == pytest.approx(0.99)
    for wrong in (0.5, 1.0, 95):
        with pytest.raises(SettingError, match="until_sure"):
            check_until_sure(wrong)


def test_a_look_says_what_the_recommendation_says():
    random = np.random.default_rng(0)
    for truth in (three_stages(random), negative(random), np.full(6, 1.0)):
        seen = studied(random, truth, prompts=40)
        look, found = look_at(seen, 0.95, 1), recommend(seen)
        assert look.layer == found.layer
        if look.sure:  # else it stopped as soon as it could not be
            assert look.stability == pytest.approx(found.stability)
    few = studied(random, negative(random), prompts=FIRST_LOOK - 1)
    assert not look_at(few, 0.95, 1).sure
    gradual = studied(random, ramp(random, 1, -1), prompts=2000, spread=0.01)
    assert not look_at(gradual, 0.95, 1).sure
    missing = Profile(np.array([1.0, np.nan, -1.0]))
    assert look_at(missing, 0.95, 1).sure
    assert look_at(missing, 0.95, 1).layer is None


def test_decided_answers_are_right():
    """More than 1,000 studies that look again and again, near ties included."""
    runs = simulated_decisions(range(1000, 1038))
    assert len(runs) >= 1000
    assert runs["wrong"].mean() <= 0.05
    assert runs.loc[runs["sure"], "wrong"].mean() <= 0.05
    undecided = 1 - runs.groupby("case")["sure"].mean()
    assert undecided[["two stages", "all negative", "all positive", "weak Llama"]].max() <= 0.2
    assert undecided[["negative block", "ramp", "flat ramp", "ramp down to a stage"]].min() >= 0.9
    assert set(undecided.index) == set(SEQUENTIAL_CASES)


def test_undecided_is_an_answer(tmp_path):
    model = tiny_model("gpt2")
    few = quick(model, some_responses(5), until_sure=0.95)
    assert few.decided is False
    assert f"Fewer than {FIRST_LOOK} prompts" in few.sentence
    assert few.to_dict()["answer"] == "undecided"
    assert "Undecided after 5 of 5 prompts" in few._repr_html_()
    assert "undecided, 5 of 5 prompts" in repr(few)
    unasked = quick(model, some_responses(5))
    assert unasked.decided is None
    assert unasked.sentence.startswith("Read on 5 of 5 prompts")
    # The rule has nothing to say where not every layer has an FFN, however many there are.
    hybrid = quick(tiny_model("nemotron_h"), some_responses(30), until_sure=0.95)
    assert hybrid.decided
    assert hybrid.layer is None
    assert list(hybrid.readings) == ["raw"]
    assert "no prompt could change it" in hybrid.sentence


def test_what_stayed_open_is_said():
    decision = quick(tiny_model("gpt2"), some_responses(30), until_sure=0.999)
    assert decision.decided is False
    assert decision.sentence.startswith("Undecided after 30 of 30 prompts")
    looks = decision.looks
    assert looks["prompts"].tolist() == [20, 30]

    def with_last(**values):
        changed = looks.copy()
        for name, value in values.items():
            changed.loc[len(looks) - 1, name] = value
        return replace(decision, looks=changed).open_question

    assert "gradual in itself" in with_last(agreement=1.0)
    assert "what other prompts would say" in with_last(agreement=0.6)


def test_a_decision_comes_back_from_its_file(tmp_path):
    for family in ("gpt2", "nemotron_h"):
        model, responses = tiny_model(family), some_responses(30, prompts=24)
        path = tmp_path / family
        decision = quick(model, responses, positions=8, until_sure=0.95, output=path)
        assert [it.name for it in path.iterdir()] == ["recommendation.json"]
        loaded = Decision.load(path)
        assert loaded.to_dict() == decision.to_dict()
        assert loaded.readings == decision.readings
        for reading, rows in decision.measured.items():
            pd.testing.assert_frame_equal(loaded.measured[reading], rows)
        pd.testing.assert_frame_equal(loaded.looks, decision.looks)
        pd.testing.assert_frame_equal(loaded.to_frame(), decision.layers)
        again = recommend(loaded.profile())
        assert again.layer == decision.layer
    with pytest.raises(OutputDirectoryError, match="--force"):
        quick(model, responses, output=path)
    quick(model, responses, output=path, force=True)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(AnalysisFilesError, match=r"no recommendation\.json"):
        Decision.load(tmp_path)
    path = tmp_path / "recommendation.json"
    path.write_text("{}")
    with pytest.raises(AnalysisFilesError, match="cannot be read"):
        Decision.load(tmp_path)
    path.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(AnalysisFilesError, match="schema_version 99"):
        Decision.load(tmp_path)


def test_the_first_prompts_are_no_first_lines():
    model, responses = planted([0.01] * 4 + [5.0] * 4), some_responses(80, prompts=40)
    decision = quick(model, responses, until_sure=0.95, positions=4)
    taken = set(decision.measured["raw"]["prompt_id"])
    assert len(taken) == FIRST_LOOK
    assert taken != {it.prompt_key for it in responses[:FIRST_LOOK]}
    assert decision.measured["raw"]["response_id"].nunique() == 2 * FIRST_LOOK
    backwards = quick(model, responses[::-1], until_sure=0.95, positions=4)
    assert set(backwards.measured["raw"]["prompt_id"]) == taken
    assert backwards.recommendation.stability == pytest.approx(decision.recommendation.stability)


def test_only_prompts_that_are_looked_at_are_answered(model_directory, tmp_path):
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join(f'{{"problem": "{a}+{b}"}}\n' for a in range(7) for b in range(7)))
    model = planted([0.01] * 4 + [5.0] * 4)
    tokenizer = entropylens.sources.open_model(model_directory).tokenizer
    sampling = entropylens.Sampling(max_new_tokens=6)
    options = {
        "datasets": [str(sums)], "sampling": sampling, "template": "plain", "tokenizer": tokenizer,
    }  # fmt: skip
    decision = quick(model, None, until_sure=0.9, **options)
    assert decision.num_prompts == 49
    assert decision.decided
    assert decision.measured["raw"]["response_id"].nunique() == FIRST_LOOK
    everything = quick(model, None, **options)
    assert everything.prompts == 49
    both = [set(it.measured["raw"]["response_key"]) for it in (decision, everything)]
    assert both[0] < both[1]


def test_settings_that_cannot_be_used():
    model, responses = tiny_model("llama"), some_responses(3)
    for options, says in [
        ({"reading": "both"}, "no reading 'both'"),
        ({"kernel": "fast"}, "no kernel"),
        ({"rule": "mine"}, "no rule"),
        ({"rule": "paper", "until_sure": 0.95}, "rule of the stages"),
        ({"positions": 0}, "positions is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"until_sure": 2}, "until_sure is 2"),
        ({"num_prompts": 3}, "not both"),
    ]:
        with pytest.raises(SettingError, match=says):
            quick(model, responses, **options)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(entropylens.EntropyLensError):
        quick(model, responses)
    sound = tiny_model("llama")
    ids = responses[0].response_ids[0]
    with torch.no_grad():
        sound.model.embed_tokens.weight[ids] = math.inf
    with pytest.raises(NonFiniteStatesError, match="layer 1"):
        quick(sound, responses, positions=None)


@pytest.fixture
def file(tmp_path):
    lines = [
        {"prompt_ids": list(it.prompt_ids), "response_ids": list(it.response_ids)}
        for it in some_responses(24)
    ]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command_line(entropylens, model_directory, file, tmp_path):
    asked = ("recommend", model_directory, "--responses", file, "--positions", "8")
    done = entropylens(*asked, "--until-sure", "0.95", "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["answer"] in ("decided", "undecided")
    assert found["looks"][0]["prompts"] == 24
    assert "24 prompts: " in done.stderr
    assert Decision.load(tmp_path / "out").to_dict() == found
    again = entropylens("recommend", tmp_path / "out", "--json")
    assert json.loads(again.stdout) == found
    few = tmp_path / "few.jsonl"
    few.write_text(file.read_text().splitlines()[0])
    undecided = entropylens("recommend", model_directory, "--responses", few, "--until-sure", ".95")
    assert undecided.returncode == 0, undecided.stderr
    said = " ".join(undecided.stdout.split())
    assert said.startswith("Undecided after 1 of 1 prompts")
    assert "Train first (raw reading)" in said
    answered = entropylens(
        "recommend", model_directory, "--num-prompts", "2", "--max-new-tokens", "3", "--template",
        "plain", "--rule", "paper", "--json",
    )  # fmt: skip
    assert json.loads(answered.stdout)["rule"] == "paper"


def test_a_finished_analysis_is_read(file, tmp_path):
    run = tmp_path / "run"
    whole(tiny_model("llama"), file, output=run)
    done = CliRunner().invoke(app, ["recommend", str(run), "--reading", "raw"])
    assert done.exit_code == 0
    assert "Train first (raw reading)" in done.output
    for option in (["--until-sure", "0.95"], ["-o", "x"], ["--responses", str(file)]):
        refused = CliRunner().invoke(app, ["recommend", str(run), *option])
        assert refused.exit_code == 2
        assert "is for a model" in refused.output
