"""The front doors: whatever a user brings becomes one verified Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropylens.demo import MODEL_NAME, demo_model
from entropylens.errors import SettingError
from entropylens.sources import hf, nnsight, transformer_lens, verl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from entropylens.sources.subject import Subject

__all__ = ["load_named", "open_model"]


def open_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    remote: bool | str = False,
    **loading: Any,
) -> Subject:
    """Load or unwrap a model, and verify that its states add up.

    Args:
        model: a Hub id, directory, GGUF file or veRL checkpoint; a loaded Hugging Face or PEFT
            model, a TransformerLens bridge or an nnsight model; None for the bundled model.
        tokenizer: of a loaded model.
        remote: let a server run an nnsight model, see `nnsight.RemoteReader`.
        loading: dtype, device, revision and trust_remote_code of a named one, see `hf.load`.

    Raises:
        EntropyLensError: its subclasses tell what is wrong and what to do.
    """
    if remote:
        return nnsight.connect(model, remote, tokenizer)
    if model is None:
        return hf.load(demo_model(), **loading, name=MODEL_NAME)
    if isinstance(model, str | Path):
        if not verl.steps(Path(model)):
            return hf.load(model, **loading)
        opened, own_tokenizer = load_named(model, **loading)
        return hf.wrap(opened, own_tokenizer, name=str(model))
    if transformer_lens.is_bridge(model):
        inner, own_tokenizer = transformer_lens.unwrap(model)
        return hf.wrap(inner, tokenizer or own_tokenizer)
    if nnsight.is_nnsight(model):
        inner, own_tokenizer = nnsight.unwrap(model)
        return hf.wrap(inner, tokenizer or own_tokenizer)
    return hf.wrap(model, tokenizer)


def load_named(
    model: str | Path, **loading: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model by its name or path, and its tokenizer, without looking into it yet.

    Raises:
        SettingError: the path holds checkpoints of several steps.
        EntropyLensError: as `hf.load_unverified` and `verl.load`.
    """
    found = verl.steps(Path(model))
    if not found:
        return hf.load_unverified(model, **loading)
    if len(found) > 1:
        raise SettingError(
            f"{str(model)!r} holds the checkpoints of {len(found)} steps",
            f"name one, such as {found[-1][1].parent.name}, or call analyze_series()",
        )
    loading.pop("revision", None)
    return verl.load(found[0][1], **loading)
