"""Tokens a second of vLLM beside Hugging Face generate, in one process.

    python benchmarks/engines.py [--pairs 3]

The bundled model in its own dtype, 8 problems x 4 answers of 48 tokens; interleaved, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

from entropylens.demo import demo_model
from entropylens.engines import open_engine
from entropylens.engines.vllm import VLLMEngine
from entropylens.generation import generate
from entropylens.problems import load_problems
from entropylens.prompts import encode_problems
from entropylens.sampling import Sampling


def main() -> None:
    """Print a line an engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    pairs = parser.parse_args().pairs
    fast = VLLMEngine(str(demo_model()))
    plain = open_engine(demo_model(), engine="hf", dtype=fast.settings["dtype"])
    problems = load_problems("bundled").head(8)
    prompts = encode_problems(problems, fast.tokenizer, fast.limits)
    speeds: dict[str, list[float]] = {"vLLM": [], "Hugging Face generate": []}
    for pair in range(pairs + 1):
        for found, engine in zip(speeds.values(), (fast, plain), strict=True):
            begun = time.perf_counter()
            answers = generate(engine, prompts, Sampling(4, 48, seed=pair), progress=False)
            if pair:  # the first warms up
                tokens = sum(it.num_tokens for it in answers)
                found.append(tokens / (time.perf_counter() - begun))
    for name, found in speeds.items():
        print(f"{name}: {statistics.median(found):.0f} tokens/s")
    fast.close()


if __name__ == "__main__":
    main()
