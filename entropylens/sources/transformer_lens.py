"""TransformerLens bridges: unwrapped, and read with the same hooks as any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entropylens.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["is_bridge", "unwrap"]


def is_bridge(model: object) -> bool:
    """Whether this is anything of TransformerLens, asked without importing it."""
    return any(base.__module__.split(".")[0] == "transformer_lens" for base in type(model).__mro__)


def unwrap(bridge: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The Hugging Face model inside a `TransformerBridge`, and its tokenizer.

    Raises:
        SettingError: the bridge's weights were processed, or it holds no model of its own.
    """
    if getattr(bridge, "compatibility_mode", False) or getattr(bridge, "_weights_processed", False):
        raise SettingError(
            "the bridge is in compatibility mode: its weights were folded and centred, which "
            "leaves its predictions alone but moves the raw policies of its layers",
            "pass a bridge on which enable_compatibility_mode() was not called",
        )
    model = vars(bridge).get("original_model")
    if model is None or not hasattr(model, "get_output_embeddings"):
        raise SettingError(
            f"{type(bridge).__name__} holds no Hugging Face model",
            "pass TransformerBridge.boot_transformers(...), or the model itself",
        )
    return model, getattr(bridge, "tokenizer", None)
