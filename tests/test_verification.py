import pytest
import torch
from tiny import FAMILIES, tiny_model

from entropylens.errors import DecompositionError, NonFiniteStatesError
from entropylens.recognition import anatomy_of
from entropylens.verification import verify


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_adds_up(family, dtype):
    model = tiny_model(family, dtype)
    found = verify(model, anatomy_of(model))
    assert found.holds
    assert len(found.stream_errors) == 4
    if dtype is torch.float32:
        assert max(found.stream_errors) < 1e-6
        assert found.stream_bound == 1e-4
    else:
        assert found.stream_bound == pytest.approx(4 * 2**-7 * 2)


@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_a_hidden_addition_to_the_stream_is_found(llama, size):
    def add(_module, _args, output):
        return output + size * torch.ones_like(output)

    llama.model.layers[2].register_forward_hook(add)
    found = verify(llama, anatomy_of(llama))
    assert [error > found.stream_bound for error in found.stream_errors] == [
        False,
        False,
        True,
        False,
    ]
    with pytest.raises(DecompositionError, match="layer 3: stream_in"):
        found.raise_if_broken()


def test_an_unknown_output_transform_is_found(llama):
    llama.lm_head.register_forward_hook(lambda _module, _args, output: output * 1.5)
    found = verify(llama, anatomy_of(llama))
    assert not any(error > found.stream_bound for error in found.stream_errors)
    with pytest.raises(DecompositionError, match="logits that differ"):
        found.raise_if_broken()


def test_nan_does_not_pass(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    found = verify(llama, anatomy_of(llama))
    assert not found.holds
    with pytest.raises(NonFiniteStatesError, match="layer 2 are NaN"):
        found.raise_if_broken()


def test_states_may_be_of_another_type_than_the_unembedding():
    model = tiny_model("falcon-7b", torch.bfloat16)  # parallel: its sum rounds twice
    model.lm_head = torch.nn.Linear(32, 97, bias=False)
    model.lm_head.register_forward_pre_hook(lambda _module, args: (args[0].float(),))
    found = verify(model, anatomy_of(model))
    assert found.dtype == torch.bfloat16
    assert found.holds
