"""Every family: its states add up, and every quantity is the plain one."""

import numpy as np
import pytest
import torch
from reference import plain_quantities
from tiny import EVERY_FAMILY, tiny_config, tiny_model

import entropylens
from entropylens.errors import NotADecoderError, SettingError
from entropylens.families import _FAMILIES, families, register
from entropylens.quantities import quantities_of
from entropylens.recognition import anatomy_of
from entropylens.verification import verify

SSM = {"granitemoehybrid", "mamba", "mamba2", "jamba", "bamba", "nemotron_h"}
PARALLEL = {
    *("phi", "gptj", "gpt_neox", "falcon-7b", "falcon-40b", "falcon-11b"),
    *("stablelm-parallel", "cohere", "cohere2"),
}


def test_a_family_is_registered_once():
    with pytest.raises(SettingError, match="replace=True"):
        register(_FAMILIES["llama"])


def test_every_registered_family_is_tested():
    tested = {model_type for model_type, _ in EVERY_FAMILY.values()}
    # Mistral's small models and Qwen3.5's mixtures share a layout with a family that is.
    alike = {"ministral3", "qwen3_5_moe_text"}
    assert {family.model_type for family in families()} - alike == tested


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_every_family_adds_up(name):
    model = tiny_model(name)
    anatomy = anatomy_of(model)
    found = verify(model, anatomy)
    assert found.holds
    assert max(found.stream_errors) < 1e-6
    assert found.logits_error < 1e-6
    assert anatomy.parallel == (name in PARALLEL)
    assert ("ssm" in anatomy.mixers) == (name in SSM)
    assert ("linear_attention" in anatomy.mixers) == (name in {"qwen3_next", "qwen3_5"})
    assert "attention" in anatomy.mixers or name in {"mamba", "mamba2"}


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_every_quantity_of_every_family_is_the_plain_one(name, responses):
    model = tiny_model(name, torch.float64)
    chosen = [responses[0], responses[2]]
    frame = entropylens.analyze(model, chosen, reading="both", progress=False).responses
    for index, response in enumerate(chosen):
        expected, policy_entropy, policy_nll = plain_quantities(model, response)
        rows = frame[frame["response_id"] == index]
        for quantity, values in expected.items():
            np.testing.assert_allclose(
                rows[quantity], values, atol=1e-4, rtol=1e-5, err_msg=quantity
            )
        assert rows["policy_entropy"].iloc[0] == pytest.approx(policy_entropy, abs=1e-5)
        assert rows["policy_nll"].iloc[0] == pytest.approx(policy_nll, abs=1e-5)
    controls = {"control_delta_attn", "control_delta_ffn"}
    assert set(quantities_of("both")) - set(expected) == controls


@pytest.mark.parametrize(
    ("name", "differences", "reason"),
    [
        ("opt", {"do_layer_norm_before": False}, "norms the stream itself"),
        ("opt", {"word_embed_proj_dim": 16}, "project_out"),
        ("opt", {"_remove_final_layer_norm": True}, "no final norm"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "carries the norm's output"),
    ],
)
def test_no_additive_stream_is_refused_with_the_reason(name, differences, reason):
    from transformers import AutoModelForCausalLM

    config = tiny_config(name)
    for key, value in differences.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(NotADecoderError, match=reason):
        entropylens.analyze(model, [{"prompt_ids": [1], "response_ids": [2]}], progress=False)
