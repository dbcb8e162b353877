"""Hooks: one forward pass -> the states at the response positions, and a model left as it came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from entropylens.anatomy import Anatomy, first_tensor

__all__ = ["States", "capture", "evaluating"]


@dataclass(frozen=True)
class States:
    """The residual stream and what its modules read and add, at chosen positions (Eq. 1).

    Layers are a tuple's places 0..L-1 here; a user never sees these indices.

    Args:
        embedding: H^0.
        attn_in: what attention reads, LN(H^{l-1}) in a pre-norm model.
        attn_out: A^l as added to the stream.
        ffn_in: what the FFN reads.
        ffn_out: F^l as added to the stream.
        stream_out: H^l.
        final: N(H^L), what lm_head reads.
    """

    embedding: Float[Tensor, "positions d_model"]
    attn_in: tuple[Float[Tensor, "positions d_model"], ...]
    attn_out: tuple[Float[Tensor, "positions d_model"], ...]
    ffn_in: tuple[Float[Tensor, "positions d_model"], ...]
    ffn_out: tuple[Float[Tensor, "positions d_model"], ...]
    stream_out: tuple[Float[Tensor, "positions d_model"], ...]
    final: Float[Tensor, "positions d_model"]

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.stream_out)

    def stream_in(self, place: int) -> Float[Tensor, "positions d_model"]:
        """H^{l-1} of the layer at `place`."""
        return self.embedding if place == 0 else self.stream_out[place - 1]

    def stream_mid(self, place: int) -> Float[Tensor, "positions d_model"]:
        """H^{l-1} + A^l of the layer at `place`."""
        return self.stream_in(place) + self.attn_out[place]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Catcher:
    """Collects the chosen positions of every site while its hooks are on."""

    def __init__(self, anatomy: Anatomy, positions: Int[Tensor, " positions"]) -> None:
        self.anatomy = anatomy
        self.positions = positions
        self.caught: dict[str, Tensor] = {}

    def _keep(self, site: str, place: int, hidden: Tensor) -> None:
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        if site not in self.caught:
            # One block a site: kept tensors between freed ones would tear the heap to pieces.
            places = 1 if site in ("embedding", "final") else self.anatomy.num_layers
            self.caught[site] = torch.full(
                (places, len(self.positions), flat.shape[-1]),
                torch.nan,
                dtype=flat.dtype,
                # A sharded model has layers on several devices; all policies are read at E_u's.
                device=self.anatomy.unembedding.weight.device,
            )
        self.caught[site][place] = flat.index_select(0, self.positions.to(flat.device))

    def on_input(self, module: nn.Module, site: str, place: int) -> RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(site, place, args[0] if args else kwargs["hidden_states"])

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def on_output(self, module: nn.Module, site: str, place: int) -> RemovableHandle:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._keep(site, place, first_tensor(output))

        return module.register_forward_hook(hook)

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []

        def put(
            on: Callable[[nn.Module, str, int], RemovableHandle],
            module: nn.Module,
            site: str,
            place: int = 0,
        ) -> None:
            handles.append(on(module, site, place))

        anatomy = self.anatomy
        try:
            put(self.on_input, anatomy.layers[0], "embedding")
            for place, layer in enumerate(anatomy.layers):
                put(self.on_input, anatomy.attention[place], "attn_in", place)
                put(self.on_output, anatomy.attention[place], "attn_out", place)
                put(self.on_input, anatomy.ffn[place], "ffn_in", place)
                put(self.on_output, anatomy.ffn[place], "ffn_out", place)
                put(self.on_output, layer, "stream_out", place)
            put(self.on_output, anatomy.final_norm, "final")
            yield
        finally:
            for handle in handles:
                handle.remove()

    def states(self) -> States:
        def per_layer(site: str) -> tuple[Tensor, ...]:
            return tuple(self.caught[site].unbind(0))

        return States(
            embedding=self.caught["embedding"][0],
            attn_in=per_layer("attn_in"),
            attn_out=per_layer("attn_out"),
            ffn_in=per_layer("ffn_in"),
            ffn_out=per_layer("ffn_out"),
            stream_out=per_layer("stream_out"),
            final=self.caught["final"][0],
        )


def capture(
    anatomy: Anatomy,
    positions: Int[Tensor, " positions"],
    input_ids: Int[Tensor, "batch sequence"],
    **forward: Any,
) -> tuple[States, Any]:
    """Run the decoder once and keep the states at some positions; no logits are built.

    Args:
        anatomy: where the states are.
        positions: indices into the flattened [batch * sequence].
        input_ids: token ids.
        forward: further arguments of the decoder (attention_mask, past_key_values, use_cache).

    Returns:
        The states, and the decoder's own output.
    """
    catcher = _Catcher(anatomy, positions)
    with torch.inference_mode(), catcher.attached():
        output = anatomy.decoder(input_ids=input_ids.to(anatomy.device), **forward)
    return catcher.states(), output
