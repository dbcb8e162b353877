"""Inputs of the golden images, made of formulas: the same on every machine."""

from functools import cache

import matplotlib as mpl
import numpy as np
import pandas as pd
from profiles import three_stages, weak_llama
from test_comparison import drawn
from test_scores import evaluation

from entropylens import Analysis
from entropylens.collection import Collection
from entropylens.plots import PICTURES
from entropylens.plots.layout import page_width
from entropylens.quantities import quantities_of
from entropylens.training_run import TrainingRun

__all__ = ["CASES", "analysis", "collection", "render", "run"]

VOCAB = 151_936


def analysis(model, ffn, *, prompts=24, mixers=None, without_ffn=(), seed=0, reading="raw"):
    """An analysis with this profile of FFN entropy changes, and all else as models have it.

    Args:
        ffn: [L] in nats.
        mixers: one a layer; where it is "none", what belongs to attention is NaN.
        without_ffn: layers where what belongs to the FFN is NaN.
        prompts: with one response each.
    """
    random = np.random.default_rng(seed)
    ffn = np.asarray(ffn, float)
    layers = np.arange(1, len(ffn) + 1)
    mixers = np.array(mixers or ["attention"] * len(layers))
    depth = layers / len(layers)
    stream = 0.3 + 10.5 / (1 + np.exp(14 * (depth - 0.72)))
    before = np.concatenate([[11.2], stream[:-1]])
    attn = 0.6 + 0.5 * np.sin(7 * depth)
    nll = 0.4 + 13 * (1 - depth) ** 1.5
    truth = {
        "entropy_layer": stream, "entropy_attn": before + attn,
        "entropy_ffn": np.clip(before + 0.5 * attn + ffn, 0.02, None),
        "delta_layer": stream - before, "delta_attn": attn, "delta_ffn": ffn,
        "cos_attn": 0.3 * np.sin(4 * depth), "cos_ffn": 0.5 * depth - 0.25, "cos_final": depth,
        "nll_layer": nll, "kl_layer": nll, "agree_layer": depth**4,
        "control_delta_attn": 0.3 - 0.2 * depth, "control_delta_ffn": 0.2 - 0.3 * depth,
    }  # fmt: skip
    tokens = random.integers(40, 90, prompts)
    rows = []
    for prompt in range(prompts):
        noise = 0.15 * random.normal() + 0.2 * random.normal(size=len(layers))
        columns = {
            name: truth.get(name.removeprefix("normed_"), np.ones(len(layers)))
            + (noise if "delta" in name else 0)
            for name in quantities_of(reading)
        }
        for name, values in columns.items():
            gone = mixers == "none" if "attn" in name else np.isin(layers, without_ffn)
            if "attn" in name or "ffn" in name:
                columns[name] = np.where(gone, np.nan, values)
        known = {
            "response_id": prompt, "prompt_id": str(prompt), "task": "math500", "layer": layers,
            "num_tokens": tokens[prompt], "truncated": False, "policy_entropy": 0.3,
            "policy_nll": 0.35,
        }  # fmt: skip
        rows.append(pd.DataFrame(known | columns))
    return Analysis(
        model=model, revision=None, num_layers=len(layers), vocab_size=VOCAB, dtype="float32",
        reading=reading, kernel="eager", mixers=tuple(mixers), responses=pd.concat(rows),
        skipped=0, seed=seed, versions={},
    )  # fmt: skip


def run(name, layer=None, *, internal=0, steps=100, gain=1.0, looks=True, every=10):
    """A training run whose reward rises by `gain`."""
    random = np.random.default_rng(len(name))
    step = np.arange(1, steps + 1)
    rise = gain * (1 - np.exp(-step / 30))
    metrics = pd.DataFrame(
        {
            "step": step,
            "bupo/reward": 0.4 + 0.3 * rise + random.normal(0, 0.03, steps),
            "bupo/entropy_policy": 0.5 - 0.3 * rise + random.normal(0, 0.02, steps),
            "response_length/mean": 900 + 600 * rise + random.normal(0, 50, steps),
            "bupo/internal_phase": (step <= internal).astype(float),
        }
    )
    seen = np.arange(0, steps + 1, every)
    share = seen / max(steps, 1)
    looked = pd.DataFrame(
        {
            "step": seen, "layer": layer, "perplexity": 1.6 + 0.3 * gain * share,
            "delta_layer": 1 + gain * share, "cos_final": 0.1,
            **{f"cos_{other}": 0.9 - 0.02 * (other - (layer or 0)) * (1 - gain * share / 2)
               for other in range((layer or 0) + 1, 37)},
        }
    )  # fmt: skip
    return TrainingRun(name, metrics, looked if looks and layer else None, layer, {})


