"""The same model through every front door gives the same numbers."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny import CONTEXT, EVERY_FAMILY, VOCAB, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import entropylens
from entropylens.errors import SettingError, WeightsError
from entropylens.quantities import quantities_of
from entropylens.recognition import anatomy_of
from entropylens.sources import hf


def loaded(model, _path):
    return model


def directory(model, path):
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def checkpoint(model, path):
    actor = path / "global_step_3" / "actor"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(actor / "huggingface")
    torch.save(model.state_dict(), actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    return path


def adapted(model, _path):
    """A LoRA that adds nothing yet."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))


def bridge(model, path):
    lens = pytest.importorskip("transformer_lens.model_bridge")
    model.config.architectures = [type(model).__name__]
    tiny_tokenizer().save_pretrained(path)
    return lens.TransformerBridge.boot_transformers(
        model.config.model_type, hf_model=model, device="cpu",
        tokenizer=AutoTokenizer.from_pretrained(path),
    )  # fmt: skip


def traced(model, _path):
    nnsight = pytest.importorskip("nnsight")
    return nnsight.TransformersModel(model, tokenizer=tiny_tokenizer())


DOORS = {
    "loaded": loaded, "directory": directory, "checkpoint": checkpoint, "peft": adapted,
    "bridge": bridge, "nnsight": traced, "nnsight-remote": traced,
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "gpt2", "qwen3_moe"])
def test_every_door_gives_the_same_numbers(family, door, responses, tmp_path):
    model = tiny_model(family)
    if door == "bridge" or family == "gemma2":
        model.set_attn_implementation("eager")  # as it wants it, and as a soft cap needs it
    expected = entropylens.analyze(model, responses[:3], reading="both", progress=False)
    opened = DOORS[door](copy.deepcopy(model), tmp_path)
    remote = "local" if door == "nnsight-remote" else False
    found = entropylens.analyze(
        opened, responses[:3], reading="both", remote=remote, progress=False
    )
    for name in quantities_of("both"):
        np.testing.assert_allclose(
            found.layers[name], expected.layers[name], atol=1e-5, rtol=1e-5, err_msg=name
        )
    assert found.mixers == expected.mixers
    assert found.policy_nll == pytest.approx(expected.policy_nll, abs=1e-5)


