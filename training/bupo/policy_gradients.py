"""grad sum_i w_i sum_t log pi(o_it) of several policies of one model, from shared forward passes.

The states are taken from the decoder by hooks; the model's own code makes logits of them
(lm_head tied, biased, quantized or LoRA-wrapped, logit scale, soft cap), as in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from bupo.alignment import Gradient, Sketch
from entropylens.anatomy import Anatomy, first_tensor
from entropylens.batching import Batch, batch
from entropylens.errors import SettingError
from entropylens.policy import compute_dtype
from entropylens.responses import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GradientSum", "PolicyGradients", "shared_parameters"]


def shared_parameters(
    model: nn.Module, anatomy: Anatomy, layers: Sequence[int]
) -> tuple[list[nn.Parameter], dict[int, int]]:
    """The trainable parameters that pi_theta shares with some pi_l, lowest layers first.

    Args:
        model: the model.
        anatomy: its anatomy.
        layers: the candidates l, rising.

    Returns:
        The parameters, and for each l how many of them, from the first on, pi_l has.

    Raises:
        SettingError: some pi_l has none.
    """
    # Without a layer: 0. The final norm, which no pi_l reads: L.
    depth = {id(it): anatomy.num_layers for it in anatomy.final_norm.parameters()}
    for number, layer in enumerate(anatomy.layers, start=1):
        for parameter in layer.parameters():
            depth.setdefault(id(parameter), number)
    trained = [it for it in model.parameters() if it.requires_grad]
    trained.sort(key=lambda it: depth.get(id(it), 0))
    depths = [depth.get(id(it), 0) for it in trained]
    ends = {layer: sum(it <= layer for it in depths) for layer in layers}
    if not ends[layers[0]]:
        raise SettingError(
            f"pi_{layers[0]} has no trainable parameter", "set requires_grad, or ask higher layers"
        )
    return trained[: ends[layers[-1]]], ends


class GradientSum:
    """One policy's gradient summed over blocks, and a sketch of what each block gave.

    Args:
        sketch: the projection.
        sizes: numbers of each parameter.
        ends: numbers of parameters that are sketched, as of `Sketch`.

    Attributes:
        gradient: the sum, in float32 or better.
        blocks: one sketch [ends, size] a block.
    """

    def __init__(self, sketch: Sketch, sizes: Sequence[int], ends: Sequence[int]) -> None:
        self.sizes, self.ends = sizes[: max(ends)], ends
        self.gradient: list[Tensor | None] = [None] * max(ends)
        self.blocks: list[Tensor] = []
        self._sketch, self._before = sketch, torch.zeros(())

    def add(self, parts: Gradient) -> None:
        """Take in what one forward pass gave."""
        for place, part in enumerate(parts):
            held = self.gradient[place]
            if part is not None and held is not None:
                held += part
            elif part is not None:
                self.gradient[place] = part.to(compute_dtype(part), copy=True)

    def end_block(self) -> None:
        """A sketch is linear: the block's is what the sum's has changed by."""
        now = self._sketch(self.gradient, self.sizes, self.ends)
        self.blocks.append((now - self._before).float())
        self._before = now


class PolicyGradients:
    """Gradients of policies over the same answers. A site is a layer l, or L for pi_theta itself.

    Args:
        model: in evaluation mode, autograd on.
        anatomy: its anatomy.
        parameters: with respect to these, as of `shared_parameters`.
        ends: how many of them each layer's policy has.
        responses: the answers.
        weights: w_i.
        blocks: of each block, the answers (places) of each forward pass.
        temperature: what logits are divided by.
        bar: moves by one for each token and site.

    Attributes:
        policy: the site of pi_theta, L.
        nll: of each site, -sum_t log pi(o_it) of each answer, in nats.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        parameters: Sequence[nn.Parameter],
        ends: Mapping[int, int],
        responses: Sequence[Response],
        weights: Float[Tensor, " responses"],
        blocks: Sequence[Sequence[Sequence[int]]],
        temperature: float,
        bar: tqdm[Any],
    ) -> None:
        self.model, self.anatomy = model, anatomy
        self.parameters, self.ends = parameters, ends
        self.responses, self.weights, self.blocks = responses, weights, blocks
        self.temperature, self.bar = temperature, bar
        self.policy = anatomy.num_layers
        self.nll: dict[int, NDArray[np.float64]] = {
            site: np.zeros(len(responses)) for site in (*ends, self.policy)
        }

    def sums(self, sites: Sequence[int], sketch: Sketch) -> dict[int, GradientSum]:
        """The gradients of some sites; of pi_theta's, a sketch of what each layer shares with it.

        A block whose answers all have weight 0 goes without: only its NLL is taken.
        """
        sizes = [it.numel() for it in self.parameters]
        every = tuple(self.ends.values())
        sums = {
            site: GradientSum(sketch, sizes, every if site == self.policy else [self.ends[site]])
            for site in sites
        }
        for block in self.blocks:
            for members in block:
                weighted = bool(self.weights[list(members)].any())
                with torch.set_grad_enabled(weighted):
                    for site, objective in self._objectives(members, sites):
                        if weighted:
                            wanted = self.parameters[: max(sums[site].ends)]
                            sums[site].add(
                                torch.autograd.grad(
                                    objective, wanted, retain_graph=True, allow_unused=True
                                )
                            )
                        del objective  # and its graph, before the next forward pass makes one
            if any(self.weights[list(members)].any() for members in block):
                for total in sums.values():
                    total.end_block()
        return sums

    def _objectives(
        self, members: Sequence[int], sites: Sequence[int]
    ) -> Iterator[tuple[int, Float[Tensor, ""]]]:
        """sum_i w_i sum_t log pi(o_it) of each site, from one forward pass over some answers."""
        asked = batch(self.responses, members)
        states = self._states(asked, sites)
        owner = asked.owner.numpy()
        for site in sites:
            with _returning(self.anatomy.decoder, states.pop(site)[None]):
                some = asked.input_ids[:1, :1].to(self.anatomy.device)
                logits = self.model(input_ids=some, use_cache=False).logits[0]
            logits = logits.to(compute_dtype(logits)) / self.temperature
            tokens = asked.tokens.to(logits.device)
            log_probs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            np.subtract.at(self.nll[site], owner, log_probs.detach().cpu().double().numpy())
            self.bar.update(len(owner))
            yield site, log_probs @ self.weights[asked.owner].to(log_probs)

    def _states(
        self, asked: Batch, sites: Sequence[int]
    ) -> dict[int, Float[Tensor, "positions d_model"]]:
        """H^l, or N(H^L) for pi_theta, at the positions that predict a token."""
        anatomy, found = self.anatomy, dict[int, Tensor]()

        def keep(site: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                flat = first_tensor(output).flatten(0, 1)
                found[site] = flat.index_select(0, asked.positions.to(flat.device))

            return hook

        def stop(_module: nn.Module, _args: Any) -> None:
            raise _FarEnough

        modules = (*anatomy.layers[:-1], anatomy.final_norm)
        handles = [modules[site - 1].register_forward_hook(keep(site)) for site in sites]
        if self.policy not in sites:
            above = anatomy.layers[max(sites)]
            handles.append(above.register_forward_pre_hook(stop))
        ids = asked.input_ids.to(anatomy.device)
        try:
            anatomy.decoder(input_ids=ids, use_cache=False)
        except _FarEnough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found


class _FarEnough(Exception):
    """No layer above is needed."""


class _Output:
    """What a decoder returns, with nothing in it but states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, _name: str) -> None:
        return None


@contextmanager
def _returning(decoder: Any, hidden: Float[Tensor, "1 positions d_model"]) -> Iterator[None]:
    """The decoder returns these states, so that what the model does behind it is done to them."""
    own = vars(decoder).get("forward")  # accelerate puts one there
    decoder.forward = lambda *_args, **_kwargs: _Output(hidden)
    try:
        yield
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