def _probe(layers):
    layer = np.arange(1, layers)
    cosine = 0.9 * (layer / layers) ** 2
    return pd.DataFrame(
        {
            "layer": layer, "cosine": cosine, "cosine_low": cosine - 0.05,
            "cosine_high": cosine + 0.05,
        }
    )  # fmt: skip


def _evaluations(benchmarks, n):
    random = np.random.default_rng(5)
    return {
        name: evaluation(
            *(
                drawn(benchmark, random.beta(skill, 1.2, problems), n, place)
                for place, (benchmark, problems) in enumerate(benchmarks.items())
            )
        )
        for name, skill in (("GRPO", 0.4), ("BuPO", 0.6))
    }


def _named(*analyses):
    return {one.model: one for one in analyses}


def _regular():
    """What one has: the paper's Qwen and a Llama, four runs, two evaluations."""
    random = np.random.default_rng(1)
    return Collection(
        _named(
            analysis("Qwen/Qwen3-4B", three_stages(random)),
            analysis("OctoThinker/OctoThinker-3B-Long-Base", weak_llama(random, 28)),
        ),
        {
            one.name: one
            for one in (
                run("GRPO", gain=0.7), run("BuPO", 6, internal=30),
                run("InterGRPO-26", 26, internal=100, gain=0.2),
                run("InterGRPO-35", 35, internal=100, gain=0.4, looks=False),
            )
        },
        _evaluations({"math500": 60, "amc23": 40, "aime24": 30, "aime25": 30}, 64),
        {"Qwen/Qwen3-4B": _probe(36)},
    )  # fmt: skip


def _long():
    """80 layers."""
    profile = three_stages(np.random.default_rng(2), 14, 58, 80)
    return Collection(
        _named(analysis("Qwen/Qwen2.5-72B", profile)), {}, {}, {"Qwen/Qwen2.5-72B": _probe(80)}
    )


def _least():
    """A single layer; a single response; a single step, look, problem and answer."""
    random = np.random.default_rng(3)
    return Collection(
        _named(
            analysis("one-layer", [0.5]),
            analysis("one-response", three_stages(random, 3, 8, 12), prompts=1),
        ),
        {"short": run("short", 6, internal=1, steps=1, every=10)},
        _evaluations({"own": 1}, 1),
        {},
    )


def _gaps():
    """Layers that have no attention or no FFN: interval and points of these are NaN."""
    random = np.random.default_rng(4)
    nemotron = ["ssm", "none"] * 5 + ["attention", "none"]
    return Collection(
        _named(
            analysis(
                "nvidia/Nemotron-H-tiny", three_stages(random, 3, 8, 12), mixers=nemotron,
                without_ffn=range(1, 13, 2),
            ),
            analysis(
                "Qwen3-Next-tiny", three_stages(random, 6, 14, 24),
                mixers=(["linear_attention"] * 3 + ["attention"]) * 5 + ["none"] * 4,
            ),
        ),
        {}, {}, {},
    )  # fmt: skip


_MAKERS = {"regular": _regular, "long": _long, "least": _least, "gaps": _gaps}


@cache
def collection(kind):
    """The inputs of a kind: regular | long | least | gaps."""
    return _MAKERS[kind]()


#: Name of each golden image -> its picture, the kind of its inputs, and the page's columns.
CASES = {
    f"{picture.stem}_{kind}": (picture, kind, None)
    for kind in _MAKERS
    for picture in PICTURES
    if kind in ("regular", "least") or picture.needs == "analyses"
} | {
    f"{picture.stem}_column": (picture, "regular", 1)
    for picture in PICTURES
    if picture.stem in ("figure3_change", "figure5_features", "figure11_passing")
}


def render(name, path):
    """Draw a case, whatever a matplotlibrc of this machine says."""
    picture, kind, columns = CASES[name]
    with mpl.rc_context():
        mpl.rcdefaults()
        figure = picture.draw(collection(kind), page_width(columns))
        figure.savefig(path, dpi=60)
