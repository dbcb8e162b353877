"""Cost of analyze() against the paper's pseudo-code (A.4), interleaved in one process.

    python benchmarks/naive.py [--pairs 5] [--kernel auto] [--memory]

Prints the median of the time ratios on the 581 response tokens of tests/data/smollm2.json, or
with --memory the peak memory above the loaded model for 8 and for 80 responses.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

from entropylens.capture import capture
from entropylens.demo import demo_model
from entropylens.doctor import usable_cores
from entropylens.measure import measure
from entropylens.responses import Response, Responses
from entropylens.sources import hf
from entropylens.sources.subject import Subject

DATA = Path(__file__).parents[1] / "tests" / "data" / "smollm2.json"


def load() -> tuple[Subject, Responses]:
    """The bundled model and the oracle's responses."""
    torch.set_num_threads(usable_cores())
    given = json.loads(DATA.read_text())["responses"]
    items = tuple(Response(tuple(one["prompt_ids"]), tuple(one["response_ids"])) for one in given)
    return hf.load(demo_model()), Responses(items)


@torch.inference_mode()
def pseudo_code(subject: Subject, responses: Responses) -> None:
    """Raw entropies of H^{l-1}, A^l, F^l, H^l and both module inputs, as A.4 writes them."""
    lm_head = subject.model.lm_head
    for response in responses.items:
        ids = torch.tensor([(*response.prompt_ids, *response.response_ids)])
        positions = torch.arange(len(response.prompt_ids) - 1, ids.shape[1] - 1)
        states, _ = capture(subject.anatomy, positions, ids, use_cache=False)
        for place in range(states.num_layers):
            for hidden_state in (
                states.stream_in(place), states.attn_in[place], states.attn_out[place],
                states.ffn_in[place], states.ffn_out[place], states.stream_out[place],
            ):  # fmt: skip
                logits = lm_head(hidden_state)
                probs = torch.softmax(logits, dim=-1)
                log_probs = torch.log_softmax(logits, dim=-1)
                -(probs * log_probs).sum(dim=-1)


def compare(pairs: int, kernel: str) -> None:
    """Print each pair's times and the median ratio."""
    subject, responses = load()

    def ours() -> str:
        return measure(subject, responses, kernel=kernel, progress=False).kernel

    body = ours()  # compiles
    ratios = []
    for pair in range(pairs):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        pseudo_code(subject, responses)
        end = time.perf_counter()
        ratios.append((middle - start) / (end - middle))
        print(
            f"pair {pair + 1}: ours {middle - start:.1f} s, pseudo-code {end - middle:.1f} s, "
            f"ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"{body} kernel: median ratio {statistics.median(ratios):.3f}")


def peak_above_model(copies: int) -> float:
    """MB that measuring 8 * copies responses adds to the peak of a process of its own."""
    subject, responses = load()
    # Touch every weight, so that the loaded model is resident before the reading starts.
    sum(float(parameter.detach().sum()) for parameter in subject.model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = _status("VmRSS")
    measure(subject, Responses(responses.items * copies), progress=False)
    return _status("VmHWM") - before


def _status(field: str) -> float:
    """MB of a field of /proc/self/status."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if field in line
    )
    return float(line.split()[1]) / 1e3


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--kernel", default="auto", choices=["auto", "compiled", "eager"])
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if not options.memory:
        return compare(options.pairs, options.kernel)
    for copies in (1, 10):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(
                f"{8 * copies} responses: {pool.apply(peak_above_model, (copies,)):.0f} MB",
                flush=True,
            )
    return None


if __name__ == "__main__":
    sys.exit(main())
