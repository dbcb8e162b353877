import copy

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

import entropylens
from entropylens.errors import SettingError
from entropylens.quantities import quantities_of

TransformerBridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")  # a bridge loads its tokenizer again by name
    tiny_tokenizer().save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def bridge_of(model, tokenizer):
    model.config.architectures = [type(model).__name__]
    return TransformerBridge.boot_transformers(
        model.config.model_type, hf_model=model, device="cpu", tokenizer=tokenizer
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "olmo2", "gpt2"])
def test_a_bridge_gives_the_numbers_of_its_model(family, responses, tokenizer):
    model = tiny_model(family)
    model.set_attn_implementation("eager")  # as a bridge has it
    expected = entropylens.analyze(model, responses, reading="both", progress=False)
    bridge = bridge_of(copy.deepcopy(model), tokenizer)
    found = entropylens.analyze(bridge, responses, reading="both", progress=False)
    for name in quantities_of("both"):
        np.testing.assert_allclose(
            found.layers[name], expected.layers[name], atol=1e-5, rtol=1e-5, err_msg=name
        )
    assert found.mixers == expected.mixers


def test_processed_weights_are_refused(responses, tokenizer):
    bridge = bridge_of(tiny_model("llama"), tokenizer)
    bridge.enable_compatibility_mode()
    with pytest.raises(SettingError, match="compatibility mode"):
        entropylens.analyze(bridge, responses, progress=False)
