"""Hooks: one forward pass -> the states at the response positions, and a model left as it came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from entropylens.anatomy import Anatomy, first_input, first_tensor
from entropylens.errors import DecompositionError

__all__ = ["States", "capture", "evaluating"]


@dataclass(frozen=True)
class States:
    """The residual stream and what its modules read and add, at chosen positions (Eq. 1).

    Layers are places 0..L-1 here; a user never sees these indices.

    Args:
        embedding: H^0.
        attn_in: what attention reads, LN(H^{l-1}) in a pre-norm model.
        attn_out: A^l as added to the stream; zero where a layer has no attention.
        ffn_in: what the FFN reads.
        ffn_out: F^l as added to the stream; zero where a layer has no FFN.
        stream_out: H^l.
        final: N(H^L), what lm_head reads.
        parallel: attention and FFN both read H^{l-1}.
    """

    embedding: Float[Tensor, "positions d_model"]
    attn_in: Float[Tensor, "layers positions d_model"]
    attn_out: Float[Tensor, "layers positions d_model"]
    ffn_in: Float[Tensor, "layers positions d_model"]
    ffn_out: Float[Tensor, "layers positions d_model"]
    stream_out: Float[Tensor, "layers positions d_model"]
    final: Float[Tensor, "positions d_model"]
    parallel: bool = False

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.stream_out)

    def stream_in(self, place: int) -> Float[Tensor, "positions d_model"]:
        """H^{l-1} of the layer at `place`."""
        return self.embedding if place == 0 else self.stream_out[place - 1]

    def ffn_base(self, place: int) -> Float[Tensor, "positions d_model"]:
        """What F^l is added to: H^{l-1} + A^l, or H^{l-1} where both branches run in parallel."""
        stream_in = self.stream_in(place)
        return stream_in if self.parallel else stream_in + self.attn_out[place]


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
        self.seen: set[tuple[str, int]] = set()

    def _keep(self, site: str, place: int, hidden: Tensor) -> None:
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        if site not in self.caught:
            # One block a site: kept tensors between freed ones would tear the heap to pieces.
            self.caught[site] = self._block(site, flat)
        chosen = flat.index_select(0, self.positions.to(flat.device))
        block = self.caught[site]
        if (site, place) in self.seen:  # several modules add at one site
            block[place] += chosen.to(block.device)
        else:
            block[place] = chosen
        self.seen.add((site, place))

    def _block(self, site: str, like: Tensor) -> Tensor:
        places = 1 if site in ("embedding", "final") else self.anatomy.num_layers
        return torch.zeros(
            (places, len(self.positions), like.shape[-1]),
            dtype=like.dtype,
            # A sharded model has layers on several devices; all policies are read at E_u's.
            device=self.anatomy.unembedding.weight.device,
        )

    def on_input(self, module: nn.Module, site: str, place: int) -> RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(site, place, first_input(args, kwargs))

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def on_output(self, module: nn.Module, site: str, place: int) -> RemovableHandle:
        scale = self.anatomy.residual_scale if site in ("attn_out", "ffn_out") else 1.0

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            hidden = first_tensor(output)
            self._keep(site, place, hidden if scale == 1.0 else hidden * scale)

        return module.register_forward_hook(hook)

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        anatomy = self.anatomy
        try:
            handles.append(self.on_input(anatomy.layers[0], "embedding", 0))
            for place, layer in enumerate(anatomy.layers):
                for name, branch in (("attn", anatomy.attention), ("ffn", anatomy.ffn)):
                    found = branch[place]
                    if found is None:
                        continue
                    handles.append(self.on_input(found.reads, f"{name}_in", place))
                    handles += [
                        self.on_output(module, f"{name}_out", place) for module in found.adds
                    ]
                handles.append(self.on_output(layer, "stream_out", place))
            handles.append(self.on_output(anatomy.final_norm, "final", 0))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def states(self) -> States:
        self._check_seen()

        embedding = self.caught["embedding"][0]

        def per_layer(site: str) -> Tensor:
            if site not in self.caught:  # no layer has this branch
                self.caught[site] = self._block(site, embedding)
            return self.caught[site]

        return States(
            embedding=embedding,
            attn_in=per_layer("attn_in"),
            attn_out=per_layer("attn_out"),
            ffn_in=per_layer("ffn_in"),
            ffn_out=per_layer("ffn_out"),
            stream_out=per_layer("stream_out"),
            final=self.caught["final"][0],
            parallel=self.anatomy.parallel,
        )

    def _check_seen(self) -> None:
        anatomy = self.anatomy
        expected = [("embedding", 0), ("final", 0)]
        for place in range(anatomy.num_layers):
            expected.append(("stream_out", place))
            for name, branch in (("attn", anatomy.attention), ("ffn", anatomy.ffn)):
                if branch[place] is not None:
                    expected += [(f"{name}_in", place), (f"{name}_out", place)]
        for site, place in expected:
            if (site, place) not in self.seen:
                raise DecompositionError(
                    f"layer {place + 1}: the module of {site} was not called in the forward pass",
                    "name the module that is, with entropylens.register()",
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

    Raises:
        DecompositionError: a module that the anatomy names did not run.
    """
    catcher = _Catcher(anatomy, positions)
    with torch.inference_mode(), catcher.attached():
        output = anatomy.decoder(input_ids=input_ids.to(anatomy.device), **forward)
    return catcher.states(), output
