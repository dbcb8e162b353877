"""Inputs of the golden images, made of formulas: the same on every machine."""

from functools import cache

import matplotlib as mpl
import numpy as np
import pandas as pd
from profiles import analysis, three_stages, weak_llama
from test_comparison import drawn
from test_scores import evaluation

from entropylens.collection import Collection
from entropylens.plots import PICTURES
from entropylens.plots.layout import page_width
from entropylens.training_run import TrainingRun

__all__ = ["CASES", "collection", "render", "run"]


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
