"""Where a model keeps H, A and F: a frozen spec of its family, bound to its modules.

The registered families themselves are in families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from entropylens.errors import NotADecoderError
from entropylens.policy import Unembedding
from entropylens.transform import OutputTransform
from entropylens.unembedding import bias_of, weight_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "ALONE",
    "PLAIN",
    "Anatomy",
    "Branch",
    "Family",
    "MisfitError",
    "Passes",
    "bind",
    "decoder_of",
    "first_input",
    "first_tensor",
    "input_device",
    "longrope_switch",
    "mixer_of",
    "text_config",
]


def output_transform(config: PretrainedConfig) -> OutputTransform:
    """What the settings that transformers has for it say is done to the logits."""
    return OutputTransform(
        scale=getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def residual_multiplier(config: PretrainedConfig) -> float:
    """The factor on both branches that a configuration names, or 1."""
    return float(getattr(config, "residual_multiplier", 1.0))


class MisfitError(Exception):
    """A family's paths do not exist in a model; recognition.py tells users what to do."""


@dataclass(frozen=True)
class Family:
    """How one family of models lays out its residual stream (Eq. 1).

    Paths are attribute paths such as "mlp.down_proj". Several paths of one branch stand for what
    a layer may have: those that exist in a layer all read the same, and their outputs add up.
    `config` is always that of the text stack.

    Args:
        model_type: `config.model_type` of its text stack.
        attention: paths from a layer to the modules that read attn_in (any token mixer).
        ffn: the same for ffn_in; empty where layers have no FFN.
        final_norm: path from the decoder to the norm between H^L and lm_head.
        layers: path from the decoder to the list of layers.
        decoder: path from the causal LM to the module that holds the layers, or None for what
            `decoder_of` finds.
        attention_out: path from a layer to the module whose output is A^l as added to the
            stream, where that is not `attention` itself (a post-norm, an inner projection).
        ffn_out: the same for F^l.
        parallel: config -> do both branches read H^{l-1}, so that there is no middle state?
        residual_scale: config -> factor on both branches before they are added.
        transform: config -> what the model does to lm_head's output.
        refusal: config -> why this model has no additive stream, or None.
    """

    model_type: str
    attention: str | tuple[str, ...]
    ffn: str | tuple[str, ...]
    final_norm: str
    layers: str = "layers"
    decoder: str | None = None
    attention_out: str | None = None
    ffn_out: str | None = None
    parallel: Callable[[PretrainedConfig], bool] = lambda _config: False
    residual_scale: Callable[[PretrainedConfig], float] = residual_multiplier
    transform: Callable[[PretrainedConfig], OutputTransform] = output_transform
    refusal: Callable[[PretrainedConfig], str | None] = lambda _config: None


@dataclass(frozen=True)
class Branch:
    """One branch of a layer: attention or FFN.

    Args:
        reads: its first argument is what the branch reads.
        adds: their outputs, summed and scaled, are what it adds to the stream.
    """

    reads: nn.Module
    adds: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Passes:
    """What a forward pass of a model may hold without changing a state.

    Args:
        continues: it can go on from the key-value cache of an earlier one.
        alike_up_to: the length of a response beyond which its states depend on the longest
            position of the pass, so that it is read alone and whole; None for no such length.
    """

    continues: bool = False
    alike_up_to: int | None = None

    def takes(self, length: int) -> bool:
        """Whether a response of so many positions may be in a pass with others, or in pieces."""
        return self.alike_up_to is None or length <= self.alike_up_to


#: Several responses a pass, each from its start; and every response on its own.
PLAIN, ALONE = Passes(), Passes(alike_up_to=0)


@dataclass(frozen=True)
class Anatomy:
    """A family's spec bound to one model: the modules that hooks go to.

    Args:
        family: the spec that was bound.
        decoder: runs the layers and the final norm, builds no logits.
        layers: one module a layer, in order.
        attention, ffn: one branch a layer, None where a layer has none.
        mixers: what each layer's `attention` is: attention | linear_attention | ssm | none.
        final_norm: reads H^L.
        parallel: both branches read H^{l-1}.
        residual_scale: factor on what is added.
        lm_head: the module that unembeds.
        transform: what the model does to its logits.
        context: positions that the model can take, or None where it has no limit.
        passes: what its forward passes may hold.
    """

    family: Family
    decoder: Any
    layers: tuple[nn.Module, ...]
    attention: tuple[Branch | None, ...]
    ffn: tuple[Branch | None, ...]
    mixers: tuple[str, ...]
    final_norm: nn.Module
    parallel: bool
    residual_scale: float
    lm_head: nn.Module
    transform: OutputTransform
    context: int | None
    passes: Passes

    @cached_property
    def unembedding(self) -> Unembedding:
        """E_u, its bias and the output transform; of what is loaded when it is first asked for.

        Raises:
            WeightsError: it is not loaded, or in a way that is not understood.
        """
        return Unembedding(
            weight=weight_of(self.lm_head), bias=bias_of(self.lm_head), transform=self.transform
        )

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where the token ids go."""
        return input_device(self.decoder)

    def norm(self, states: torch.Tensor) -> torch.Tensor:
        """N(states), wherever the norm's weights are."""
        weights = next((it for it in self.final_norm.parameters() if not it.is_meta), None)
        if weights is None:
            return first_tensor(self.final_norm(states))
        return first_tensor(self.final_norm(states.to(weights.device))).to(states.device)


