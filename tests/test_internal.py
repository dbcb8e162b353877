import pytest
import torch
from tiny import tiny_model

from entropylens import internal_policy
from entropylens.errors import SettingError


def test_internal_policies_are_those_of_the_hidden_states(any_model):
    ids = [5, 8, 13, 21]
    with torch.no_grad():
        hidden = any_model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    weight = any_model.get_output_embeddings().weight
    for layer in range(4):  # hidden_states[-1] is normed: it is not H^L
        expected = torch.log_softmax(hidden[layer][0] @ weight.T, -1)
        torch.testing.assert_close(internal_policy(any_model, ids, layer), expected)


@pytest.mark.parametrize(
    ("layer", "module", "ids"),
    [
        (5, None, [1]),
        (-1, None, [1]),
        (0, "ffn", [1]),
        (2, "mlp", [1]),
        (2, None, []),
        (2, None, [97]),
    ],
)
def test_what_does_not_exist_is_refused(llama, layer, module, ids):
    with pytest.raises(SettingError):
        internal_policy(llama, ids, layer, module)


def test_a_layer_without_this_module():
    with pytest.raises(SettingError, match="layer 2 has no ffn"):
        internal_policy(tiny_model("mamba"), [1, 2], 2, "ffn")
