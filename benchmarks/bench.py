"""Cost of analyze() as ratios of interleaved runs; writes benchmarks/RESULTS.md.

    python benchmarks/bench.py [--pairs 15] [--tokens 128] [--threads 2]

Each row times ours and one other turn by turn in this process; its ratio's median and quartiles
are told. The machine is named; times on it are no one else's, ratios nearly are.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import rivals
import torch

from entropylens.doctor import usable_cores
from entropylens.fast_reading import why_not_fast
from entropylens.measure import BATCH_TOKENS, measure
from entropylens.responses import Response, Responses
from entropylens.results import Analysis
from entropylens.sources import open_model
from entropylens.sources.subject import Subject
from entropylens.versions import versions

RESULTS = Path(__file__).with_name("RESULTS.md")
#: A run of these sizes is the unit of the growth table.
BASE = {"hidden_size": 256, "vocab_size": 16_384, "num_hidden_layers": 6}
LENGTH, COUNT = 64, 2
#: Two layers of Qwen3-4B's width and vocabulary: where products are nearly all.
WIDE = {"hidden_size": 2560, "vocab_size": 151_936, "num_hidden_layers": 2}
#: Response tokens of which the second half is what a further token costs.
HALF_AND_WHOLE = 256, 512
#: Prompt, answer and number of the samples of one prompt.
SHARED = 200, 32, 8
GROWTH = [
    ("hidden_size", 512), ("hidden_size", 1024), ("vocab_size", 65_536),
    ("num_hidden_layers", 12), ("length", 256), ("count", 8),
]  # fmt: skip

Run = Callable[[], object]
Items = tuple[Response, ...]


def interleaved(one: Run, other: Run, pairs: int) -> list[float]:
    """Ratios of their times, the second's over the first's; each has warmed up once."""
    one(), other()
    ratios = []
    for _ in range(pairs):
        start = time.perf_counter()
        one()
        middle = time.perf_counter()
        other()
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return ratios


def each_further_token(subject: Subject, items: Callable[[int], Items], pairs: int) -> list[float]:
    """Ours over forward passes and bare products, of what half of the tokens adds to the other.

    What a run costs once, the control above all, is in neither.

    Args:
        subject: the model.
        items: responses of so many tokens in all.
        pairs: how often.
    """

    def both(given: Items) -> tuple[Run, Run]:
        products = rivals.bare_products(subject, given, BATCH_TOKENS)
        forward = rivals.forward_passes(subject, given, BATCH_TOKENS)
        return (
            lambda: measure(subject, Responses(given), kernel="compiled", progress=False),
            lambda: (forward(), products()),
        )

    (few, least), (many, most) = map(both, map(items, HALF_AND_WHOLE))
    runs = few, many, least, most
    for run in runs:
        run()
    ratios = []
    for _ in range(pairs):
        times = []
        for run in runs:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratios.append((times[1] - times[0]) / (times[3] - times[2]))
    return ratios


def told(name: str, ratios: Sequence[float]) -> str:
    """A row of a table."""
    low, median, high = statistics.quantiles(ratios, n=4)
    row = f"| {name} | {median:.2f} | {low:.2f}-{high:.2f} |"
    print(row, flush=True)
    return row


def against_others(pairs: int, tokens: int) -> list[str]:
    """The bundled model: ours against the rivals and the limit."""
    subject, items = rivals.bundled(tokens)

    def ours() -> object:
        return measure(subject, Responses(items), kernel="compiled", progress=False)

    def naive() -> None:
        rivals.pseudo_code(subject, items)

    rows = ["| other / ours | median | quartiles |", "| --- | --- | --- |"]
    rows.append(told("the paper's pseudo-code (6 L states, entropies alone)", interleaved(
        ours, naive, pairs)))  # fmt: skip
    products = rivals.bare_products(subject, items, BATCH_TOKENS)
    forward = rivals.forward_passes(subject, items, BATCH_TOKENS)

    def limit() -> None:
        forward()
        products()

    rows.append(told(
        "ours / (forward passes and bare products)", interleaved(limit, ours, pairs)
    ))  # fmt: skip
    rows.append(told("ours / bare products alone", interleaved(products, ours, pairs)))
    rows.append(told("forward passes with hooks / ours", interleaved(ours, forward, pairs)))
    rows.append(told(
        "each further token: ours / (forward passes and bare products)",
        each_further_token(subject, lambda number: rivals.bundled(number)[1], pairs),
    ))  # fmt: skip
    rows.append(told(
        f"the same, random model of {WIDE}",
        each_further_token(random_subject(WIDE), lambda number: answers(1, number), pairs),
    ))  # fmt: skip
    lens = rivals.logit_lens(subject, items)
    rows.append(told("TransformerLens' logit lens (L + 1 states)", interleaved(ours, lens, pairs)))
    trace = rivals.nnsight_trace(subject, items)
    rows.append(told("an nnsight trace (L + 1 states)", interleaved(ours, trace, pairs)))
    return rows


def with_bf16(pairs: int, tokens: int) -> list[str]:
    """Fast products against exact ones, and the pseudo-code."""
    why_not = why_not_fast(torch.device("cpu"))
    if why_not is not None:
        return [f"Not timed: {why_not}."]
    subject, items = rivals.bundled(tokens)

    def run(precision: str) -> Callable[[], Analysis]:
        return lambda: measure(
            subject, Responses(items), kernel="compiled", progress=False, precision=precision
        )

    fast = run("fast")
    told_of = fast().settings
    rows = ["| other / fast | median | quartiles |", "| --- | --- | --- |"]
    rows.append(told("exact", interleaved(fast, run("exact"), pairs)))
    rows.append(
        told("pseudo-code", interleaved(fast, lambda: rivals.pseudo_code(subject, items), pairs))
    )
    rows.append(
        f"\nMeans move by at most {told_of['precision_error']:.4f} nats on "
        f"{told_of['precision_positions']} positions; {told_of['precision_exact_sites']} sites in "
        "float32."
    )
    return rows


def forward_alone(pairs: int, tokens: int) -> list[str]:
    """What hooks add to a forward pass, and what reading a prompt once takes off a run."""
    subject, items = rivals.bundled(tokens)
    watched = rivals.forward_passes(subject, items, BATCH_TOKENS)
    unwatched = rivals.unwatched_passes(subject, items, BATCH_TOKENS)
    rows = ["| | median | quartiles |", "| --- | --- | --- |"]
    rows.append(told(
        "forward passes: with hooks / without", interleaved(unwatched, watched, pairs)
    ))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    prompt_tokens, answer_tokens, count = SHARED
    prompt = random_ids(prompt_tokens, generator)
    same = Responses(
        tuple(Response(prompt, random_ids(answer_tokens, generator)) for _ in range(count))
    )
    # A first token of its own makes a prompt of its own.
    others = tuple(
        replace(it, prompt_ids=(place, *it.prompt_ids[1:])) for place, it in enumerate(same.items)
    )

    def run(given: Responses) -> Run:
        return lambda: measure(subject, given, kernel="compiled", progress=False)

    rows.append(told(
        f"{count} samples of {answer_tokens} tokens, prompts of {prompt_tokens}: one prompt / as "
        "many as samples", interleaved(run(Responses(others)), run(same), pairs),
    ))  # fmt: skip
    return rows


def growth(pairs: int) -> list[str]:
    """How cost grows with each size, against a base run."""

    def run(**changed: int) -> Run:
        subject = random_subject(BASE | {name: it for name, it in changed.items() if name in BASE})
        items = Responses(answers(changed.get("count", COUNT), changed.get("length", LENGTH)))
        return lambda: measure(subject, items, kernel="compiled", progress=False)

    base = run()
    rows = ["| size | cost of the base run | quartiles |", "| --- | --- | --- |"]
    for name, value in GROWTH:
        start = BASE.get(name, LENGTH if name == "length" else COUNT)
        label = f"{name} {start} -> {value} ({value / start:g} x)"
        rows.append(told(label, interleaved(base, run(**{name: value}), pairs)))
    return rows


def random_subject(sizes: dict[str, int]) -> Subject:
    """A Llama of random weights."""
    model = rivals.random_model(
        **sizes, intermediate_size=2 * sizes["hidden_size"], num_attention_heads=8,
        num_key_value_heads=4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return open_model(model, None)


def random_ids(number: int, generator: torch.Generator) -> tuple[int, ...]:
    """Ids that every model here knows."""
    return tuple(torch.randint(2, 16_000, (number,), generator=generator).tolist())


def answers(count: int, length: int) -> Items:
    """Random answers to prompts of 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        Response(random_ids(8, generator), random_ids(length, generator)) for _ in range(count)
    )


