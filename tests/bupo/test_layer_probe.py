"""The comparison of gradients against a plain float64 computation, and what it leaves behind."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from bupo import layer_probe
from bupo.layer_probe import Graded, LayerProbe, probe_layers
from bupo.policy_gradients import PolicyGradients, shared_parameters
from bupo.probe import Probe
from tiny import EVERY_FAMILY, VOCAB, tiny_model
from torch import nn
from tqdm import tqdm

from entropylens.errors import AllocationError, AnalysisFilesError, ResponsesError, SettingError
from entropylens.recognition import anatomy_of
from entropylens.responses import Response

#: Answers of 5 prompts; those of the last two prompts have no gradient.
REWARDS = ((1, 0, 0), (0.5, 0.5, 1, 0), (0, 1), (1, 1), (1,))


def answers(rewards=REWARDS, seed=1):
    random = np.random.default_rng(seed)

    def ids(least, most):
        return tuple(random.integers(2, VOCAB - 2, random.integers(least, most)).tolist())

    found = []
    for group, values in enumerate(rewards):
        prompt = ids(2, 6)
        found += [Graded(prompt, ids(1, 9), float(value), group * 10) for value in values]
    return found


def probed(model, graded, **options):
    return probe_layers(model, graded, progress=False, **options)


def plain(model, graded, layer, temperature=1.0):
    """The gradient of Eq. 10 (or 4, where layer is None) at the old policy, one answer at a time.

    Llama-like models only: hidden_states[l] @ E_u^T with Gemma's soft cap.
    """
    groups = {it.group for it in graded}
    weight, cap = (model.lm_head.weight, getattr(model.config, "final_logit_softcapping", None))
    total, nll, tokens = 0.0, 0.0, 0
    for group in groups:
        own = [it for it in graded if it.group == group]
        rewards = torch.tensor([it.reward for it in own], dtype=torch.float64)
        spread = rewards.std() if len(own) > 1 else torch.tensor(0.0)
        for it, reward in zip(own, rewards, strict=True):
            advantage = (reward - rewards.mean()) / (spread + 1e-6)
            ids = torch.tensor([it.prompt_ids + it.response_ids])
            out = model(ids, use_cache=False, output_hidden_states=True)
            logits = out.logits
            if layer is not None:
                logits = out.hidden_states[layer] @ weight.T
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
            log_probs = torch.log_softmax(logits[0] / temperature, -1)
            start = len(it.prompt_ids)
            taken = [log_probs[start - 1 + t, token] for t, token in enumerate(it.response_ids)]
            size = len(it.response_ids)
            total = total + advantage * sum(taken) / size / len(own) / len(groups)
            nll, tokens = nll - float(sum(taken).detach()), tokens + size
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(total, parameters.values(), allow_unused=True)
    found = {
        name: torch.zeros_like(parameters[name]) if grad is None else grad
        for name, grad in zip(parameters, grads, strict=True)
    }
    return found, nll / tokens


def shared_names(model, layer):
    inside = [f"layers.{place}." for place in range(layer)]
    return [
        name
        for name, _ in model.named_parameters()
        if any(it in name for it in (*inside, "embed_tokens", "lm_head"))
    ]


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("llama", 0.7), *[(it, 1.0) for it in ("llama3-rope", "qwen3", "qwen3-tied", "gemma2")]],
)
def test_every_number_is_that_of_the_plain_computation(name, temperature):
    model = tiny_model(name, torch.float64)
    graded = answers()
    found = probed(model, graded, temperature=temperature)
    assert list(found.layers["layer"]) == [1, 2, 3]
    grpo, policy_nll = plain(model, graded, None, temperature)
    assert found.policy_nll == pytest.approx(policy_nll, rel=1e-9)
    for row in found.layers.itertuples():
        inter, nll = plain(model, graded, row.layer, temperature)
        names = shared_names(model, row.layer)
        assert all(not inter[it].any() for it in inter.keys() - set(names))
        a, b = (torch.cat([it[name].flatten() for name in names]) for it in (grpo, inter))
        assert row.shared_parameters == len(a)
        assert row.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-7)
        assert row.norm_ratio == pytest.approx(float(b.norm() / a.norm()), rel=1e-7)
        assert row.nll_layer == pytest.approx(nll, rel=1e-9)
    counts = (found.num_layers, found.num_prompts, found.num_responses)
    assert (*counts, found.num_informative, found.num_blocks) == (4, 5, 12, 3, 3)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_pi_l_is_the_policy_that_training_optimizes(name):
    model = tiny_model(name, torch.float64)
    anatomy = anatomy_of(model)
    graded = answers(((1, 0), (0, 1)))
    responses = [Response(it.prompt_ids, it.response_ids) for it in graded]
    weights = torch.tensor([0.5, -0.5, -0.3, 0.3], dtype=torch.float64)
    parameters, ends = shared_parameters(model, anatomy, [1, 2])
    # Nemotron-H's scan lets a later token, and so padding, into earlier positions beyond a chunk.
    passes = [[[0], [1]], [[2], [3]]] if name == "nemotron_h" else [[[0, 1]], [[2, 3]]]
    run = PolicyGradients(
        *(model, anatomy, parameters, ends, responses, weights, passes, 1.0), tqdm(disable=True)
    )
    inner = run.sums([1, 2], lambda *_: torch.zeros(1))
    whole = run.sums([4], lambda *_: torch.zeros(1))
    for site, found in (inner | whole).items():
        model.zero_grad()
        nll = []
        for response, weight in zip(responses, weights.tolist(), strict=True):
            ids = torch.tensor([[*response.prompt_ids, *response.response_ids[:-1]]])
            if site == 4:
                logits = model(ids, use_cache=False).logits[0]
            else:
                with Probe(model, site).internal():
                    logits = model(ids, use_cache=False).logits[0]
            start = len(response.prompt_ids) - 1
            log_probs = logits[start:].log_softmax(-1)
            taken = log_probs.gather(1, torch.tensor(response.response_ids)[:, None]).sum()
            nll.append(-float(taken.detach()))
            (taken * weight).backward()
        # Some families give float32 logits from a float64 model.
        np.testing.assert_allclose(run.nll[site], nll, rtol=1e-5)
        for parameter, gradient in zip(parameters, found.gradient, strict=False):
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            error = float((gradient - expected).norm())
            assert error <= 1e-4 * float(expected.norm()) + 1e-6


def test_neither_order_nor_batches_nor_rounds_change_anything():
    model = tiny_model("llama", torch.float64)
    graded = answers()
    first = probed(model, graded)
    shuffled = [graded[it] for it in np.random.default_rng(0).permutation(len(graded))]
    pd.testing.assert_frame_equal(probed(model, shuffled).layers, first.layers)
    for options in ({"batch_tokens": 1}, {"batch_tokens": 9}, {"layers_at_once": 1}):
        found = probed(model, graded, **options).layers
        pd.testing.assert_frame_equal(found, first.layers, rtol=1e-6, atol=1e-6)
    some = probed(model, graded, layers=[3, 1]).layers
    pd.testing.assert_frame_equal(some, first.layers.iloc[[0, 2]].reset_index(drop=True))


def test_a_model_whose_upper_layers_add_nothing_has_one_gradient():
    model = tiny_model("llama", torch.float64)
    for layer in model.model.layers[2:]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    model.model.norm = nn.Identity()
    found = probed(model, answers()).layers.set_index("layer")
    assert found.loc[[2, 3], "cosine"].tolist() == pytest.approx([1, 1], abs=1e-9)
    assert found.loc[[2, 3], "norm_ratio"].tolist() == pytest.approx([1, 1], abs=1e-9)
    assert found.loc[[2, 3], "norm_ratio_low"].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert abs(found.loc[1, "cosine"]) < 0.99


def test_intervals_and_expected_gradients():
    """Prompts that are all the same have no spread; their batch is its own expectation."""
    model = tiny_model("llama", torch.float64)
    one, other = answers(((1, 0),))
    same = [dataclasses.replace(it, group=group) for group in range(40) for it in (one, other)]
    found = probed(model, same)
    assert found.num_blocks == layer_probe.MAX_BLOCKS
    for row in found.layers.itertuples():
        assert row.cosine_expected == pytest.approx(row.cosine, abs=1e-3)  # of the sketch
        assert row.cosine_high - row.cosine_low < 1e-5
        assert row.norm_ratio_low == pytest.approx(row.norm_ratio_high, rel=1e-5)
    different = probed(model, answers(((1, 0),) * 12)).layers
    assert (different["cosine_low"] < different["cosine"]).all()
    assert (different["norm_ratio"] < different["norm_ratio_high"]).all()
    assert (different["nll_layer_low"] < different["nll_layer"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_came(dtype):
    model = tiny_model("gemma2", dtype)
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones_like(
        model.model.layers[0].mlp.up_proj.weight
    )
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    before = {name: it.detach().clone() for name, it in model.named_parameters()}
    modes = [it.training for it in model.modules()]
    with torch.no_grad():
        found = probed(model, answers())
    assert np.isfinite(found.layers[["cosine", "norm_ratio", "nll_layer"]]).all(axis=None)
    for name, it in model.named_parameters():
        assert torch.equal(it, before[name])
        assert it.dtype == dtype
        assert (it.grad is None) == (name != "model.layers.0.mlp.up_proj.weight")
        assert it.requires_grad == (name != "model.layers.2.mlp.up_proj.weight")
    assert bool((model.model.layers[0].mlp.up_proj.weight.grad == 1).all())
    assert [it.training for it in model.modules()] == modes
    assert "forward" not in vars(model.model)
    assert not any(it._forward_hooks or it._forward_pre_hooks for it in model.modules())


def test_bfloat16_is_near_float32():
    single = tiny_model("llama").to(torch.bfloat16)
    exact = probed(tiny_model("llama").to(torch.bfloat16).double(), answers()).layers
    found = probed(single, answers()).layers
    np.testing.assert_allclose(found["cosine"], exact["cosine"], atol=0.05)
    np.testing.assert_allclose(found["norm_ratio"], exact["norm_ratio"], rtol=0.05)


def test_only_what_is_trained_counts():
    model = tiny_model("llama", torch.float64)
    for name, it in model.named_parameters():
        it.requires_grad_("layers.1." in name)
    found = probed(model, answers(), layers=[2, 3]).layers
    size = sum(it.numel() for it in model.model.layers[1].parameters())
    assert found["shared_parameters"].tolist() == [size, size]
    with pytest.raises(SettingError, match="pi_1 has no trainable parameter"):
        probed(model, answers())


def test_hooks_go_away_after_a_failure(monkeypatch):
    model = tiny_model("llama")
    kept = model.forward

    def broken(*_args, **_kwargs):
        raise KeyboardInterrupt

    model.forward = broken
    with pytest.raises(KeyboardInterrupt):
        probed(model, answers())
    model.forward = kept
    assert "forward" not in vars(model.model)
    assert not any(it._forward_hooks or it._forward_pre_hooks for it in model.modules())


def test_memory_that_is_not_there_is_explained(monkeypatch):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(AllocationError, match="layers_at_once=1"):
        probed(tiny_model("llama"), answers())


@pytest.mark.parametrize(
    ("rewards", "says"),
    [(((1, 1), (0, 0)), "none of 2 groups"), (((1,), (0,)), "more answers a prompt")],
)
def test_nothing_informative_is_refused(rewards, says):
    with pytest.raises(SettingError, match=says):
        probed(tiny_model("llama"), answers(rewards))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": [0, 1]}, "from 1 to 3"),
        ({"layers": [4]}, "from 1 to 3"),
        ({"layers": []}, "from 1 to 3"),
        ({"temperature": 0.0}, "positive"),
        ({"layers_at_once": 0}, "positive"),
    ],
)
def test_settings_that_make_no_sense(options, says):
    with pytest.raises(SettingError, match=says):
        probed(tiny_model("llama"), answers(), **options)


def test_answers_that_make_no_sense():
    model, graded = tiny_model("llama"), answers()
    bad = [
        (dataclasses.replace(graded[0], reward=float("nan")), SettingError, "NaN"),
        (dataclasses.replace(graded[0], group=10), SettingError, "several prompts"),
        (dataclasses.replace(graded[0], response_ids=(VOCAB,)), ResponsesError, "vocabulary"),
    ]
    for item, error, says in bad:
        with pytest.raises(error, match=says):
            probed(model, [item, *graded[1:]])
    with pytest.raises(ResponsesError, match="no response"):
        probed(model, [])


def test_it_is_saved_and_loaded(tmp_path):
    found = probed(tiny_model("llama"), answers())
    found.save(tmp_path / "a")
    again = LayerProbe.load(tmp_path / "a")
    assert again.to_dict() == found.to_dict()
    pd.testing.assert_frame_equal(again.to_frame(), found.to_frame(), check_exact=True)
    assert sorted(it.name for it in (tmp_path / "a").iterdir()) == [
        "layer_probe.csv",
        "layer_probe.json",
    ]
    (tmp_path / "a" / "layer_probe.json").write_text("{")
    for place in ("a", "b"):
        with pytest.raises(AnalysisFilesError, match="no readable layer probe"):
            LayerProbe.load(tmp_path / place)
