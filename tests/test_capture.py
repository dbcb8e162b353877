import pytest
import torch
from tiny import tiny_model

import entropylens
from entropylens.capture import capture, evaluating
from entropylens.recognition import anatomy_of


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_hooks_go_away_after_a_failure(llama, failure):
    def fail(*_args):
        raise failure

    llama.model.layers[2].mlp.register_forward_hook(fail)
    anatomy = anatomy_of(llama)
    with pytest.raises(failure):
        capture(anatomy, torch.arange(3), torch.tensor([[1, 2, 3]]))
    assert hooks(llama) == 1


def test_a_loaded_model_leaves_as_it_came(responses):
    model = tiny_model("llama")
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention, grads = (
        model.config._attn_implementation,
        [p.requires_grad for p in model.parameters()],
    )

    entropylens.analyze(model, responses, progress=False)

    assert [module.training for module in model.modules()] == modes
    assert hooks(model) == 0
    assert model.config._attn_implementation == attention
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_modes_come_back_after_an_exception(llama):
    llama.train()
    seen = []

    def stop():
        with evaluating(llama):
            seen.append(llama.model.layers[0].training)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    assert seen == [False]
    assert llama.model.layers[0].training


def test_the_forward_pass_builds_no_logits(llama, responses):
    from entropylens.measure import measure
    from entropylens.responses import Responses
    from entropylens.sources import hf

    subject = hf.wrap(llama)

    def fail(*_args):
        raise AssertionError("lm_head ran")

    handle = llama.lm_head.register_forward_hook(fail)
    measure(subject, Responses(tuple(responses)), progress=False)
    handle.remove()
