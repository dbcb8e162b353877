"""What entropylens is timed against, each written as one would write it; and the limit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropylens.batching import batch, pieces
from entropylens.capture import capture, evaluating
from entropylens.demo import demo_model
from entropylens.planning import plan
from entropylens.policy import VOCAB_TILE
from entropylens.products import product
from entropylens.readings import ROWS
from entropylens.responses import Response
from entropylens.sources import hf
from entropylens.sources.subject import Subject

__all__ = [
    "bare_products",
    "bundled",
    "forward_passes",
    "logit_lens",
    "nnsight_trace",
    "pseudo_code",
    "random_model",
]

DATA = Path(__file__).parents[1] / "tests" / "data" / "smollm2.json"
Items = tuple[Response, ...]


def bundled(tokens: int) -> tuple[Subject, Items]:
    """The bundled model, and the oracle's responses up to this many tokens."""
    given = json.loads(DATA.read_text())["responses"]
    items: list[Response] = []
    for one in given:
        left = tokens - sum(it.num_tokens for it in items)
        if left > 0:
            items.append(Response(tuple(one["prompt_ids"]), tuple(one["response_ids"][:left])))
    return hf.load(demo_model()), tuple(items)


@torch.inference_mode()
def pseudo_code(subject: Subject, items: Items) -> None:
    """Raw entropies of H^{l-1}, A^l, F^l, H^l and both module inputs, as A.4 writes them."""
    lm_head = subject.model.lm_head
    for response in items:
        ids, positions = _ids(response)
        states, _ = capture(subject.anatomy, positions, ids, use_cache=False)
        for place in range(states.num_layers):
            for hidden_state in (
                states.stream_in(place), states.attn_in[place], states.attn_out[place],
                states.ffn_in[place], states.ffn_out[place], states.stream_out[place],
            ):  # fmt: skip
                _entropy(lm_head(hidden_state))


def logit_lens(subject: Subject, items: Items) -> Callable[[], None]:
    """TransformerLens: the normed entropy of the L + 1 states of the stream alone."""
    from transformer_lens.model_bridge import TransformerBridge

    # A model of its own: the bridge puts modules of its own into it.
    bridge = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct", hf_model=hf.load(demo_model()).model,
        tokenizer=subject.tokenizer, device="cpu",
    )  # fmt: skip

    @torch.inference_mode()
    def run() -> None:
        for response in items:
            ids, positions = _ids(response)
            _, cache = bridge.run_with_cache(ids)
            stream = [cache["blocks.0.hook_resid_pre"]]
            stream += [cache[f"blocks.{it}.hook_resid_post"] for it in range(bridge.cfg.n_layers)]
            for state in stream:
                _entropy(bridge.unembed(bridge.ln_final(state[:, positions])))

    return run


def nnsight_trace(subject: Subject, items: Items) -> Callable[[], None]:
    """nnsight: the same states, read in a trace."""
    import nnsight

    model = hf.load(demo_model()).model
    traced = nnsight.TransformersModel(model, tokenizer=subject.tokenizer)
    layers = len(model.model.layers)

    @torch.inference_mode()
    def run() -> None:
        for response in items:
            ids, positions = _ids(response)
            with traced.trace(ids):
                states = nnsight.save([traced.model.layers[0].input])
                for place in range(layers):
                    states.append(traced.model.layers[place].output)
            for state in states:
                hidden = (state[0] if isinstance(state, tuple) else state)[..., positions, :]
                _entropy(model.lm_head(model.model.norm(hidden)))

    return run


def forward_passes(subject: Subject, items: Items, batch_tokens: int) -> Callable[[], None]:
    """The model's own forward passes, hooks included."""

    def run() -> None:
        with evaluating(subject.model):
            for group in plan(items, batch_tokens):
                for _ in pieces(subject.anatomy, items, group, batch_tokens):
                    pass

    return run


def unwatched_passes(subject: Subject, items: Items, batch_tokens: int) -> Callable[[], None]:
    """The same forward passes without hooks; prompts must not be shared."""

    @torch.inference_mode()
    def run() -> None:
        with evaluating(subject.model):
            for group in plan(items, batch_tokens):
                whole = batch(items, group)
                subject.anatomy.decoder(input_ids=whole.input_ids, use_cache=False)

    return run


def bare_products(subject: Subject, items: Items, batch_tokens: int) -> Callable[[], None]:
    """The 4 L + 2 products that cannot be avoided: same states, tiles and row blocks, no more."""
    anatomy, weight = subject.anatomy, subject.anatomy.unembedding.weight
    with evaluating(subject.model):
        held = [
            piece.states
            for group in plan(items, batch_tokens)
            for piece in pieces(anatomy, items, group, batch_tokens)
        ]

    @torch.inference_mode()
    def run() -> None:
        for states in held:
            step = max(1, ROWS // len(states.final))
            for start in range(0, len(weight), VOCAB_TILE):
                tile = weight[start : start + VOCAB_TILE]
                product(states.embedding, tile)
                product(states.final, tile)
                for site in (states.attn_in, states.ffn_in, states.attn_out, states.ffn_out):
                    for first in range(0, len(site), step):
                        product(site[first : first + step].flatten(0, 1), tile)

    return run


def _ids(response: Response) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([(*response.prompt_ids, *response.response_ids)])
    return ids, torch.arange(len(response.prompt_ids) - 1, ids.shape[1] - 1)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    probs = torch.softmax(logits, dim=-1)
    log_probs = torch.log_softmax(logits, dim=-1)
    return -(probs * log_probs).sum(dim=-1)


def random_model(**sizes: Any) -> nn.Module:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
