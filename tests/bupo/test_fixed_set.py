"""The fixed set, against whole float64 logits and states of plain Hugging Face forwards."""

import copy
import json
import math

import pandas as pd
import pytest
import torch
from bupo.drift import Start, divergence
from bupo.fixed_set import FixedSet, choose
from tiny import VOCAB, tiny_model

import entropylens
from entropylens.errors import (
    AnalysisFilesError,
    OutputDirectoryError,
    ResponsesError,
    SettingError,
    WeightsError,
)
from entropylens.look import Look, trajectory
from entropylens.policy import Unembedding
from entropylens.transform import OutputTransform

LAYER = 2
#: Untied, tied, soft-capped, logits scaled up and down, lm_head with a bias, LayerNorm, post-norm.
KINDS = ("llama", "qwen3-tied", "gemma2", "cohere", "granite", "phi", "gpt2", "olmo2")


def theta(model, response):
    """log pi_theta at the response positions, [T, V], from the model's own logits."""
    ids = torch.tensor([response.prompt_ids + response.response_ids])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(response.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)


def streams(model, response):
    """H^0..H^L at the response positions: Hugging Face norms the last one, a hook has it plain."""
    inner = model.base_model
    last = []
    norm = next(
        getattr(inner, name) for name in ("norm", "final_layernorm", "ln_f") if hasattr(inner, name)
    )
    handle = norm.register_forward_pre_hook(lambda _module, args: last.append(args[0][0]))
    ids = torch.tensor([response.prompt_ids + response.response_ids])
    with torch.no_grad():
        hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    states = [*(state[0] for state in hidden[:-1]), last[0]]
    return [state[len(response.prompt_ids) - 1 : -1].double() for state in states]


def raw_policy(model, state):
    """log pi_l by the model's own lm_head, and what its forward does behind it."""
    with torch.no_grad():
        logits = model.get_output_embeddings()(state.to(model.dtype)).double()
    config = model.config
    logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.log_softmax(logits if cap is None else cap * torch.tanh(logits / cap), -1)


def entropy(log_probs):
    return -(log_probs.exp() * log_probs).sum(-1)


def mean(model, responses, of):
    """The mean over all response positions of what `of` gives each response, [T]."""
    return float(torch.cat([of(model, response) for response in responses]).mean())


def divergence_between(before, after, responses):
    def of(_model, response):
        first, second = theta(before, response), theta(after, response)
        return (first.exp() * (first - second)).sum(-1)

    return mean(None, responses, of)