def _passes(decoder: Any, mixers: Sequence[str]) -> Passes:
    """Transformers continues recurrent states token by token only, and has kinds of model for
    them, whose caches may want such a layer."""
    recurrent = getattr(decoder, "_is_stateful", False)
    return Passes(
        continues=not recurrent and all(mixer in ("attention", "none") for mixer in mixers),
        alike_up_to=longrope_switch(decoder.config),
    )


def longrope_switch(config: PretrainedConfig) -> int | None:
    """LongRoPE has two sets of frequencies, one for passes over so many positions and one for
    longer ones. None where a model has none."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [it for it in (rope, *rope.values()) if isinstance(it, Mapping)]  # one, or one a type
    switches = [
        it["original_max_position_embeddings"] for it in kinds if it.get("rope_type") == "longrope"
    ]
    return min(switches, default=None)


def bind(family: Family, model: PreTrainedModel) -> Anatomy:
    """Find the family's modules in a model.

    Raises:
        NotADecoderError: the model has no unembedding, or no additive stream.
        MisfitError: the family's paths do not exist in it.
    """
    config = text_config(model)
    unembed = model.get_output_embeddings()
    if unembed is None or getattr(unembed, "weight", None) is None:
        raise NotADecoderError(
            f"{type(model).__name__} has no unembedding (lm_head)",
            "load it with AutoModelForCausalLM; entropylens reads decoder-only language models",
        )
    reason = family.refusal(config)
    if reason is not None:
        raise NotADecoderError(
            f"{type(model).__name__} has no additive residual stream: {reason}",
            "choose a model whose layers add to H^{l-1}; nothing here can stand for A^l and F^l",
        )
    try:
        decoder = attrgetter(family.decoder)(model) if family.decoder else decoder_of(model)
        layers = tuple(attrgetter(family.layers)(decoder))
        final_norm = attrgetter(family.final_norm)(decoder)
        attention = tuple(_branch(family, layer, "attention") for layer in layers)
        ffn = tuple(_branch(family, layer, "ffn") for layer in layers)
    except AttributeError as error:
        raise MisfitError(f"family {family.model_type!r} does not fit: {error}") from error
    for number, (mixer, feed_forward) in enumerate(zip(attention, ffn, strict=True), start=1):
        if mixer is None and feed_forward is None:
            wanted = ", ".join((*_paths(family.attention), *_paths(family.ffn)))
            raise MisfitError(
                f"family {family.model_type!r} does not fit: layer {number} has no {wanted}"
            )
    mixers = tuple("none" if it is None else mixer_of(it.reads) for it in attention)
    return Anatomy(
        family=family,
        decoder=decoder,
        layers=layers,
        attention=attention,
        ffn=ffn,
        mixers=mixers,
        final_norm=final_norm,
        parallel=family.parallel(config),
        residual_scale=family.residual_scale(config),
        lm_head=unembed,
        transform=family.transform(config),
        context=getattr(config, "max_position_embeddings", None)
        or getattr(config, "max_seq_len", None),
        passes=_passes(decoder, mixers),
    )


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of a model's text stack: its own, or a wrapper's inner one."""
    return model.config.get_text_config(decoder=True)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """What runs a model's text layers and no unembedding: in wrappers, of the text stack."""
    decoder: Any = model.get_decoder()
    while decoder.get_output_embeddings() is not None:
        decoder = next(it for it in decoder.children() if hasattr(it, "get_input_embeddings"))
    return decoder


def input_device(decoder: Any) -> torch.device:
    """Where a decoder wants its token ids."""
    embedding = decoder.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type == "meta":  # offloaded by accelerate
        return torch.device(embedding._hf_hook.execution_device)
    return device


def mixer_of(module: nn.Module) -> str:
    """What a token mixer is, from its class: attention | linear_attention | ssm | none (an FFN)."""
    # A TransformerLens bridge stands in for the module that it holds.
    name = type(getattr(module, "original_component", module)).__name__.lower()
    return next(kind for sign, kind in _MIXERS.items() if sign in name)


#: What a class name says, the most telling sign first.
_MIXERS = {
    **dict.fromkeys(
        ("deltanet", "linearattention", "lightning", "recurrent", "rwkv"), "linear_attention"
    ),
    "mamba": "ssm",
    **dict.fromkeys(("attention", "attn"), "attention"),
    **dict.fromkeys(("mlp", "moe", "feedforward", "ffn"), "none"),
    **dict.fromkeys(("mixer", "ssm"), "ssm"),
    "": "attention",
}


def _paths(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths


def _branch(family: Family, layer: nn.Module, kind: str) -> Branch | None:
    """The branch of one layer, or None where none of several paths exists in it."""
    paths, out = _paths(getattr(family, kind)), getattr(family, f"{kind}_out")
    shared = set(_paths(family.attention)) & set(_paths(family.ffn))
    found = []
    for path in paths:
        module = attrgetter(path)(layer) if len(paths) == 1 else _there(layer, path)
        # One slot that holds either kind of module, from layer to layer (Nemotron-H).
        if path in shared and (mixer_of(module) == "none") != (kind == "ffn"):
            module = None
        if module is not None:
            found.append(module)
    if not found:
        return None
    return Branch(reads=found[0], adds=(attrgetter(out)(layer),) if out else tuple(found))


def _there(layer: nn.Module, path: str) -> Any:
    try:
        return attrgetter(path)(layer)
    except AttributeError:
        return None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states that a module was called with, however its argument is named."""
    given = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next(it for it in given if isinstance(it, torch.Tensor) and it.is_floating_point())


def first_tensor(output: Any) -> torch.Tensor:
    """A module's hidden states, whether it returns them alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output
