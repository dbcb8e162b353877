"""Tiny random models of every registered family, on which its anatomy is proven.

The tests run on them, and `entropylens doctor --families` shows what holds on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["CONTEXT", "EVERY_FAMILY", "VOCAB", "tiny_config", "tiny_model"]

VOCAB = 97
CONTEXT = 512

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_HEADS = {"head_dim": 8}
_GPT = {"n_embd": 32, "n_head": 4, "n_positions": CONTEXT}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "n_group": 2, "topk_group": 1,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2}
_MAMBA2 = _MAMBA | {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
}  # fmt: skip
_LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 140,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 140,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    },
}  # fmt: skip
_FALCON: dict[str, Any] = {
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
}

#: Case -> (model_type, what its tiny config has beside _SIZES); a case is a family or a variant.
EVERY_FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama", "qwen2", "smollm3", "olmo", "arcee")},
    "mistral": ("mistral", {"sliding_window": 16}),
    "llama3-rope": ("llama", {"rope_theta": 5e5, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", _HEADS),
    "qwen3-tied": ("qwen3", _HEADS | {"tie_word_embeddings": True}),
    "ministral": ("ministral", _HEADS | {"sliding_window": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS | _HEADS),
    "qwen3_next": (
        "qwen3_next",
        _EXPERTS | _HEADS | _LINEAR | {"shared_expert_intermediate_size": 24},
    ),
    "qwen3_5": ("qwen3_5_text", _HEADS | _LINEAR),
    "gemma": ("gemma", _HEADS),
    "gemma2": (
        "gemma2",
        _HEADS
        | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "sliding_window": 16},
    ),
    "gemma3": ("gemma3_text", _HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 8}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"pad_token_id": VOCAB - 1}),
    "phi3-longrope": ("phi3", {"pad_token_id": VOCAB - 1, **_LONGROPE}),
    "gpt2": ("gpt2", _GPT),
    "gpt_neo": (
        "gpt_neo",
        {
            "attention_types": [[["global", "local"], 2]],
            "num_layers": 4,
            "num_heads": 4,
            "window_size": 16,
        },
    ),
    "gptj": ("gptj", _GPT | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"n_head": 4}),
    "falcon-7b": ("falcon", _FALCON),
    "falcon-rw": ("falcon", _FALCON | {"parallel_attn": False, "alibi": True, "bias": True}),
    "falcon-40b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2},
    ),
    "falcon-11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "stablelm": ("stablelm", {}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 16}),
    "olmoe": ("olmoe", _EXPERTS),
    "exaone4": ("exaone4", {"sliding_window": 16}),
    "granite": (
        "granite",
        {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 6.0},
    ),
    "granitemoe": (
        "granitemoe",
        {"num_local_experts": 4, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        _MAMBA2
        | {
            "num_local_experts": 4, "shared_intermediate_size": 24, "residual_multiplier": 0.3,
            "layer_types": ["mamba", "attention"] * 2, "logits_scaling": 4.0,
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", _HEADS | {"logit_scale": 0.25, "sliding_window": 16}),
    "deepseek_v2": ("deepseek_v2", _MLA),
    "deepseek_v3": ("deepseek_v3", _MLA),
    "glm": ("glm", _HEADS),
    "glm4": ("glm4", _HEADS),
    "glm4_moe": (
        "glm4_moe",
        _HEADS | {name: _MLA[name] for name in _MLA if "rank" not in name and "head" not in name},
    ),
    "gpt_oss": ("gpt_oss", _HEADS | {"num_local_experts": 4, "sliding_window": 16}),
    "nemotron": ("nemotron", {}),
    "starcoder2": ("starcoder2", {}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": CONTEXT}),
    "llama4": (
        "llama4_text",
        _HEADS | {
            "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
    ),
    "seed_oss": ("seed_oss", _HEADS),
    "apertus": ("apertus", {}),
    "helium": ("helium", _HEADS),
    "ernie4_5": ("ernie4_5", _HEADS),
    "dots1": (
        "dots1",
        {name: _MLA[name] for name in _MLA if "rank" not in name and "head" not in name},
    ),
    "mamba": ("mamba", {"state_size": 4}),
    "mamba2": (
        "mamba2",
        {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "jamba": (
        "jamba",
        _MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4,
                  "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 4},
    ),
    "bamba": ("bamba", _MAMBA2 | {"attn_layer_indices": [1, 3]}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"], "mamba_num_heads": 8,
            "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4, "chunk_size": 8, "head_dim": 8,
        },
    ),
}  # fmt: skip


def tiny_config(family: str, layers: int = 4) -> PretrainedConfig:
    """The configuration of a case of EVERY_FAMILY, d_model 32."""
    from transformers import AutoConfig

    model_type, differences = EVERY_FAMILY[family]
    sizes = _SIZES | {"num_hidden_layers": layers}
    if model_type in ("gpt2", "gptj"):
        sizes = {"n_layer": layers}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": VOCAB - 1}
    settings = {"vocab_size": VOCAB} | sizes | special | differences
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, layers: int = 4, seed: int = 0
) -> PreTrainedModel:
    """A random model of a case; its weights are large enough for peaked policies."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(family, layers)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    return model.to(dtype).eval()
