"""The fused kernel on one CUDA card, against lm_head + softmax + log_softmax and the card's rate.

    python benchmarks/gpu.py [--pairs 15] [--rows 4096] [--vocab 151936] [--width 896 2560 ...]

Entropies of bf16 states over the vocabulary: the kernel and the plain form (in chunks of rows
that fit) take turns, so that a card that slows down slows both. The share is the kernel's matrix
rate, 2 * rows * d * V a pass, of torch.mm's on large square bf16 matrices in the same minute.
Prints for each d_model the median and the quartiles over the pairs, and the largest difference
in nats between the kernel and the float32 torch path on some rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from entropylens.kernels.fused import available, merge, reduce_rows
from entropylens.policy import Unembedding, entropy
from entropylens.transform import IDENTITY

#: Rows whose logits the plain form holds at once: 512 * 151936 float32 are 311 MB.
CHUNK = 512
#: Rows whose entropies are checked.
CHECKED = 64
#: Side of the square matrices whose product gives the card's rate.
SQUARE = 8192


def fused(states: Tensor, weight: Tensor) -> Tensor:
    """Ours: no logits."""
    return merge(reduce_rows(states, weight, None, IDENTITY)).entropy()


def plain(states: Tensor, weight: Tensor) -> Tensor:
    """As the paper's pseudo-code (A.4) writes it, over bf16 logits raised to float32."""
    found = []
    for chunk in states.split(CHUNK):
        logits = torch.nn.functional.linear(chunk, weight).float()
        probs = torch.softmax(logits, dim=-1)
        log_probs = torch.log_softmax(logits, dim=-1)
        found.append(-(probs * log_probs).sum(-1))
    return torch.cat(found)


def seconds(work: Callable[[], object]) -> float:
    """Time of one call on the card."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def row(width: int, rows: int, vocab: int, pairs: int) -> str:
    """One line of the table."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device="cuda")
        return drawn.to(torch.bfloat16)

    states, weight = random(rows, width), random(vocab, width) * width**-0.5
    left, right = random(SQUARE, SQUARE), random(SQUARE, SQUARE)
    for _ in range(2):  # compiles, tunes, warms up
        ours = fused(states, weight)
        plain(states, weight)
        left @ right
    ratios, rates, shares = [], [], []
    for _ in range(pairs):
        kernel = seconds(lambda: fused(states, weight))
        pseudo_code = seconds(lambda: plain(states, weight))
        square = seconds(lambda: left @ right)
        ratios.append(pseudo_code / kernel)
        rates.append(2 * rows * width * vocab / kernel / 1e12)
        shares.append(rates[-1] / (2 * SQUARE**3 / square / 1e12))
    checked = entropy(states[:CHECKED], Unembedding(weight))
    error = float((ours[:CHECKED] - checked).abs().max())
    cells = (spread(ratios), spread(rates), spread(shares), f"{error:.1e}")
    return f"| {width:5d} | " + " | ".join(f"{cell:>22}" for cell in cells) + " |"


@torch.inference_mode()
def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, nargs="+", default=[896, 2560, 4096, 5120])
    options = parser.parse_args()
    if options.pairs < 2:
        sys.exit("--pairs: quartiles need at least 2")
    if not torch.cuda.is_available():
        sys.exit("no CUDA card here: this benchmark measures nothing else")
    why_not = available(torch.device("cuda"))
    if why_not:
        sys.exit(f"the Triton kernel cannot run: {why_not}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{options.rows} rows, V = {options.vocab}, {options.pairs} pairs: median (quartiles)\n")
    heads = ("plain / fused", "fused, TFLOP/s", "share of torch.mm", "largest difference")
    print("| d     | " + " | ".join(f"{head:>22}" for head in heads) + " |")
    print("| ----: | " + " | ".join("---------------------:" for _ in heads) + " |")
    for width in options.width:
        print(row(width, options.rows, options.vocab, options.pairs), flush=True)


if __name__ == "__main__":
    main()
