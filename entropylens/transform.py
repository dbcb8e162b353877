"""What a model does to lm_head's output before the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["IDENTITY", "OutputTransform"]


@dataclass(frozen=True)
class OutputTransform:
    """cap * tanh(scale * logits / cap), or scale * logits without a cap.

    Args:
        scale: factor on the logits (Cohere, Granite).
        softcap: bound of the tanh soft cap (Gemma 2), or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(
        self, logits: Float[Tensor, "*positions vocab"]
    ) -> Float[Tensor, "*positions vocab"]:
        """Apply scale, then soft cap."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


IDENTITY = OutputTransform()
