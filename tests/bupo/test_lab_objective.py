import numpy as np
import pytest
import torch
from bupo.lab.objective import advantages, policy_loss, speak
from bupo.probe import Probe
from engines import (
    LAYER,
    batch_of,
    build,
    gradients,
    group,
    internal,
    plain_model,
    plain_policy,
    samples,
    save_model,
)
from transformers import AutoModelForCausalLM

from entropylens.responses import Response

pytestmark = pytest.mark.usefixtures("one_group")


@pytest.fixture(scope="module")
def one_group():
    with group():
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("lab"), "qwen3-tied")


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")


def responses(items):
    return [Response(tuple(it.prompt), tuple(it.response)) for it in items]


@pytest.mark.parametrize("order", [None, internal(skip_upper_layers=True)])
@pytest.mark.parametrize("entropy_coeff", [0.0, 0.01])
def test_the_laboratory_and_bupo_have_the_same_gradients(path, order, entropy_coeff):
    items = samples()
    loss, expected = gradients(build(path), batch_of(items, order), entropy_coeff=entropy_coeff)
    model = load(path)
    spoken = speak(model, responses(items), None if order is None else Probe(model, LAYER))
    old = torch.full(spoken.mask.shape, -4.0)
    signal = torch.tensor([it.advantage for it in items])[:, None] * spoken.mask
    found = policy_loss(spoken, old, signal, entropy_coeff=entropy_coeff)
    assert float(found.detach()) == pytest.approx(loss, rel=1e-5)
    found.backward()
    given = {name: it.grad for name, it in model.named_parameters() if it.grad is not None}
    moved = {name for name, gradient in expected.items() if bool(gradient.any())}
    assert moved
    assert moved <= set(given)
    for name, gradient in given.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("layer", [None, LAYER])
def test_a_policy_speaks_as_written_out_in_float64(path, layer):
    items, model, exact = samples(), load(path), plain_model(path)
    with torch.no_grad():
        spoken = speak(model, responses(items), layer and Probe(model, layer))
        for row, item in enumerate(items):
            wanted = plain_policy(exact, item, layer)
            count = len(item.response)
            torch.testing.assert_close(
                spoken.log_probs[row, :count].double(), wanted.log_probs, rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(
                spoken.entropy[row, :count].double(), wanted.entropy, rtol=1e-4, atol=1e-4
            )
            assert spoken.mask[row].tolist() == [1] * count + [0] * (spoken.mask.shape[1] - count)
            assert not spoken.log_probs[row, count:].any()


def test_advantages_are_those_of_the_equations():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
    groups = [0, 0, 0, 1, 1, 1]
    first, second = rewards[:3].numpy(), rewards[3:].numpy()
    grpo = [(it - it.mean()) / (it.std(ddof=1) + 1e-6) for it in (first, second)]
    rloo = [it - (it.sum() - it) / 2 for it in (first, second)]
    for name, wanted in (("grpo", grpo), ("rloo", rloo)):
        found = advantages(name, rewards, mask, groups)
        expected = np.concatenate(wanted)[:, None] * mask.numpy()
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    of_tokens = rewards.numpy().repeat(mask.sum(-1).numpy())
    whitened = (of_tokens - of_tokens.mean()) / np.sqrt(of_tokens.var(ddof=1) + 1e-8)
    found = advantages("reinforce_plus_plus", rewards, mask, groups)
    np.testing.assert_allclose(found[mask.bool()].numpy(), whitened, rtol=1e-4)
