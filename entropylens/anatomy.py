"""Where a model keeps H, A and F: one frozen spec a family, and its binding to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from entropylens.errors import NotADecoderError, UnknownArchitectureError
from entropylens.policy import Unembedding
from entropylens.transform import IDENTITY, OutputTransform

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["Anatomy", "Family", "anatomy_of", "families", "register"]


@dataclass(frozen=True)
class Family:
    """How one family of models lays out its residual stream (Eq. 1).

    Args:
        model_type: `config.model_type` of its models.
        decoder: path from the causal LM to the module that holds the layers.
        layers: path from the decoder to the list of layers.
        attention: path from a layer to the module whose output is A^l as added to the stream.
        ffn: path from a layer to the module whose output is F^l as added to the stream.
        final_norm: path from the decoder to the norm between H^L and lm_head.
        transform: config -> what the model does to lm_head's output.
    """

    model_type: str
    decoder: str
    layers: str
    attention: str
    ffn: str
    final_norm: str
    transform: Callable[[PretrainedConfig], OutputTransform] = lambda _config: IDENTITY


@dataclass(frozen=True)
class Anatomy:
    """A family's spec bound to one model: the modules that hooks go to.

    Args:
        family: the spec that was bound.
        decoder: runs the layers and the final norm, builds no logits.
        layers, attention, ffn: one module a layer, in order.
        final_norm: reads H^L.
        unembedding: E_u, its bias and the output transform.
        context: positions that the model can take, or None where it has no limit.
    """

    family: Family
    decoder: nn.Module
    layers: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    ffn: tuple[nn.Module, ...]
    final_norm: nn.Module
    unembedding: Unembedding
    context: int | None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of E_u, which is the stream's."""
        return self.unembedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the token ids go."""
        return next(self.decoder.parameters()).device


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known.

    Raises:
        ValueError: its model_type is registered already.
    """
    if family.model_type in _FAMILIES:
        raise ValueError(f"family {family.model_type!r} is registered already")
    _FAMILIES[family.model_type] = family
    return family


def families() -> tuple[Family, ...]:
    """All registered families, in order of registration."""
    return tuple(_FAMILIES.values())


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Bind the model's family to it.

    Raises:
        NotADecoderError: the model has no unembedding.
        UnknownArchitectureError: no family has its model_type, or the paths of the family do
            not exist in it; the message holds the module tree and the call to paste.
    """
    model_type = model.config.model_type
    unembed = model.get_output_embeddings()
    if unembed is None or getattr(unembed, "weight", None) is None:
        raise NotADecoderError(
            f"{type(model).__name__} has no unembedding (lm_head)",
            "load it with AutoModelForCausalLM; entropylens reads decoder-only language models",
        )
    family = _FAMILIES.get(model_type)
    if family is None:
        raise _unknown(model, f"model_type {model_type!r} is no registered family")
    try:
        decoder = attrgetter(family.decoder)(model)
        layers = tuple(attrgetter(family.layers)(decoder))
        attention = tuple(attrgetter(family.attention)(layer) for layer in layers)
        ffn = tuple(attrgetter(family.ffn)(layer) for layer in layers)
        final_norm = attrgetter(family.final_norm)(decoder)
    except AttributeError as error:
        raise _unknown(model, f"family {model_type!r} does not fit: {error}") from error
    return Anatomy(
        family=family,
        decoder=decoder,
        layers=layers,
        attention=attention,
        ffn=ffn,
        final_norm=final_norm,
        unembedding=Unembedding(
            weight=unembed.weight.detach(),
            bias=None if unembed.bias is None else unembed.bias.detach(),
            transform=family.transform(model.config),
        ),
        context=getattr(model.config, "max_position_embeddings", None),
    )


def _unknown(model: PreTrainedModel, cause: str) -> UnknownArchitectureError:
    call = (
        f"entropylens.register(entropylens.Family(model_type={model.config.model_type!r}, "
        "decoder='model', layers='layers', attention='self_attn', ffn='mlp', final_norm='norm'))"
    )
    return UnknownArchitectureError(
        cause,
        f"name its modules with {call}",
        details=f"Modules of {type(model).__name__}:\n{_module_tree(model)}",
    )


def _module_tree(module: nn.Module, depth: int = 6, indent: int = 1) -> str:
    """The module tree, of a list of layers only the first."""
    lines: list[str] = []
    children = list(module.named_children())
    if isinstance(module, nn.ModuleList) and len(children) > 1:
        lines.append(f"{'  ' * indent}(0..{len(children) - 1}, all alike; the first:)")
        children = children[:1]
    for name, child in children:
        lines.append(f"{'  ' * indent}{name}: {type(child).__name__}")
        if depth > 1:
            subtree = _module_tree(child, depth - 1, indent + 1)
            if subtree:
                lines.append(subtree)
    return "\n".join(lines)


def _llama_like(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        decoder="model",
        layers="layers",
        attention="self_attn",
        ffn="mlp",
        final_norm="norm",
    )


for _model_type in ("llama", "mistral", "qwen2", "qwen3", "smollm3"):
    register(_llama_like(_model_type))

register(
    Family(
        model_type="gpt2",
        decoder="transformer",
        layers="h",
        attention="attn",
        ffn="mlp",
        final_norm="ln_f",
    )
)


def first_tensor(output: Any) -> torch.Tensor:
    """A module's hidden states, whether it returns them alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output
