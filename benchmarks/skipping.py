"""What an internal update costs with its upper layers skipped, in units of a whole one.

    python benchmarks/skipping.py [--pairs 15]

A 12-layer Qwen3 of random weights, one thread; interleaved pairs, their ratios' median and range.
The expectation is (l + h) / (L + h), h being lm_head's cost in layers, by their multiplications.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from bupo.probe import Probe
from transformers import Qwen3Config, Qwen3ForCausalLM

LAYERS, WIDTH, VOCAB, TOKENS = 12, 256, 4096, 512


def update(model: Qwen3ForCausalLM, ids: torch.Tensor, armed: object) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad()
    begin = time.perf_counter()
    with armed:  # type: ignore[attr-defined]
        logits = model(ids, use_cache=False).logits
    logits.log_softmax(-1)[..., 0].mean().backward()
    return time.perf_counter() - begin


def main() -> None:
    """Print a line a layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    ids = torch.randint(0, VOCAB, (1, TOKENS))
    layer = sum(it.numel() for it in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel() / layer
    print(f"{LAYERS} layers, lm_head costs as much as {head:.2f} of them; {pairs} pairs")
    for inner in (2, 4, 6, 9):
        probe = Probe(model, inner)
        ratios = []
        for number in range(pairs + 1):
            whole = update(model, ids, nullcontext())
            skipped = update(model, ids, probe.internal(skip_upper_layers=True))
            if number:  # the first warms up
                ratios.append(skipped / whole)
        expected = (inner + head) / (LAYERS + head)
        print(
            f"l = {inner:2}: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}), expected {expected:.2f}"
        )


if __name__ == "__main__":
    main()
