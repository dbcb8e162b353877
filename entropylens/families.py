"""The registered families.

Each entry says only where it differs from the Llama layout. tests/test_families.py holds every
one against verify() and a plain computation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entropylens.anatomy import Family
from entropylens.errors import SettingError
from entropylens.transform import IDENTITY

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["families", "family_of", "register"]

_FAMILIES: dict[str, Family] = {}


def register(family: Family, *, replace: bool = False) -> Family:
    """Make a family known.

    Args:
        family: its spec.
        replace: put it in the place of a registered one.

    Raises:
        SettingError: its model_type is registered already.
    """
    if family.model_type in _FAMILIES and not replace:
        raise SettingError(
            f"family {family.model_type!r} is registered already", "pass replace=True to change it"
        )
    _FAMILIES[family.model_type] = family
    return family


def families() -> tuple[Family, ...]:
    """All registered families, in order of registration."""
    return tuple(_FAMILIES.values())


def family_of(model_type: str) -> Family | None:
    """The registered family of this name, or None."""
    return _FAMILIES.get(model_type)


def _family(model_type: str, **differences: Any) -> None:
    layout: dict[str, Any] = {"attention": "self_attn", "ffn": "mlp", "final_norm": "norm"}
    register(Family(model_type=model_type, **(layout | differences)))


def _always(_config: PretrainedConfig) -> bool:
    return True


def _opt_refusal(config: PretrainedConfig) -> str | None:
    if not config.do_layer_norm_before:
        return "it norms the stream itself after each module (do_layer_norm_before=False)"
    if config.word_embed_proj_dim != config.hidden_size:
        return "it projects the last state before lm_head (project_out)"
    return "it has no final norm" if config._remove_final_layer_norm else None


def _bloom_refusal(config: PretrainedConfig) -> str | None:
    if config.apply_residual_connection_post_layernorm:
        return "it carries the norm's output on (apply_residual_connection_post_layernorm)"
    return None


for _name in (
    *("llama", "mistral", "ministral", "ministral3", "mixtral", "gemma", "phi3", "olmo", "olmoe"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "deepseek_v2", "deepseek_v3"),
    *("glm", "glm4_moe", "gpt_oss", "nemotron", "starcoder2", "seed_oss", "arcee", "helium"),
    *("apertus", "dots1", "ernie4_5", "granite"),
):
    _family(_name)

_POST_NORMS = {
    "attention_out": "post_attention_layernorm",
    "ffn_out": "post_feedforward_layernorm",
}
for _name in ("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"):
    _family(_name, **_POST_NORMS)
_family("glm4", attention_out="post_self_attn_layernorm", ffn_out="post_mlp_layernorm")

for _name in ("cohere", "cohere2"):
    _family(_name, parallel=_always)
_family("phi", final_norm="final_layernorm", parallel=_always)
_family("stablelm", parallel=lambda config: config.use_parallel_residual)
_family(
    "gpt_neox",
    attention="attention",
    final_norm="final_layer_norm",
    parallel=lambda config: config.use_parallel_residual,
)
_family(
    "falcon",
    layers="h",
    attention="self_attention",
    final_norm="ln_f",
    parallel=lambda config: config.new_decoder_architecture or config.parallel_attn,
)

_GPT = {"layers": "h", "attention": "attn", "final_norm": "ln_f"}
_family("gpt2", **_GPT)
_family("gpt_neo", **_GPT)
_family("gptj", parallel=_always, **_GPT)
_family("opt", ffn="fc1", ffn_out="fc2", final_norm="final_layer_norm", refusal=_opt_refusal)
_family(
    "bloom",
    layers="h",
    attention="self_attention",
    attention_out="self_attention.dense",
    ffn_out="mlp.dense_4h_to_h",
    final_norm="ln_f",
    refusal=_bloom_refusal,
)
_family(
    "mpt",
    layers="blocks",
    attention="attn",
    ffn="ffn",
    ffn_out="ffn.down_proj",
    final_norm="norm_f",
    transform=lambda _config: IDENTITY,  # transformers does not apply its logit_scale
)

_family("granitemoe", ffn="block_sparse_moe")
_family(
    "granitemoehybrid",
    attention=("self_attn", "mamba"),
    ffn=("shared_mlp", "block_sparse_moe"),
)
_family("llama4_text", ffn="feed_forward")

for _name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"):
    _family(_name, attention=("self_attn", "linear_attn"))
for _name in ("jamba", "bamba"):
    _family(
        _name, attention=("self_attn", "mamba"), ffn="feed_forward", final_norm="final_layernorm"
    )
for _name in ("mamba", "mamba2"):
    _family(_name, decoder="backbone", attention="mixer", ffn=(), final_norm="norm_f")
_family("nemotron_h", attention="mixer", ffn="mixer", final_norm="norm_f")
