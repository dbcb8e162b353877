"""What one FSDP2 engine of veRL takes: memory of a GPU, and disk for a checkpoint.

Formulas for packed sequences. P parameters (p of them trained), root those outside of layers, S
GPUs that share a copy; c, r, m bytes of a number that is computed, reduced, stored (bf16, float32,
float32 by default); n tokens of a micro-batch, V vocabulary, d width, L layers, w inputs and
outputs of one layer's matrices (of active experts). On a GPU, an update holds the largest of

    at the logits   states + c (root + 2 layers) gathered + kept + b n V + c p_root (lm_head's)
    in a layer      the same without logits + 2 c n w (recomputed) + (c + 2 r) p_layer
    in the step     states + m p/S (Adam's square root)

    states          m P/S weights + m p/S gradients + 2 m p/S moments
    kept            c n d (L + 12), the 12 being the final norm's float32; without gradient
                    checkpointing 2 c n w L

2 w: what matrices read and give, and as much again for norms, rotary and gated products; attention
is taken to build no score matrix. b, bytes a logit, is what `prepare_model_outputs` holds at once,
forward and backward, for c = 2 (its float32 copies are 4 each):

    update          2 with flash-attn's cross entropy: the gradient takes the logits' place
                    6 with another attention: row by row, each float32 log-softmax is kept
                    10 with the entropy in the graph and compiled, 18 if not
    log-probs       6 with the entropy (always asked for) compiled, 10 if not;
                    2 in chunks, and 12 for one chunk
    temperature     2 more where it is not 1: the scaled copy
    fused kernels   24, but for 512 tokens instead of n

Left out: sequence parallelism and activation offload, which need less; fragmentation, micro-batches
that veRL's balancing lets exceed their token budget, masks of attention other than flash, which
need more. Optimizers are taken for AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bupo.model import skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Engine", "Shape", "bytes_of", "measure"]

#: Bytes of a rank's "extra" state in a checkpoint: random generators and schedule.
EXTRA = 16 * 1024
#: Tokens that veRL's fused kernel unembeds at once.
FUSED_TOKENS = 512


def bytes_of(dtype: Any) -> int:
    """Bytes of a number, by any name that veRL and vLLM have for its type."""
    return 4 if str(dtype) in {"32", "fp32", "float32", "float"} else 2


@dataclass(frozen=True)
class Shape:
    """A model in numbers.

    Args:
        total: parameters, tied ones once, without adapters.
        adapters: parameters of LoRA, 0 without it.
        root: parameters outside of layers.
        layer: parameters of the largest layer.
        layers: how many there are.
        work: inputs and outputs of the matrices that one token meets in the largest layer.
        width: of the residual stream.
        vocab: rows of the unembedding.
    """

    total: int
    adapters: int
    root: int
    layer: int
    layers: int
    work: int
    width: int
    vocab: int

    @property
    def trained(self) -> int:
        """Parameters that have gradients and moments."""
        return self.adapters or self.total


@dataclass(frozen=True)
class Engine:
    """One FSDP2 engine; methods give bytes, on one GPU except for `checkpoint`.

    Args:
        shape: of its model.
        fsdp: its fsdp_config, complete.
        gpus: of the whole run.
        checkpointing: whether layers are computed again in the backward pass.
    """

    shape: Shape
    fsdp: Any
    gpus: int
    checkpointing: bool = True

    @property
    def shards(self) -> int:
        """GPUs that share one copy of the model."""
        size = int(self.fsdp.fsdp_size)
        return size if 0 < size < self.gpus else self.gpus

    @property
    def stored(self) -> int:
        """Bytes of a number of the sharded weights, and of their moments and gradients."""
        return bytes_of(self.fsdp.model_dtype or "fp32")

    @property
    def compute(self) -> int:
        """Bytes of a number of the gathered weights, and of activations."""
        return bytes_of((self.fsdp.mixed_precision or {}).get("param_dtype", "bf16"))

    def states(self, *, weights: bool = False, moments: bool = False) -> dict[str, float]:
        """Weights and moments on the GPU: those asked for, and those that stay there."""
        share = 0.0 if self.fsdp.offload_policy else self.stored / self.shards
        here = weights or not self.fsdp.param_offload, moments or not self.fsdp.optimizer_offload
        return {
            "weights": here[0] * share * (self.shape.total + self.shape.adapters),
            "optimizer": here[1] * share * 2 * self.shape.trained,
        }

    def gathered(self) -> float:
        """The root and two layers, one being fetched; all where nothing is given back."""
        some = self.shape.root + 2 * self.shape.layer
        return self.compute * (some if self.fsdp.reshard_after_forward else self.shape.total)

    def logits(self, settings: Any, tokens: int, *, update: bool) -> float:
        """The logits at `tokens` positions and all that is made of them at once.

        Args:
            settings: actor_rollout_ref, complete.
            tokens: positions.
            update: whether they are made with gradients.
        """
        c, vocab, fsdp = self.compute, self.shape.vocab, self.fsdp
        if settings.model.use_fused_kernels:
            return min(tokens, FUSED_TOKENS) * vocab * (2 * c + 20)
        each = c if settings.rollout.temperature == 1 else 2 * c
        if update:
            if settings.model.override_config.attn_implementation != "flash_attention_2":
                each = each + 4 if c == 2 else 16
            if settings.actor.calculate_entropy or settings.actor.entropy_coeff:
                each = max(each, 3 * c + 4 if fsdp.use_torch_compile else 5 * c + 8)
        elif fsdp.entropy_from_logits_with_chunking:
            chunk = min(tokens, fsdp.entropy_from_logits_chunk_size)
            return vocab * (tokens * each + chunk * 12)
        else:
            each += 4 if fsdp.use_torch_compile else 8
        return vocab * tokens * each

    def scoring(self, tokens: int, logits: float) -> dict[str, float]:
        """A pass without gradients, at its logits; nothing of the states."""
        activations = 2 * self.compute * tokens * self.shape.width
        return {"unsharded layers": self.gathered(), "activations": activations, "logits": logits}

    def update(self, tokens: int, logits: float) -> list[dict[str, float]]:
        """The three moments of an update of micro-batches of `tokens`."""
        shape, size = self.shape, self.compute * tokens
        reduced = bytes_of((self.fsdp.mixed_precision or {}).get("reduce_dtype", "fp32"))
        states = self.states(weights=True, moments=True)
        gradients = states["optimizer"] / 2
        if self.fsdp.use_no_sync_for_gradient_accumulation:
            gradients += reduced * shape.trained
        head = gradients + self.compute * (0 if shape.adapters else shape.root)
        layer = shape.adapters / shape.layers if shape.adapters else shape.layer
        inside = 2 * size * shape.work
        kept = size * shape.width * (shape.layers + 12)
        if not self.checkpointing:
            kept = inside * shape.layers
        ready = states | {"unsharded layers": self.gathered(), "activations": kept}
        return [
            ready | {"gradients": head, "logits": logits},
            ready
            | {
                "gradients": head + (self.compute + 2 * reduced) * layer,
                "activations": kept + (inside if self.checkpointing else 0),
            },
            states | {"gradients": gradients, "optimizer": 1.5 * states["optimizer"]},
        ]

    def checkpoint(self, settings: Any) -> float:
        """Bytes on disk, of all ranks: each replica writes its own shards.

        Args:
            settings: its checkpoint section, complete.
        """
        everything = self.shape.total + self.shape.adapters
        alone = self.shape.adapters if settings.save_lora_only else 0
        copies = self.gpus / self.shards
        sizes = {
            "model": self.stored * (alone or everything) * copies,
            "optimizer": self.stored * 2 * self.shape.trained * copies,
            "extra": EXTRA * self.gpus,
            "hf_model": self.stored * everything,
        }
        return sum(sizes.get(name, 0) for name in settings.save_contents)


def measure(hf_config: PretrainedConfig, settings: Any, *, values: bool = False) -> Shape:
    """Build a model on the meta device and count it.

    Args:
        hf_config: its configuration.
        settings: actor_rollout_ref.model or critic.model, complete.
        values: with a value head in lm_head's place.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    model = skeleton(hf_config, trust_remote_code=settings.trust_remote_code)
    text, lm_head = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    every = settings.target_modules == "all-linear"
    targets = SimpleNamespace(
        target_modules=".*" if every else settings.target_modules,
        exclude_modules=settings.exclude_modules,
    )
    adapted = [
        module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and check_target_module_exists(targets, name)
        and not (every and module is lm_head)
    ]
    wrapped = model._no_split_modules or ()  # the layers that FSDP2 gathers one by one
    layers = [list(it.parameters()) for it in model.modules() if type(it).__name__ in wrapped]
    layers = layers or [list(model.parameters())]
    total = sum(it.numel() for it in model.parameters())
    root = total - sum({id(it): it.numel() for layer in layers for it in layer}.values())
    if values:
        embedding = model.get_input_embeddings().weight
        lost = sum(it.numel() for it in lm_head.parameters() if it is not embedding)
        total, root = (it - lost + text.hidden_size + 1 for it in (total, root))
    experts = getattr(text, "num_experts_per_tok", None) or 1

    def met(shape: torch.Size) -> int:
        """Inputs and outputs of a matrix, or of the active ones in a stack of experts."""
        return sum(shape) if len(shape) == 2 else experts * sum(shape[1:]) * (len(shape) == 3)

    return Shape(
        total=total,
        adapters=settings.lora_rank * sum(sum(it) for it in adapted),
        root=root,
        layer=max(sum(it.numel() for it in layer) for layer in layers),
        layers=len(layers),
        work=max(sum(met(it.shape) for it in layer) for layer in layers),
        width=text.hidden_size,
        vocab=lm_head.weight.shape[0],
    )
