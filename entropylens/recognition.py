"""Which family is this model; and where none is registered, does the generic shape hold?"""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from entropylens.anatomy import (
    ALONE,
    Anatomy,
    Family,
    MisfitError,
    bind,
    decoder_of,
    first_tensor,
    input_device,
    mixer_of,
    text_config,
)
from entropylens.capture import evaluating
from entropylens.errors import DecompositionError, UnknownArchitectureError
from entropylens.families import family_of
from entropylens.verification import Verification, trial_ids, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["anatomy_of", "recognise", "understand"]

logger = logging.getLogger(__name__)

_ATTENTION = ("attn", "attention", "mixer", "mamba", "ssm")
_FFN = ("mlp", "ffn", "feed_forward", "feedforward", "moe")


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Bind the registered family of a model to it.

    Raises:
        NotADecoderError: the model has no unembedding, or no additive stream.
        UnknownArchitectureError: no family has its model_type, or the family does not fit; the
            message holds the module tree and the call to paste.
    """
    model_type = text_config(model).model_type
    family = family_of(model_type)
    if family is None:
        raise _unknown(model, f"model_type {model_type!r} is no registered family", _guess(model))
    try:
        return bind(family, model)
    except MisfitError as error:
        raise _unknown(model, str(error), _guess(model)) from error


def understand(model: PreTrainedModel) -> tuple[Anatomy, Verification]:
    """The anatomy of a model, verified; of an unregistered one if the generic shape holds.

    Raises:
        NotADecoderError, UnknownArchitectureError: as `anatomy_of`.
        NonFiniteStatesError, DecompositionError: as `Verification.raise_if_broken`.
    """
    anatomy, verification = recognise(model)
    verification.raise_if_broken()
    return anatomy, verification


def recognise(model: PreTrainedModel) -> tuple[Anatomy, Verification]:
    """The same, but a registered family's verification is handed out also where it fails."""
    model_type = text_config(model).model_type
    if family_of(model_type) is not None:
        anatomy = anatomy_of(model)
        return anatomy, verify(model, anatomy)
    guess = _guess(model)
    cause = f"model_type {model_type!r} is no registered family"
    if guess is None:
        raise _unknown(model, f"{cause}, and its layers are not of the generic shape", None)
    try:
        anatomy, verification = _tried(model, guess)
        verification.raise_if_broken()
    except (MisfitError, DecompositionError) as error:
        raise _unknown(
            model, f"{cause}, and the generic shape does not hold ({error})", guess
        ) from error
    logger.warning(
        "%s, but its modules are of the generic shape and add up (error %.1g). Whether padding or "
        "a cache changes its states is not known, so responses are read one by one. To vouch for "
        "it: %s",
        *(cause, max(verification.stream_errors), _call(anatomy.family)),
    )
    return replace(anatomy, passes=ALONE), verification


def _tried(model: PreTrainedModel, guess: Family) -> tuple[Anatomy, Verification]:
    anatomy = bind(guess, model)
    verification = verify(model, anatomy)
    if not verification.middle_as_said:
        anatomy = bind(replace(guess, parallel=_in_parallel), model)
        verification = verify(model, anatomy)
    return anatomy, verification


def _in_parallel(_config: Any) -> bool:
    return True


def _guess(model: PreTrainedModel) -> Family | None:
    """The generic shape read off the module names of a model, or None where it has none."""
    try:
        decoder = decoder_of(model)
    except (AttributeError, StopIteration):
        return None
    lists = [
        (len(it), name)
        for name, it in decoder.named_children()
        if isinstance(it, nn.ModuleList) and len(it)
    ]
    norms = [name for name, it in decoder.named_children() if _is_norm(it)]
    if not lists or not norms:
        return None
    layers = max(lists)[1]
    children: dict[str, nn.Module] = {}
    for layer in getattr(decoder, layers):
        children |= dict(layer.named_children())
    attention = tuple(name for name, it in children.items() if _is_a(name, it, _ATTENTION))
    ffn = tuple(name for name, it in children.items() if _is_a(name, it, _FFN))
    for layer in getattr(decoder, layers):
        # Two mixers side by side: each may have a factor of its own.
        if sum(getattr(layer, name, None) is not None for name in attention) != 1:
            return None
    shape = Family(
        model_type=text_config(model).model_type,
        attention=attention[0] if len(attention) == 1 else attention,
        ffn=ffn[0] if len(ffn) == 1 else ffn,
        final_norm=norms[-1],
        layers=layers,
    )
    layer_norms = [name for name, it in children.items() if _is_norm(it)]
    outs = _post_norms(decoder, getattr(decoder, layers)[0], shape, layer_norms)
    return replace(shape, attention_out=outs.get("attention"), ffn_out=outs.get("ffn"))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_a(name: str, module: nn.Module, signs: tuple[str, ...]) -> bool:
    text = f"{name} {type(module).__name__}".lower()
    fits = any(sign in text for sign in signs) and not _is_norm(module)
    has_weights = next(module.parameters(), None) is not None  # a dropout has none
    return fits and has_weights and (mixer_of(module) == "none") == (signs is _FFN)


def _post_norms(decoder: Any, layer: nn.Module, shape: Family, norms: list[str]) -> dict[str, str]:
    """Norms of a layer that read just what a branch gave: their outputs are what is added."""
    given: dict[str, Tensor] = {}
    found: dict[str, str] = {}

    def note(kind: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            given[kind] = first_tensor(output)

        return hook

    def look(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            for kind, output in given.items():
                if args and args[0].shape == output.shape and torch.equal(args[0], output):
                    found.setdefault(kind, name)

        return hook

    handles = []
    try:
        for kind in ("attention", "ffn"):
            paths = getattr(shape, kind)
            if isinstance(paths, str) and hasattr(layer, paths):
                handles.append(getattr(layer, paths).register_forward_hook(note(kind)))
        handles += [
            getattr(layer, name).register_forward_hook(look(name))
            for name in norms
            if hasattr(layer, name)
        ]
        with evaluating(decoder), torch.inference_mode():
            ids = trial_ids(decoder.config.vocab_size, 4)
            decoder(input_ids=ids.to(input_device(decoder)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _call(family: Family) -> str:
    """The call that registers this family, as a user would write it."""
    named = {
        field.name: getattr(family, field.name)
        for field in fields(family)
        if not callable(getattr(family, field.name))
        and getattr(family, field.name) != field.default
    }
    arguments = [f"{name}={value!r}" for name, value in named.items()]
    if family.parallel is _in_parallel:
        arguments.append("parallel=lambda config: True")
    replacing = "" if family_of(family.model_type) is None else ", replace=True"
    return f"entropylens.register(entropylens.Family({', '.join(arguments)}){replacing})"


def _unknown(model: PreTrainedModel, cause: str, guess: Family | None) -> UnknownArchitectureError:
    llama = Family(text_config(model).model_type, "self_attn", "mlp", "norm")
    return UnknownArchitectureError(
        cause,
        f"name its modules, in this form: {_call(guess or llama)}",
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
