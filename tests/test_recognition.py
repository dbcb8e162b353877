import pytest
import torch
from tiny import CONTEXT, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import entropylens
from entropylens.anatomy import _FAMILIES, Family, anatomy_of, register
from entropylens.errors import UnknownArchitectureError


def test_a_family_is_registered_once():
    with pytest.raises(ValueError, match="already"):
        register(_FAMILIES["llama"])


def opt():
    config = AutoConfig.for_model(
        "opt", vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_an_unknown_model_raises_with_its_tree_and_the_call_to_paste():
    with pytest.raises(UnknownArchitectureError) as caught:
        anatomy_of(opt())
    assert "model_type 'opt'" in caught.value.line
    assert "\n" not in caught.value.line
    assert "entropylens.register(entropylens.Family(model_type='opt'" in caught.value.line
    assert "self_attn: OPTAttention" in caught.value.details
    assert "(0..1, all alike; the first:)" in caught.value.details


def test_a_family_that_does_not_fit_says_which_path(monkeypatch):
    wrong = Family("llama", "model", "layers", "attention", "mlp", "norm")
    monkeypatch.setitem(_FAMILIES, "llama", wrong)
    with pytest.raises(UnknownArchitectureError, match="no attribute 'attention'"):
        anatomy_of(tiny_model("llama"))


def test_a_user_can_register_a_family(monkeypatch):
    monkeypatch.delitem(_FAMILIES, "qwen2")
    model = tiny_model("qwen2")
    with pytest.raises(UnknownArchitectureError):
        anatomy_of(model)
    register(Family("qwen2", "model", "layers", "self_attn", "mlp", "norm"))
    analysis = entropylens.analyze(
        model, [{"prompt_ids": [1, 2], "response_ids": [3]}], progress=False
    )
    assert analysis.num_layers == 4


def test_anatomy_reads_bias_and_context(llama):
    anatomy = anatomy_of(llama)
    assert (anatomy.num_layers, anatomy.context, anatomy.unembedding.bias) == (4, CONTEXT, None)
    llama.lm_head.bias = torch.nn.Parameter(torch.ones(97))
    assert anatomy_of(llama).unembedding.bias.tolist() == [1.0] * 97
