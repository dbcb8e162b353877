"""veRL's FSDP engine whose forward can speak for pi_l instead of pi_theta.

Everything else stays veRL's: the hooks of `bupo.probe` are armed for one micro-batch at a time, by
an order that comes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import merged_lora_context, normalize_peft_param_name
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from bupo.orders import Order
from bupo.probe import Probe

__all__ = ["OTHER_ENTROPY", "OTHER_LOG_PROBS", "BuPOEngine", "InternalPolicyEngine"]

#: What the policy that was not asked for says where it was watched (NaN elsewhere), a response
#: position each, as veRL's own log_probs and entropy.
OTHER_LOG_PROBS, OTHER_ENTROPY = "bupo_other_log_probs", "bupo_other_entropy"


class InternalPolicyEngine:
    """What BuPO adds to an engine with a language model head; comes before it among the bases."""

    optimizer: Any
    module: nn.Module
    _is_lora: bool

    def _build_module(self) -> nn.Module:
        self._model: Any = super()._build_module()  # type: ignore[misc]
        self._probes: dict[int, Probe] = {}
        self._watched: _Watched | None = None
        self._order = Order()
        self._passed = 0
        return self._model

    def forward_backward_batch(self, *args: Any, **kwargs: Any) -> Any:
        """veRL's; what is watched is spread over all micro-batches."""
        self._passed = 0
        return super().forward_backward_batch(*args, **kwargs)  # type: ignore[misc]

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """veRL's, for the policy that was ordered."""
        values = {
            name: tu.get_non_tensor_data(data=micro_batch, key=name, default=None)
            for name in Order.names()
        }
        self._order = order = Order.read(values)
        self._watched = None
        if forward_only and order.stride:
            self._watched = _watched(micro_batch, order.stride, self._passed)
            self._passed += int(micro_batch["loss_mask"].values().sum())
        try:
            with self._armed(order):
                return super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore[misc]
        finally:
            self._watched = None

    def _armed(self, order: Order) -> AbstractContextManager[None]:
        if not order.layer:
            return nullcontext()
        if order.layer not in self._probes:
            self._probes[order.layer] = Probe(self._model, order.layer)
        probe = self._probes[order.layer]
        if self._watched is not None:
            return probe.both(self._watched.rows, internal=order.internal)
        if order.internal:
            return probe.internal(skip_upper_layers=order.skip_upper_layers)
        return nullcontext()

    def prepare_model_outputs(
        self,
        output: Any,
        output_args: dict[str, Any],
        micro_batch: TensorDict,
        logits_processor_func: Callable[..., Any] | None,
    ) -> dict[str, Tensor]:
        """veRL's, and the other policy's numbers where it was watched."""
        watched = self._watched
        if watched is None:
            return super().prepare_model_outputs(  # type: ignore[misc]
                output, output_args, micro_batch, logits_processor_func
            )
        logits = output.logits
        positions = logits.shape[1] - len(watched.rows)
        output.logits = logits[0, :positions].unflatten(0, (watched.batch, -1))
        found: dict[str, Tensor] = super().prepare_model_outputs(  # type: ignore[misc]
            output, output_args, micro_batch, logits_processor_func
        )
        temperature = float(tu.get_non_tensor_data(micro_batch, "temperature", 1.0))
        found |= watched.numbers(logits[0, positions:], micro_batch["input_ids"], temperature)
        return found

    def optimizer_step(self) -> Any:
        """veRL's, with E_u left as it is where that was ordered."""
        if self._order.freeze_unembedding:
            for parameter in self._model.get_output_embeddings().parameters():
                parameter.grad = None
        return super().optimizer_step()  # type: ignore[misc]

    def reset_optimizer(self) -> None:
        """Forget the moments of every parameter; the learning rate's schedule goes on."""
        self.optimizer.state.clear()

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter in full, adapters merged, one after the other (FSDP2).

        Gathering is a collective: every rank goes through all of them.
        """
        merged = nullcontext()
        if self._is_lora:  # the generator that veRL has for it rounds to bfloat16
            merged = merged_lora_context(self.module, backup_adapters=True)
        device = get_device_id()
        with merged:
            state = self.module.state_dict()
            if self._is_lora:
                state = normalize_peft_param_name(state)
            for name, value in state.items():
                whole: Any = value.to(device)
                # Merging is undone afterwards, in the same storage.
                yield name, whole.full_tensor() if isinstance(value, DTensor) else value.clone()


class _Watched:
    """Response positions of a micro-batch at which the other policy is read.

    Args:
        packed: their places among the micro-batch's tokens, without padding.
        rows: their places in the flattened batch that the model sees.
        batch: rows of that batch (1 where padding is removed).
    """

    def __init__(self, packed: Int[Tensor, " k"], rows: Int[Tensor, " k"], batch: int) -> None:
        self.packed, self.rows, self.batch = packed, rows, batch

    def numbers(
        self, logits: Float[Tensor, "k vocab"], input_ids: Any, temperature: float
    ) -> dict[str, Tensor]:
        """log-probability of the produced token and entropy, in nats, NaN where not watched."""
        log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
        produced = torch.roll(input_ids.values(), -1)[self.packed]
        per_token = {
            OTHER_LOG_PROBS: log_probs.gather(1, produced[:, None])[:, 0],
            OTHER_ENTROPY: -(log_probs.exp() * log_probs).nansum(-1),
        }
        offsets = input_ids.offsets()
        found = {}
        for name, values in per_token.items():
            row = torch.full(input_ids.values().shape, torch.nan, device=values.device)
            row[self.packed] = values
            found[name] = torch.nested.nested_tensor_from_jagged(row, offsets)
        return found


def _watched(micro_batch: TensorDict, stride: int, passed: int) -> _Watched:
    """Every stride-th position that predicts a response token, `passed` of them lying behind."""
    ids, mask = micro_batch["input_ids"], micro_batch["loss_mask"]
    lengths, answered = ids.offsets().diff().tolist(), mask.offsets().diff().tolist()
    width = max(lengths)
    padding_removed = tu.get_non_tensor_data(micro_batch, "use_remove_padding", True)
    packed, rows, first = [], [], 0
    for row, (length, count) in enumerate(zip(lengths, answered, strict=True)):
        places = torch.arange(length - count - 1, length - 1)
        packed.append(first + places)
        rows.append((first if padding_removed else row * width) + places)
        first += length
    counted = torch.stack([torch.cat(packed), torch.cat(rows)])
    kept = counted[:, mask.values().bool().cpu()]
    chosen = kept[:, (stride // 2 - passed) % stride :: stride].to(get_device_id())
    return _Watched(chosen[0], chosen[1], 1 if padding_removed else len(lengths))


class BuPOEngine(InternalPolicyEngine, FSDPEngineWithLMHead):
    """On a GPU."""


# A (device, vendor) key wins over veRL's own registration for the device.
EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cuda", vendor="nvidia")(
    BuPOEngine
)
