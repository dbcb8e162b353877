"""BuPO's engine in the tests' own process: batches as veRL's trainer hands them, and an oracle."""

import bupo.plugin  # isort: skip  (veRL settles on a platform when it is first asked)

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from bupo.cpu.bupo_engine import CPUBuPOEngine
from bupo.orders import Order
from tensordict import TensorDict
from tiny import tiny_model, tiny_tokenizer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.utils.losses import ppo_loss

__all__ = [
    "LAYER",
    "Sample",
    "actor",
    "batch_of",
    "build",
    "gradients",
    "group",
    "infer",
    "internal",
    "is_inner",
    "loss_of",
    "plain_model",
    "plain_policy",
    "plugin",
    "samples",
    "save_model",
    "update",
    "weights",
]

plugin = bupo.plugin

#: l of the tests, in models of four layers.
LAYER = 2


@dataclass(frozen=True)
class Sample:
    prompt: list[int]
    response: list[int]
    old_log_probs: list[float] = field(default_factory=list)
    advantage: float = 0.0
    mask: list[int] | None = None

    @property
    def ids(self):
        return [*self.prompt, *self.response]

    @property
    def response_mask(self):
        return self.mask or [1] * len(self.response)


@contextmanager
def group(rank=0, world_size=1, store=None):
    """A gloo group, closed in the end: other tests know of none."""
    store = dist.HashStore() if store is None else store
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def save_model(path, family, weights=None):
    """A tiny model with a tokenizer, since veRL loads both."""
    model = tiny_model(family)
    if weights is not None:
        model.load_state_dict(weights)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def samples(seed=0):
    """Ragged ones: lengths (prompt, response) and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(3, 96, (count,), generator=generator).tolist()

    lengths = [(3, 9), (12, 4), (1, 1), (7, 16), (5, 2), (2, 11)]
    advantages = [1.3, -0.9, 0.4, -1.6, 0.8, -0.2]
    return [
        Sample(ids(prompt), ids(response), [-4.0] * response, advantage)
        for (prompt, response), advantage in zip(lengths, advantages, strict=True)
    ]


def batch_of(items, order=None, **values):
    """The batch of `items` as TransferQueue packs it, and what veRL's trainer and worker add."""
    rows = [
        {
            "prompts": torch.tensor(item.prompt),
            "responses": torch.tensor(item.response),
            "response_mask": torch.tensor(item.response_mask),
            "loss_mask": torch.tensor(item.response_mask),
            "input_ids": torch.tensor(item.ids),
            "position_ids": torch.arange(len(item.ids)),
            "old_log_probs": torch.tensor(item.old_log_probs, dtype=torch.float32),
            "advantages": torch.full((len(item.response),), item.advantage),
        }
        for item in items
    ]
    columns = {
        name: torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged)
        for name in rows[0]
    }
    data = TensorDict(columns, batch_size=[len(items)])
    extra_info = {
        "temperature": 1.0,
        "calculate_entropy": True,
        "global_batch_size": len(items),
        "use_remove_padding": False,
        "use_fused_kernels": False,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": len(items),
    } | values
    with nullcontext() if order is None else order.given_with(extra_info):
        return tu.assign_non_tensor(data, **extra_info)


def build(path, kind=CPUBuPOEngine, **model):
    """An engine as configs/_cpu.yaml has it."""
    fp32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    built = kind(
        model_config=HFModelConfig(
            path=str(path),
            override_config={"attn_implementation": "sdpa"},
            **{"use_remove_padding": False, "enable_gradient_checkpointing": False} | model,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", model_dtype="fp32", mixed_precision=fp32, use_torch_compile=False
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, weight_decay=0.1, total_training_steps=9),
        checkpoint_config=CheckpointConfig(),
    )
    built.initialize()
    return built


def actor(**settings):
    """The paper's objective: no dual clip, mean over tokens, then over responses."""
    paper = {"loss_agg_mode": "seq-mean-token-mean", "clip_ratio_c": 1e9}
    return ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=8, **paper | settings
    )


def infer(engine, data):
    """What the engine tells of every token, response by response: name -> [item][position]."""
    with engine.eval_mode():
        output = engine.infer_batch(data)["model_output"]
    prompts = data["prompts"].offsets().diff().tolist()
    return {
        name: [
            row[prompt - 1 : len(row) - 1]
            for prompt, row in zip(prompts, rows.unbind(), strict=True)
        ]
        for name, rows in output.items()
    }


def update(engine, data, **settings):
    """One optimizer step; veRL's output."""
    with engine.train_mode():
        return engine.train_batch(data, partial(ppo_loss, config=actor(**settings)))


def loss_of(output):
    """The mini-batch's loss: veRL scales every micro-batch's part."""
    return sum(output["loss"])


def gradients(engine, data, **settings):
    """The mini-batch's loss, and its gradients by name, before any step."""
    with engine.train_mode():
        engine.optimizer_zero_grad()
        loss_function = partial(ppo_loss, config=actor(**settings))
        output = engine.forward_backward_batch(data, loss_function, forward_only=False)
        found = {
            name: whole(parameter.grad)
            for name, parameter in engine.module.named_parameters()
            if parameter.grad is not None
        }
    return loss_of(output), found


def whole(value):
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def weights(engine):
    """All weights as they are now."""
    return {name: whole(value) for name, value in engine.module.state_dict().items()}


def is_inner(name):
    """Whether a gradient of pi_l's loss reaches this weight (Eq. 16)."""
    layers = any(f".layers.{place}." in name for place in range(LAYER))
    return layers or "embed_tokens" in name or "lm_head" in name


class Policy(NamedTuple):
    log_probs: torch.Tensor
    entropy: torch.Tensor


def plain_model(path):
    """The model of a directory, away from veRL: eager attention in float64."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    )


def plain_policy(model, item, layer=None, temperature=1.0):
    """pi_layer (Eq. 6), or pi_theta without a layer, at every position of a response."""
    output = model(torch.tensor([item.ids]), output_hidden_states=True, use_cache=False)
    logits = output.logits
    if layer is not None:
        logits = output.hidden_states[layer] @ model.lm_head.weight.T
    every = (logits[0, len(item.prompt) - 1 : -1] / temperature).log_softmax(-1)
    produced = every.gather(1, torch.tensor(item.response)[:, None])[:, 0]
    return Policy(produced, -(every.exp() * every).sum(-1))


def internal(**options):
    """An order for pi_l."""
    return Order(layer=LAYER, internal=True, **options)
