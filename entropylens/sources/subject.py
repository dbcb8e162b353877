"""A model ready to be read: loaded, understood, verified."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from entropylens.anatomy import Anatomy, Passes
from entropylens.responses import Limits
from entropylens.verification import Verification

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from entropylens.sources.nnsight import RemoteReader

__all__ = ["Facts", "Subject", "model_fingerprint"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: What decides which adapters of a PEFT layer are in effect.
_ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


@dataclass(frozen=True)
class Facts:
    """What an analysis says of its model; it can travel where a model cannot.

    Args:
        name, revision, dtype: as of `Subject`.
        device: where it takes its tokens.
        num_layers: L.
        vocab_size: V.
        mixers, passes: see `Anatomy`; what a server runs does not go on from a cache.
    """

    name: str
    revision: str | None
    dtype: str
    device: str
    num_layers: int
    vocab_size: int
    mixers: tuple[str, ...]
    passes: Passes


@dataclass(frozen=True)
class Subject:
    """A model with what is known of it.

    Args:
        name: what the user called it.
        revision: the Hub commit, or None.
        model: the Hugging Face model.
        tokenizer: its tokenizer, or None where it came without one.
        anatomy: where its states are.
        verification: how well they add up.
        remote: what reads the model where a server runs it, or None where it is run here.
    """

    name: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    anatomy: Anatomy
    verification: Verification
    remote: RemoteReader | None = None

    @property
    def limits(self) -> Limits:
        """Token ids and positions that it can read."""
        return Limits(self.anatomy.unembedding.vocab_size, self.anatomy.context)

    @property
    def dtype(self) -> str:
        """The dtype of its states, as text."""
        return str(self.verification.dtype).removeprefix("torch.")

    @property
    def facts(self) -> Facts:
        """What an analysis says of it."""
        passes = self.anatomy.passes
        return Facts(
            name=self.name,
            revision=self.revision,
            dtype=self.dtype,
            device=str(self.anatomy.device),
            num_layers=self.anatomy.num_layers,
            vocab_size=self.anatomy.unembedding.vocab_size,
            mixers=self.anatomy.mixers,
            passes=passes if self.remote is None else replace(passes, continues=False),
        )

    @cached_property
    def fingerprint(self) -> str:
        """A digest of its configuration, and of every parameter's sum and a sample of it."""
        if self.remote is None:
            return model_fingerprint(self.model)
        return model_fingerprint(self.model, f"{self.name}@{self.revision}")


def model_fingerprint(model: PreTrainedModel, known_as: str = "") -> str:
    """A digest of a model's configuration, and of every parameter's sum and a sample of it.

    Args:
        model: a Hugging Face model.
        known_as: what stands for the weights of one that lies on a server.
    """
    config = model.config.to_dict()
    for unimportant in ("_name_or_path", "transformers_version", "_attn_implementation"):
        config.pop(unimportant, None)
    text = json.dumps(config, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    digest.update(known_as.encode())
    for name, module in model.named_modules():
        state = [getattr(module, it, None) for it in _ADAPTER_STATE]
        if any(it is not None for it in state):
            digest.update(f"{name}{state}".encode())
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if parameter.is_meta:
            owner, _, own_name = name.rpartition(".")
            hook = getattr(model.get_submodule(owner), "_hf_hook", None)
            stored = getattr(hook, "weights_map", None)
            if stored is None:  # on a server, where its name stands for it
                continue
            parameter = stored[own_name]
        # As integers: their sum is exact, whatever the order and the number of threads.
        flat = parameter.detach().reshape(-1)
        bits = flat.view(_INTEGERS.get(flat.element_size(), torch.uint8))
        sample = bits[:: max(1, bits.numel() // 64)]
        digest.update(f"{sample.tolist()}{int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()[:32]