def peak_above_model(copies: int) -> float:
    """MB that measuring 8 * copies responses adds to the peak of a process of its own."""
    subject, items = rivals.bundled(10**6)
    # Touch every weight, so that the loaded model is resident before the reading starts.
    sum(float(parameter.detach().sum()) for parameter in subject.model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = _status("VmRSS")
    measure(subject, Responses(items * copies), progress=False)
    return _status("VmHWM") - before


def memory() -> list[str]:
    """Peak memory above the loaded model."""
    rows = ["| responses | MB above the model |", "| --- | --- |"]
    for copies in (1, 4):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(f"| {8 * copies} | {pool.apply(peak_above_model, (copies,)):.0f} |")
            print(rows[-1], flush=True)
    return rows


def _status(field: str) -> float:
    """MB of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if field in line).split()[1]) / 1e3


def machine(threads: int) -> str:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((it.split(":")[1].strip() for it in lines if it.startswith("model name")), "")
    flags = next((it for it in lines if it.startswith("flags")), "").split()
    kinds = [it for it in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if it in flags]
    load = os.getloadavg()[0]
    return (
        f"{name or platform.processor()} ({', '.join(kinds)}), {usable_cores()} cores, {threads} "
        f"threads, load {load:.1f} before; torch {versions()['torch']}"
    )


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128, help="of the bundled model's answers")
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads)
    parts = [
        "# How fast it is",
        f"`make bench` on {where}. {options.pairs} interleaved pairs a row, {options.tokens} "
        "response tokens of SmolLM2-135M-Instruct in float32, every quantity of layers.csv.",
        "\n".join(against_others(options.pairs, options.tokens)),
        "## The forward pass\n\nThe same responses; and samples of one prompt, which is read once.",
        "\n".join(forward_alone(options.pairs, options.tokens)),
        f"## How cost grows\n\nRandom models; base: {BASE}, {COUNT} responses of {LENGTH} tokens.",
        "\n".join(growth(options.pairs)),
        f"## bf16 products (`--precision fast`), {2 * options.tokens} tokens",
        "\n".join(with_bf16(options.pairs, 2 * options.tokens)),
        "## Memory\n\nOf the 581 tokens of 8 responses, and of 4 times as many.",
        "\n".join(memory()),
    ]
    RESULTS.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
