import copy

import pytest
import torch
from bupo.probe import Probe
from tiny import EVERY_FAMILY, tiny_model

import entropylens
from entropylens.errors import SettingError

IDS = torch.tensor([[3, 14, 15, 92, 65, 35], [89, 79, 32, 38, 46, 26]])
SKIPPING = ("llama", "qwen3", "gemma2", "olmo2", "phi", "qwen3_moe", "cohere")


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_the_probe_gives_what_analyze_reads(name):
    model = tiny_model(name, torch.float64)
    expected = torch.stack([entropylens.internal_policy(model, row.tolist(), 2) for row in IDS])
    theta = model(IDS, use_cache=False).logits
    probe = Probe(model, 2)
    with torch.no_grad():
        with probe.internal():
            found = model(IDS, use_cache=False).logits
        rows = torch.tensor([1, 7, 11])
        with probe.both(rows, internal=True):
            inner_first = model(IDS, use_cache=False).logits
        with probe.both(rows, internal=False):
            theta_first = model(IDS, use_cache=False).logits
    # Some families give float32 logits from a float64 model.
    close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(found.log_softmax(-1), expected, **close)
    theta, inner = theta.detach().flatten(0, 1), found.flatten(0, 1)
    torch.testing.assert_close(inner_first[0], torch.cat([inner, theta[rows]]), **close)
    torch.testing.assert_close(theta_first[0], torch.cat([theta, inner[rows]]), **close)
    # Disarmed, nothing is left of it.
    assert torch.equal(model(IDS, use_cache=False).logits.flatten(0, 1), theta)


def gradients(model, probe, **options):
    model.zero_grad()
    with probe.internal(**options):
        logits = model(IDS, use_cache=False).logits
    logits.log_softmax(-1)[..., 7].sum().backward()
    return {name: it.grad for name, it in model.named_parameters() if it.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_layers_up_to_l_and_both_embeddings(tied, checkpointing):
    model = tiny_model("llama3-rope" if tied else "llama", torch.float64)
    plain = gradients(model, Probe(model, 2))
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    found = gradients(model, Probe(model, 2))
    reached = {name for name, grad in found.items() if grad.abs().max() > 0}
    inner = {
        name
        for name, _ in model.named_parameters()
        if ".layers.0." in name or ".layers.1." in name or "embed" in name or "lm_head" in name
    }
    assert reached == inner
    for name in inner:
        torch.testing.assert_close(found[name], plain[name])


def test_a_gradient_equals_autograd_through_the_plain_computation():
    model = tiny_model("llama", torch.float64)
    found = gradients(model, Probe(model, 2))
    other = copy.deepcopy(model)
    other.zero_grad()
    hidden = other(IDS, use_cache=False, output_hidden_states=True).hidden_states[2]
    (hidden @ other.lm_head.weight.T).log_softmax(-1)[..., 7].sum().backward()
    for name, parameter in other.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("name", SKIPPING)
def test_skipping_the_upper_layers_gives_the_same_gradients(name):
    model = tiny_model(name, torch.float64)
    probe = Probe(model, 2)
    plain = gradients(model, probe)
    seen = []
    model.get_decoder().layers[2].register_forward_hook(lambda *_: seen.append(1))
    skipped = gradients(model, probe, skip_upper_layers=True)
    assert not seen
    assert model.config.get_text_config().num_hidden_layers == 4
    for key, value in skipped.items():
        torch.testing.assert_close(value, plain[key])
    assert all(plain[key].abs().max() == 0 for key in plain.keys() - skipped.keys())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_a_family_that_runs_all_layers_is_refused(name):
    model = tiny_model(name)
    probe = Probe(model, 2)
    with (
        pytest.raises(SettingError, match="skip_upper_layers=False"),
        probe.internal(skip_upper_layers=True),
    ):
        model(IDS, use_cache=False)
    assert model.config.num_hidden_layers == 4
    with torch.no_grad(), probe.internal():
        model(IDS, use_cache=False)


@pytest.mark.parametrize(
    ("layer", "says"), [(0, "count from 1"), (4, "no inner one"), (9, "has 4")]
)
def test_only_inner_layers(layer, says):
    with pytest.raises(SettingError, match=says):
        Probe(tiny_model("llama"), layer)


def test_hooks_go_away_after_a_failure():
    model = tiny_model("llama")

    def armed():
        with Probe(model, 2).internal(skip_upper_layers=True):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        armed()
    left = [module for module in model.modules() if module._forward_hooks]
    assert not left
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.config.num_hidden_layers == 4
