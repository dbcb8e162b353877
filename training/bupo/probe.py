"""pi_l in the place of pi_theta: while armed, lm_head reads H^l instead of the normed H^L.

The unembedding stays where the model does it, in lm_head's own forward: sharded, tied, quantized
or LoRA-wrapped, and with the output transform behind it (Eq. 6, Sec. 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from entropylens.anatomy import first_tensor
from entropylens.errors import SettingError
from entropylens.recognition import anatomy_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

__all__ = ["Probe"]


class Probe:
    """Hooks on one model for one inner layer.

    Args:
        model: a causal language model of a family that entropylens knows.
        layer: l, from 1 to L-1.

    Raises:
        SettingError: no such inner layer.
        UnknownArchitectureError, NotADecoderError: as `entropylens.recognition.anatomy_of`.
    """

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        anatomy = anatomy_of(model)
        if not 1 <= layer < anatomy.num_layers:
            why = (
                "the final layer's policy is no inner one: train it with internal_steps=0"
                if layer == anatomy.num_layers
                else f"layers count from 1, and the model has {anatomy.num_layers}"
            )
            raise SettingError(
                f"bupo.layer={layer} is no inner layer ({why})",
                f"give 1 to {anatomy.num_layers - 1}",
            )
        self.layer = layer
        self._model = model
        self._decoder, self._norm = anatomy.decoder, anatomy.final_norm
        self._own, self._next = anatomy.layers[layer - 1], anatomy.layers[layer]
        self._captured: Tensor | None = None

    @contextmanager
    def internal(self, *, skip_upper_layers: bool = False) -> Iterator[None]:
        """Logits of pi_l from the model's forward, with gradients to layers 1..l alone.

        Args:
            skip_upper_layers: do not run layers l+1..L (their output would not be used).

        Raises:
            SettingError: upper layers run although they were to be skipped.
        """

        def replace(_norm: nn.Module, args: tuple[Any, ...], _output: Any) -> Tensor:
            return self._taken(args[0] if skip_upper_layers else None)

        with self._watched(), _hooked(self._norm.register_forward_hook(replace)):
            if not skip_upper_layers:
                yield
                return
            with self._shortened():
                yield

    @contextmanager
    def both(self, rows: Int[Tensor, " rows"], *, internal: bool) -> Iterator[None]:
        """One policy's logits everywhere and the other's at some positions, from one forward.

        The model then returns logits [1, batch * sequence + rows, vocab]: pi_l's at all positions
        (pi_theta's unless `internal`), batch flattened, then the other policy's at `rows`.

        Args:
            rows: positions in the flattened batch.
            internal: whether pi_l is the one that is wanted everywhere.
        """
        normed: Tensor

        def keep(_norm: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            nonlocal normed
            normed = first_tensor(output)

        def join(_head: nn.Module, _args: tuple[Any, ...]) -> Tensor:
            pair = (self._taken(None).flatten(0, -2), normed.flatten(0, -2))
            main, other = pair if internal else pair[::-1]
            return torch.cat([main, other[rows]])[None]

        # Not at the final norm: some decoders give its output the batch's shape afterwards.
        head = self._model.get_output_embeddings()  # asked now: adapters may have wrapped it
        with (
            self._watched(),
            _hooked(self._norm.register_forward_hook(keep), head.register_forward_pre_hook(join)),
        ):
            yield

    def _taken(self, found: Tensor | None) -> Tensor:
        """H^l of the forward pass that has come to the final norm."""
        hidden = self._captured if found is None else found
        assert hidden is not None  # layer l comes before the final norm
        self._captured = None
        return hidden

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Capture layer l's output once a forward; checkpointing calls the layer again later."""
        running = False

        def begin(_decoder: nn.Module, _args: tuple[Any, ...]) -> None:
            nonlocal running
            running = True

        def keep(_layer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            nonlocal running
            if running:
                self._captured = first_tensor(output)
                running = False

        begins = self._decoder.register_forward_pre_hook(begin)
        with _hooked(begins, self._own.register_forward_hook(keep)):
            try:
                yield
            finally:
                self._captured = None

    @contextmanager
    def _shortened(self) -> Iterator[None]:
        """The decoder runs layers 1..l: most families loop over config.num_hidden_layers."""

        def refuse(_layer: nn.Module, _args: tuple[Any, ...]) -> None:
            raise SettingError(
                f"{type(self._decoder).__name__} runs its upper layers in any case",
                "set bupo.skip_upper_layers=False",
            )

        config = self._decoder.config
        depth = config.num_hidden_layers
        config.num_hidden_layers = self.layer
        try:
            with _hooked(self._next.register_forward_pre_hook(refuse)):
                yield
        finally:
            config.num_hidden_layers = depth


@contextmanager
def _hooked(*handles: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
