"""internal_policy(): the policy of one layer or module itself, as log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entropylens.capture import capture, evaluating
from entropylens.errors import SettingError
from entropylens.sources import open_model

__all__ = ["internal_policy"]


def internal_policy(
    model: Any,
    ids: Sequence[int],
    layer: int,
    module: str | None = None,
) -> Float[Tensor, "positions vocab"]:
    """Log-probabilities of pi_layer^l, or of a module's policy, at every position (Eq. 6, 7).

    Args:
        model: as for `analyze`.
        ids: token ids of one sequence.
        layer: l, from 0 (the embedding) to L.
        module: None for the layer's policy, "attn" for A^l's, "ffn" for F^l's (l >= 1).

    Raises:
        SettingError: no such layer, module or token, or more ids than the context holds.
    """
    subject = open_model(model)
    anatomy, unembedding = subject.anatomy, subject.anatomy.unembedding
    first = 0 if module is None else 1
    if not first <= layer <= anatomy.num_layers:
        raise SettingError(f"layer {layer} does not exist", f"give {first} to {anatomy.num_layers}")
    if module not in (None, "attn", "ffn"):
        raise SettingError(f"no module {module!r}", "choose attn, ffn or None for the layer")
    branches = {"attn": anatomy.attention, "ffn": anatomy.ffn}
    if module is not None and branches[module][layer - 1] is None:
        raise SettingError(f"layer {layer} has no {module}", "see the columns of analyze()")
    if anatomy.context is not None and len(ids) > anatomy.context:
        raise SettingError(
            f"{len(ids)} ids are more than the model's context", f"give at most {anatomy.context}"
        )
    if not ids or min(ids) < 0 or max(ids) >= unembedding.vocab_size:
        raise SettingError(
            "ids are empty or outside the vocabulary", f"give ids 0 to {unembedding.vocab_size - 1}"
        )
    with evaluating(subject.model):
        states, _ = capture(
            anatomy, torch.arange(len(ids)), torch.tensor([list(ids)]), use_cache=False
        )
    site = {"attn": states.attn_out, "ffn": states.ffn_out}.get(module or "", states.stream_out)
    hidden = states.embedding if layer == 0 else site[layer - 1]
    with torch.inference_mode():
        log_probs = torch.log_softmax(unembedding.logits(hidden), dim=-1)
    return log_probs.clone()  # a plain tensor, that a user's autograd may meet