def trained_lora(model, **settings):
    """A LoRA whose matrices are random, so that it changes what it is put on."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, **settings))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return adapted.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_is_read_as_if_it_were_merged(settings, responses):
    adapted = trained_lora(tiny_model("llama"), **settings)
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = entropylens.analyze(merged, responses, reading="both", progress=False).layers
    plain = entropylens.analyze(tiny_model("llama"), responses, progress=False).layers
    found = entropylens.analyze(adapted, responses, reading="both", progress=False).layers
    names = [*quantities_of("both")]
    np.testing.assert_allclose(found[names], expected[names], atol=2e-3, rtol=1e-3)
    assert (found["entropy_layer"] - plain["entropy_layer"]).abs().max() > 1e-2


def test_virtual_tokens_are_refused(responses):
    peft = pytest.importorskip("peft")
    prompted = peft.get_peft_model(
        tiny_model("llama"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    with pytest.raises(SettingError, match="virtual tokens"):
        entropylens.analyze(prompted, responses, progress=False)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_is_read_as_it_computes(bits, responses, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    # bitsandbytes' fast path for CPUs, where there is one, wants whole blocks of 64 weights.
    wide = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    directory(LlamaForCausalLM(wide), tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        device_map="cpu", dtype=torch.float32,
    )  # fmt: skip
    kinds = {type(module).__name__ for module in quantized.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    subject = hf.wrap(quantized)  # its states add up, and its logits are rebuilt
    assert subject.verification.holds
    found = entropylens.analyze(quantized, responses, progress=False).layers
    plain = entropylens.analyze(tmp_path, responses, progress=False).layers
    error = (found["entropy_layer"] - plain["entropy_layer"]).abs().max()
    assert 0 < error < 0.5


@pytest.mark.parametrize("everything", [False, True])
def test_an_offloaded_model_is_read_from_where_it_lies(everything, responses, tmp_path):
    from accelerate import dispatch_model

    expected = entropylens.analyze(
        tiny_model("llama"), responses, reading="both", progress=False
    ).layers
    place = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cpu")
    rest = ("model.layers.1", "model.layers.2", "model.layers.3", "model.norm", "lm_head")
    place |= dict.fromkeys(rest, "disk")
    if everything:
        place["model.embed_tokens"] = "disk"
    model = dispatch_model(
        tiny_model("llama"), place, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    assert model.lm_head.weight.is_meta
    found = entropylens.analyze(model, responses, reading="both", progress=False).layers
    names = [*quantities_of("both")]
    np.testing.assert_allclose(found[names], expected[names], atol=1e-5, rtol=1e-5)
    assert model.lm_head.weight.is_meta


def test_an_unembedding_that_was_never_loaded_is_refused(responses):
    model = tiny_model("llama").to("meta")
    with pytest.raises(WeightsError, match="never loaded"):
        entropylens.analyze(model, responses, progress=False)


#: Wrapper -> the tiny family inside it.
WRAPPERS = {"gemma3": "gemma3", "mistral3": "mistral", "llama4": "llama4", "qwen3_5": "qwen3_5"}


def wrapper(name):
    config = AutoConfig.for_model(name)
    small = tiny_config(WRAPPERS[name])
    config.text_config = small
    for key in ("image_token_index", "image_token_id", "boi_token_index", "eoi_token_index",
                "video_token_id", "vision_start_token_id", "vision_end_token_id"):  # fmt: skip
        if hasattr(config, key):
            setattr(config, key, VOCAB - 2)
    vision = config.vision_config
    for key, value in {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "depth": 1,
        "num_attention_heads": 2, "num_heads": 2, "image_size": 28, "patch_size": 14,
        "out_hidden_size": 32, "vision_output_dim": 16, "projector_input_dim": 16,
        "projector_output_dim": 16, "head_dim": 8, "num_position_embeddings": 4,
    }.items():  # fmt: skip
        if hasattr(vision, key):
            setattr(vision, key, value)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_text_stack_of_a_wrapper_is_found_and_read(name, responses, tmp_path):
    model = wrapper(name)
    subject = hf.wrap(model)
    assert subject.verification.holds
    assert subject.anatomy.family.model_type == EVERY_FAMILY[WRAPPERS[name]][0]
    found = entropylens.analyze(model, responses, progress=False).layers

    # The same text stack alone gives the same.
    alone = tiny_model(WRAPPERS[name])
    inner = anatomy_of(model).decoder
    anatomy_of(alone).decoder.load_state_dict(inner.state_dict())
    with torch.no_grad():
        alone.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight)
    expected = entropylens.analyze(alone, responses, progress=False).layers
    names = [*quantities_of("raw")]
    np.testing.assert_allclose(found[names], expected[names], atol=1e-5, rtol=1e-5)

    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path)
    from_disk = entropylens.analyze(tmp_path, responses, progress=False).layers
    np.testing.assert_allclose(from_disk[names], expected[names], atol=1e-5, rtol=1e-5)


def test_gemma_2_is_loaded_with_the_soft_cap_of_its_attention(responses, tmp_path, caplog):
    model = tiny_model("gemma2")
    path = directory(model, tmp_path)
    model.set_attn_implementation("eager")
    expected = entropylens.analyze(model, responses, progress=False).layers
    assert "soft cap" not in caplog.text
    found = entropylens.analyze(path, responses, progress=False).layers
    names = [*quantities_of("raw")]
    np.testing.assert_allclose(found[names], expected[names], atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("sdpa")
    entropylens.analyze(model, responses, progress=False)
    assert "without the soft cap" in caplog.text


def test_runs_with_other_adapters_are_other_runs(responses, tmp_path):
    adapted = trained_lora(tiny_model("llama"), target_modules=["q_proj"])
    with_it = hf.wrap(adapted).fingerprint
    assert hf.wrap(adapted).fingerprint == with_it
    with adapted.disable_adapter():
        assert hf.wrap(adapted).fingerprint != with_it


def test_an_adapter_of_lm_head_that_is_no_plain_lora_is_refused(responses):
    adapted = trained_lora(tiny_model("llama"), target_modules=["lm_head"], use_dora=True)
    with pytest.raises(WeightsError, match="merge_and_unload"):
        entropylens.analyze(adapted, responses, progress=False)