def perturbed(model, size=0.02, only=""):
    """A copy with noise on every weight, or on those whose names hold `only`."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if only in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((size * noise * parameter.std()).to(parameter))
    return other


@pytest.fixture
def fixed(tmp_path, responses):
    return FixedSet.start(tmp_path / "fixed", responses)


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_equals_the_plain_computation(kind, fixed, responses):
    model = tiny_model(kind, torch.float64)
    before = fixed.look(model, step=0, layer=LAYER)
    after_model = perturbed(model, size=0.1)
    after = fixed.look(after_model, step=20, layer=LAYER)
    assert before.kl == 0
    assert before.kl_interval == (0, 0)
    assert after.num_tokens == sum(response.num_tokens for response in responses)
    close = {"rel": 1e-9, "abs": 1e-9}
    assert after.kl == pytest.approx(divergence_between(model, after_model, responses), **close)
    assert after.kl > 1e-4
    assert after.kl_interval[0] < after.kl < after.kl_interval[1]
    for look, weights in ((before, model), (after, after_model)):

        def nll(model, response):
            return -theta(model, response)[range(response.num_tokens), list(response.response_ids)]

        def layer_entropy(model, response, layer=LAYER):
            return entropy(raw_policy(model, streams(model, response)[layer]))

        def layer_below(model, response):
            return layer_entropy(model, response, LAYER - 1)

        def layer_nll(model, response):
            log_probs = raw_policy(model, streams(model, response)[LAYER])
            return -log_probs[range(response.num_tokens), list(response.response_ids)]

        own = mean(weights, responses, layer_entropy)
        below = mean(weights, responses, layer_below)
        assert math.log(look.perplexity) == pytest.approx(mean(weights, responses, nll), **close)
        assert look.entropy_layer == pytest.approx(own, **close)
        assert look.delta_layer == pytest.approx(own - below, **close)
        assert look.nll_layer == pytest.approx(mean(weights, responses, layer_nll), **close)
        assert list(look.similarity) == [3, 4]
        for other, cosine in look.similarity.items():

            def cosines(model, response, other=other):
                states = streams(model, response)
                return torch.cosine_similarity(states[LAYER], states[other], dim=-1)

            assert cosine == pytest.approx(mean(weights, responses, cosines), abs=1e-9)
        assert look.cos_final == look.similarity[4]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "phi"])
def test_kl_sees_a_change_of_lm_head_alone(kind, fixed, responses):
    model = tiny_model(kind, torch.float64)
    if kind in ("gemma2", "cohere"):  # tied by default
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    fixed.look(model, step=0, layer=LAYER)
    other = perturbed(model, size=0.3, only="lm_head")
    after = fixed.look(other, step=1, layer=LAYER)
    expected = divergence_between(model, other, responses)
    assert expected > 1e-4
    assert after.kl == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert after.similarity == pytest.approx(
        fixed.look(model, step=0, layer=LAYER).similarity, abs=1e-12
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["lm_head", "up_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_that_has_learnt_is_compared_with_one_that_has_not(settings, fixed, responses):
    import peft

    plain = tiny_model("llama", torch.float64)
    config = peft.LoraConfig(r=2, lora_alpha=8, **settings)
    model = peft.get_peft_model(copy.deepcopy(plain), config).double()
    fixed.look(model, step=0, layer=LAYER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.ones_like(parameter).cumsum(0).sin())
            assert "lora" in name or "modules_to_save" in name or not parameter.requires_grad
    after = fixed.look(model, step=1, layer=LAYER)
    expected = divergence_between(plain, model, responses)
    assert expected > 1e-4
    assert after.kl == pytest.approx(expected, rel=1e-6)


def test_a_float32_model_shows_a_tiny_step(fixed, responses):
    model = tiny_model("llama")
    fixed.look(model, step=0, layer=LAYER)
    assert fixed.look(model, step=1, layer=LAYER).kl == pytest.approx(0, abs=1e-11)
    other = perturbed(model, size=1e-4)
    found = fixed.look(other, step=2, layer=LAYER).kl
    expected = divergence_between(model.double(), other.double(), responses)
    assert expected < 1e-5
    assert found == pytest.approx(expected, rel=0.02)


def test_a_bfloat16_model_keeps_its_own_type(fixed):
    model = tiny_model("qwen3-tied", torch.bfloat16)
    fixed.look(model, step=0, layer=LAYER)
    start = Start.load(fixed.directory / "start.safetensors", fixed._mark, OutputTransform())
    assert start.states.dtype == start.unembedding.weight.dtype == torch.bfloat16
    other = perturbed(model, size=0.05, only="layers.1")
    expected = divergence_between(model, other, fixed.responses)
    # The model rounds its logits to bfloat16; here they are float32.
    assert fixed.look(other, step=1, layer=LAYER).kl == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_what_is_kept_of_step_0_is_what_lm_head_read(fixed, responses):
    model = tiny_model("phi", torch.float64)
    fixed.look(model, step=0, layer=LAYER)
    start = Start.load(fixed.directory / "start.safetensors", fixed._mark, OutputTransform())
    log_probs = torch.log_softmax(start.unembedding.logits(start.states), -1)
    expected = torch.cat([theta(model, response) for response in responses])
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("vocab", [7, 2048, 5001])
def test_divergence_over_several_tiles(vocab, scale):
    generator = torch.Generator().manual_seed(vocab)
    weights = torch.randn(2, vocab, 16, generator=generator)
    weights[1] = weights[0] + 0.1 * weights[1]
    states = torch.randn(2, 9, 16, generator=generator) * scale
    bias = torch.randn(vocab, generator=generator)
    sides = [Unembedding(weight, bias, OutputTransform(0.5, 30.0)) for weight in weights]
    found = divergence(states[0], sides[0], states[1], sides[1])
    p, q = (
        torch.log_softmax(side.logits(state.double()), -1)
        for side, state in zip(sides, states, strict=True)
    )
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-9)
    assert (divergence(states[0], sides[0], states[0], sides[0]).abs() < 1e-9).all()


def test_neither_order_nor_batches_change_a_look(tmp_path, responses):
    model = tiny_model("llama", torch.float64)
    other = perturbed(model)
    found = []
    for name, order, batch_tokens in (
        ("plain", responses, 512),
        ("backwards", responses[::-1], 512),
        ("pieces", [responses[place] for place in (3, 0, 5, 1, 4, 2)], 5),
    ):
        fixed = FixedSet.start(tmp_path / name, order)
        fixed.look(model, step=0, layer=LAYER, batch_tokens=batch_tokens)
        found.append(fixed.look(other, step=8, layer=LAYER, batch_tokens=batch_tokens))
    for look in found[1:]:
        assert look.to_metrics() == pytest.approx(found[0].to_metrics(), rel=1e-9)
        assert look.similarity == pytest.approx(found[0].similarity, rel=1e-12)


def test_the_batches_of_step_0_and_of_later_looks_may_differ(fixed):
    model, other = tiny_model("llama", torch.float64), perturbed(tiny_model("llama", torch.float64))
    fixed.look(model, step=0, layer=LAYER, batch_tokens=512)
    assert fixed.look(other, step=1, layer=LAYER, batch_tokens=3).kl == pytest.approx(
        fixed.look(other, step=2, layer=LAYER).kl, rel=1e-9
    )


def test_files_and_trajectory(fixed, responses):
    model = tiny_model("llama")
    looks = [
        fixed.look(perturbed(model, size=step / 1000), step=step, layer=1) for step in (0, 10, 2)
    ]
    for look in looks:
        place = fixed.directory / f"step_{look.step}"
        curve = pd.read_csv(place / "similarity.csv")
        assert list(curve.columns) == ["layer", "other", "cosine"]
        assert curve["layer"].tolist() == [1, 1, 1]
        assert dict(zip(curve["other"], curve["cosine"], strict=True)) == look.similarity
        analysis = entropylens.Analysis.load(place)
        assert analysis.policy_perplexity == look.perplexity
        layers = pd.read_csv(place / "layers.csv").set_index("layer")
        assert layers.loc[1, "delta_layer"] == pytest.approx(look.delta_layer)
        assert layers.loc[1, "cos_final"] == pytest.approx(look.cos_final)
        table = analysis.responses.query("layer == 1")
        kl = (table["start_kl"] * table["num_tokens"]).sum() / table["num_tokens"].sum()
        assert kl == pytest.approx(look.kl)
        assert {it.name for it in place.iterdir()} == {
            *("analysis.json", "layers.csv", "look.json", "responses.parquet", "similarity.csv")
        }
    frame = trajectory(fixed.directory)
    assert frame["step"].tolist() == [0, 2, 10]
    assert frame["kl"].tolist() == sorted(look.kl for look in looks)
    assert frame.loc[2, "cos_3"] == looks[1].similarity[3]
    assert frame["cos_4"].tolist() == frame["cos_final"].tolist()
    assert {"kl_low", "kl_high", "perplexity", "delta_layer"} <= set(frame.columns)
    metrics = looks[1].to_metrics()
    assert metrics["fixed_set/kl"] == looks[1].kl
    assert metrics["fixed_set/cos_final"] == looks[1].similarity[4]
    assert all(key.startswith("fixed_set/") and math.isfinite(it) for key, it in metrics.items())
    # The same analysis as analyze makes of it.
    plain = entropylens.analyze(model, responses, progress=False)
    there = entropylens.Analysis.load(fixed.directory / "step_0")
    pd.testing.assert_frame_equal(plain.layers, there.layers)


def test_a_look_that_is_there_is_read_without_the_model(fixed):
    model = tiny_model("llama")
    found = [fixed.look(model, step=0, layer=LAYER)]
    found.append(fixed.look(perturbed(model), step=1, layer=LAYER))

    def refuse(*_args, **_kwargs):
        raise AssertionError("the model was run")

    model.forward = refuse
    opened = FixedSet.open(fixed.directory)
    assert opened == fixed
    assert [opened.look(model, step=step, layer=LAYER) for step in (0, 1)] == found
    with pytest.raises(OutputDirectoryError, match="holds a look at layer 2"):
        opened.look(model, step=1, layer=3)


def test_a_half_written_look_is_made_again(fixed):
    model = tiny_model("llama")
    fixed.look(model, step=0, layer=LAYER)
    found = fixed.look(perturbed(model), step=1, layer=LAYER)
    place = fixed.directory / "step_1"
    (place / "look.json").unlink()
    (place / "layers.csv").write_text("torn")
    assert fixed.look(perturbed(model), step=1, layer=LAYER) == found
    assert len(pd.read_csv(place / "layers.csv")) == 4


def test_a_look_before_step_0_is_refused(fixed):
    with pytest.raises(OutputDirectoryError, match=r"step 0 was not looked at.*before the first"):
        fixed.look(tiny_model("llama"), step=5, layer=LAYER)


def test_another_model_or_a_damaged_start_is_refused(fixed, responses, tmp_path):
    model = tiny_model("llama")
    fixed.look(model, step=0, layer=LAYER)
    model.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(SettingError, match="another shape"):
        fixed.look(model, step=1, layer=LAYER)
    other = FixedSet.start(tmp_path / "other", responses[:3])
    start = fixed.directory / "start.safetensors"
    (other.directory / "start.safetensors").write_bytes(start.read_bytes())
    with pytest.raises(WeightsError, match="other responses"):
        other.look(tiny_model("llama"), step=1, layer=LAYER)
    start.write_bytes(start.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="cannot be used"):
        fixed.look(tiny_model("llama"), step=1, layer=LAYER)


@pytest.mark.parametrize(
    "settings", [{"layer": 0}, {"layer": 5}, {"step": -1}, {"reading": "cooked"}]
)
def test_settings_that_do_not_exist(settings, fixed):
    with pytest.raises(SettingError):
        fixed.look(tiny_model("llama"), **({"step": 0, "layer": LAYER} | settings))


def test_a_set_that_does_not_fit_the_model_is_refused(tmp_path):
    fixed = FixedSet.start(tmp_path, [{"prompt_ids": [1], "response_ids": [2, VOCAB]}])
    with pytest.raises(ResponsesError, match="outside the vocabulary"):
        fixed.look(tiny_model("llama"), step=0, layer=LAYER)


@pytest.mark.parametrize("reading", ["raw", "normed", "both"])
def test_readings(reading, fixed):
    look = fixed.look(tiny_model("llama", torch.float64), step=0, layer=LAYER, reading=reading)
    row = pd.read_csv(fixed.directory / "step_0" / "layers.csv").loc[LAYER - 1]
    prefix = "normed_" if reading == "normed" else ""
    for name in ("entropy_layer", "delta_layer", "nll_layer"):
        assert getattr(look, name) == pytest.approx(row[prefix + name])


def test_the_last_layer_has_nothing_above_it(fixed):
    look = fixed.look(tiny_model("llama"), step=0, layer=4)
    assert look.similarity == {}
    assert look.cos_final == look.to_metrics()["fixed_set/cos_final"] == 1
    assert Look.load(fixed.directory / "step_0") == look
    assert pd.read_csv(fixed.directory / "step_0" / "similarity.csv").empty


def test_two_prompts_give_no_interval(tmp_path, responses):
    fixed = FixedSet.start(tmp_path, responses[:2])
    model = tiny_model("llama")
    assert fixed.look(model, step=0, layer=LAYER).kl_interval == (0, 0)
    look = fixed.look(perturbed(model), step=1, layer=LAYER)
    assert all(map(math.isnan, look.kl_interval))
    assert "fixed_set/kl_low" not in look.to_metrics()
    text = (tmp_path / "step_1" / "look.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["kl_interval"] == [None, None]
    assert all(map(math.isnan, Look.load(tmp_path / "step_1").kl_interval))


def test_the_model_is_left_as_it_came(fixed):
    model = tiny_model("gpt2")  # it has dropout
    model.train()
    model.transformer.h[1].eval()
    model.transformer.wte.weight.requires_grad_(False)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()

    def state():
        return (
            [module.training for module in model.modules()],
            [(it.requires_grad, it.dtype, it.device) for it in model.parameters()],
            [len(module._forward_hooks) for module in model.modules()],
            [len(module._forward_pre_hooks) for module in model.modules()],
            torch.is_grad_enabled(),
        )

    before, weights = state(), [it.detach().clone() for it in model.parameters()]
    gradients = [it.grad.clone() for it in model.parameters() if it.grad is not None]
    first = fixed.look(model, step=0, layer=LAYER)
    assert state() == before
    assert all(map(torch.equal, weights, model.parameters()))
    left = [it.grad for it in model.parameters() if it.grad is not None]
    assert all(map(torch.equal, gradients, left))
    # Dropout is off in a look, and autograd works after it.
    assert fixed.look(model, step=1, layer=LAYER).perplexity == first.perplexity
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()


def test_a_set_is_written_once(tmp_path, responses):
    given = [
        {"prompt_ids": list(it.prompt_ids), "response_ids": list(it.response_ids)}
        for it in responses
    ]
    fixed = FixedSet.start(tmp_path / "a" / "b", given)
    assert fixed.responses == tuple(responses)
    lines = (fixed.directory / "responses.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record | given[place] for place, record in enumerate(records)] == records
    assert FixedSet.start(fixed.directory, iter(responses)) == FixedSet.open(fixed.directory)
    with pytest.raises(OutputDirectoryError, match=r"other responses.*FixedSet.open"):
        FixedSet.start(fixed.directory, responses[1:])
    with pytest.raises(OutputDirectoryError, match=r"no fixed set.*FixedSet.start"):
        FixedSet.open(tmp_path)
    with pytest.raises(ResponsesError, match="line 2"):
        FixedSet.start(tmp_path / "c", [given[0], {"prompt_ids": [], "response_ids": [1]}])


def test_a_directory_without_looks_has_no_trajectory(fixed, tmp_path):
    for directory in (fixed.directory, tmp_path / "nowhere"):
        with pytest.raises(AnalysisFilesError, match="no look"):
            trajectory(directory)
    fixed.look(tiny_model("llama"), step=0, layer=LAYER)
    (fixed.directory / "step_0" / "look.json").write_text('{"step": 0}')
    with pytest.raises(AnalysisFilesError, match="cannot be read"):
        trajectory(fixed.directory)


def test_choose():
    assert choose(10, 5) == [0, 2, 4, 6, 8]
    assert choose(7, 3) == [0, 2, 4]
    assert choose(3, 8) == [0, 1, 2]
    for available in range(1, 30):
        for count in range(1, available + 1):
            picks = choose(available, count)
            gaps = [b - a for a, b in zip(picks, [*picks[1:], available], strict=True)]
            assert len(picks) == count
            assert max(gaps) - min(gaps) <= 1
    for wrong in ((0, 3), (3, 0)):
        with pytest.raises(SettingError):
            choose(*wrong)


def test_a_start_that_cannot_be_written_says_so(tmp_path):
    start = Start(torch.zeros(3, 2), Unembedding(torch.zeros(5, 2)))
    with pytest.raises(OutputDirectoryError, match="cannot write"):
        start.save(tmp_path / "nowhere" / "start.safetensors", "mark")
