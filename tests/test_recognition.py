import logging

import pytest
import torch
from tiny import CONTEXT, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import entropylens
from entropylens.anatomy import ALONE, Family
from entropylens.errors import NotADecoderError, UnknownArchitectureError
from entropylens.families import _FAMILIES, register
from entropylens.recognition import anatomy_of, understand
from entropylens.verification import verify

ONE = [{"prompt_ids": [1, 2], "response_ids": [3, 4, 5]}]


def test_a_family_that_does_not_fit_says_which_path(monkeypatch):
    monkeypatch.setitem(_FAMILIES, "llama", Family("llama", "attention", "mlp", "norm"))
    with pytest.raises(UnknownArchitectureError, match="no attribute 'attention'"):
        anatomy_of(tiny_model("llama"))


def test_a_user_can_register_a_family(monkeypatch):
    monkeypatch.delitem(_FAMILIES, "qwen2")
    model = tiny_model("qwen2")
    with pytest.raises(UnknownArchitectureError):
        anatomy_of(model)
    register(Family("qwen2", "self_attn", "mlp", "norm"))
    assert anatomy_of(model).num_layers == 4
    assert entropylens.analyze(model, ONE, progress=False).num_layers == 4


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma2", "olmo2", "glm4", "gpt2", "gptj", "gpt_neox", "cohere", "granite",
     "qwen3_moe", "qwen3_next", "mamba", "jamba", "gpt_oss"],
)  # fmt: skip
def test_the_generic_shape_finds_what_the_family_says(name, monkeypatch, caplog):
    model = tiny_model(name)
    known = anatomy_of(model)
    monkeypatch.delitem(_FAMILIES, known.family.model_type)
    with caplog.at_level(logging.WARNING, logger="entropylens"):
        found, verification = understand(model)
    assert verification.holds
    for part in ("layers", "attention", "ffn", "mixers", "final_norm", "parallel"):
        assert getattr(found, part) == getattr(known, part), part
    assert found.residual_scale == known.residual_scale
    assert found.unembedding.transform == known.unembedding.transform
    assert "is no registered family, but its modules" in caplog.text
    # No one knows whether its layers see padding, or keep keys of their own: one by one it is.
    assert (found.passes, known.passes.alike_up_to) == (ALONE, None)

    # The call that it names does what it promises.
    call = caplog.text[caplog.text.index("entropylens.register(") :].splitlines()[0]
    eval(call, {"entropylens": entropylens})
    assert verify(model, anatomy_of(model)).holds
    monkeypatch.delitem(_FAMILIES, known.family.model_type)


def test_a_shape_that_does_not_add_up_is_refused_with_tree_and_call(monkeypatch):
    monkeypatch.delitem(_FAMILIES, "bloom")  # its modules add the residual themselves
    with pytest.raises(UnknownArchitectureError) as caught:
        entropylens.analyze(tiny_model("bloom"), ONE, progress=False)
    line = caught.value.line
    assert "model_type 'bloom' is no registered family" in line
    assert "the generic shape does not hold (layer 1: stream_in + attn_out + ffn_out" in line
    assert "entropylens.register(entropylens.Family(model_type='bloom'" in line
    assert "attention='self_attention'" in line
    assert "\n" not in line
    assert "self_attention: BloomAttention" in caught.value.details
    assert "(0..3, all alike; the first:)" in caught.value.details


def test_no_generic_shape_at_all(monkeypatch):
    monkeypatch.delitem(_FAMILIES, "opt")  # its FFN is no module
    config = AutoConfig.for_model(
        "opt", vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    with pytest.raises(UnknownArchitectureError, match="the generic shape does not hold"):
        understand(AutoModelForCausalLM.from_config(config))


def test_anatomy_reads_bias_and_context(llama):
    anatomy = anatomy_of(llama)
    assert (anatomy.num_layers, anatomy.context, anatomy.unembedding.bias) == (4, CONTEXT, None)
    llama.lm_head.bias = torch.nn.Parameter(torch.ones(97))
    assert anatomy_of(llama).unembedding.bias.tolist() == [1.0] * 97


def test_a_model_without_a_head_says_so(monkeypatch):
    from transformers import AutoModel

    monkeypatch.delitem(_FAMILIES, "llama")
    with pytest.raises(NotADecoderError, match="no unembedding"):
        understand(AutoModel.from_config(tiny_model("llama").config))


def test_what_a_mixer_is_shows_in_its_class():
    from entropylens.anatomy import mixer_of

    for name, kind in {
        "GptOssMLP": "none", "GptOssAttention": "attention", "Qwen3MoeAttention": "attention",
        "GraniteMoeHybridMambaLayer": "ssm", "BambaMixer": "ssm", "NemotronHMoE": "none",
        "Qwen3NextGatedDeltaNet": "linear_attention", "MiniMaxLightningAttention":
        "linear_attention", "MixtralSparseMoeBlock": "none", "Unheard": "attention",
    }.items():  # fmt: skip
        assert mixer_of(type(name, (torch.nn.Module,), {})()) == kind, name
