"""Synthetic profiles of FFN entropy changes with known boundaries."""

import numpy as np
import pandas as pd

from entropylens import Analysis
from entropylens.looks import look_at, planned_looks
from entropylens.profile import Profile
from entropylens.quantities import quantities_of
from entropylens.resampling import PromptSums
from entropylens.stages import cut_weights, layer_shares

VOCAB = 151_936


def three_stages(random, b1=6, b2=26, layers=36, noise=0.05, plunge=1.0):
    """The paper's Qwen3-4B: clearly positive, about zero with either sign, negative."""
    profile = np.concatenate(
        [
            random.uniform(0.5, 1.5, b1),
            random.normal(0, noise, b2 - b1),
            -random.uniform(0.3, 1.5, layers - b2),
        ]
    )
    profile[-1] *= plunge
    return profile


def weak_llama(random, layers):
    """Weakly positive everywhere but the last, whose plunge is 30 times as large."""
    profile = random.uniform(0.1, 0.3, layers)
    profile[-1] = -30 * 0.2
    return profile


def negative(random, layers=30):
    """The bundled model."""
    return -random.uniform(2, 10, layers)


def positive(random, layers=24):
    """Qwen2.5-Coder-0.5B."""
    return random.uniform(0.5, 9, layers)


def isolated(random):
    """One positive layer inside convergence."""
    profile = three_stages(random)
    profile[31] = random.uniform(0.3, 1.5)
    return profile


def block(random):
    """A negative block in the middle (DeepSeek-Math), between clearly positive layers."""
    return np.concatenate(
        [
            random.uniform(0.5, 1.5, 8),
            -random.uniform(0.5, 2, 8),
            random.uniform(0.2, 1.0, 13),
            [-4.0],
        ]
    )


def studied(random, truth, prompts=24, spread=0.3, control=None):
    """What a study on `prompts` prompts sees of a true profile."""
    tokens = random.integers(20, 60, prompts).astype(float)
    common = random.normal(0, 0.5 * spread, (prompts, 1))
    seen = truth + common + random.normal(0, spread, (prompts, len(truth)))
    sums = PromptSums((seen * tokens[:, None])[..., None], tokens)
    return Profile(means=sums.means()[:, 0], sums=sums, floor=2e-4, control=control)


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


#: Standard deviation between prompts of a layer's entropy change, in `studied`.
SPREAD = 0.3


def tie(random, mean, b1=6, layers=24, middle=8):
    """The layer after exploration has a mean of so many spreads between prompts."""
    return np.concatenate(
        [
            random.uniform(0.5, 1.5, b1),
            [mean * SPREAD],
            random.normal(0, 0.05, middle),
            -random.uniform(0.3, 1.5, layers - b1 - 1 - middle),
        ]
    )


def weak_tie(random, mean, layers=16):
    """The same where no change is larger than about one spread, and nothing lies between."""
    ends = random.uniform(0.1, 0.4, 5), -random.uniform(0.1, 0.4, layers - 6)
    return np.concatenate([ends[0], [mean * SPREAD], ends[1]])


def bottom_tie(random, mean, layers=16):
    """Everything converges, and layer 1 nearly does not."""
    return np.concatenate([[mean * SPREAD], -random.uniform(0.5, 3, layers - 1)])


def top_tie(random, mean, layers=16):
    """Everything explores up to a layer L-1 that nearly does, and the last plunges."""
    return np.concatenate([random.uniform(0.5, 3, layers - 2), [mean * SPREAD, -3.0]])


def ramp(random, top, bottom, layers=16):
    """Gradual in itself: no layer ends anything."""
    return np.linspace(top, bottom, layers) + random.normal(0, 0.02, layers)


#: Profiles with the boundary that was planted: None is no layer, GRADUAL none that is known.
GRADUAL = -1
SEQUENTIAL_CASES = {
    "three stages": (lambda r: three_stages(r, 5, 12, 20), 5),
    "paper's Qwen3": (three_stages, 6),
    "two stages": (lambda r: three_stages(r, 6, 6, 16), 6),
    "last layer plunges": (lambda r: three_stages(r, 4, 12, 16, plunge=30), 4),
    "weak Llama": (lambda r: weak_llama(r, 16), 15),
    "stray positive layer": (isolated, 6),
    "negative block": (block, 8),
    "all negative": (lambda r: negative(r, 16), None),
    "all positive": (lambda r: positive(r, 16), 15),
    "ramp": (lambda r: ramp(r, 1, -1), GRADUAL),
    "flat ramp": (lambda r: ramp(r, 0.3, -0.3), GRADUAL),
    "ramp down to a stage": (
        lambda r: np.concatenate([ramp(r, 1, -0.4, 8), -r.uniform(0.4, 1.5, 8)]),
        GRADUAL,
    ),
    **{
        f"{make.__name__} {mean}, middle {options.get('middle', '-')}": (
            lambda r, make=make, mean=mean, options=options: make(r, mean, **options),
            planted,
        )
        for make, options, planted in (
            (tie, {"middle": 8}, 6),
            (tie, {"middle": 0}, 6),
            (weak_tie, {}, 5),
            (bottom_tie, {}, None),
            (top_tie, {}, 14),
        )
        for mean in (-0.01, -0.05, -0.1)
    },
}


def first_prompts(profile, prompts):
    """What the same study has seen after its first prompts."""
    sums = PromptSums(profile.sums.sums[:prompts], profile.sums.tokens[:prompts])
    return Profile(sums.means()[:, 0], sums, profile.floor)


def decide(profile, until_sure, resamples):
    """The last look at a growing study, as `quick` takes them, without a model."""
    plan = planned_looks(profile.num_prompts)
    for prompts in plan:
        seen = first_prompts(profile, prompts)
        look = look_at(seen, until_sure, len(plan), resamples=resamples)
        if look.sure:
            break
    return look


def simulated_decisions(seeds, prompts=80, until_sure=0.95, resamples=100, tail=None):
    """One row a run over all SEQUENTIAL_CASES: `case, sure, prompts, layer, free, planted`.

    `free` is what the profile gives where it is known without noise. With `tail`, prompts
    differ by Student's t of so many degrees of freedom.
    """
    rows = []
    for seed in seeds:
        for place, (case, (make, planted)) in enumerate(SEQUENTIAL_CASES.items()):
            random = np.random.default_rng([seed, place])
            truth = make(random)
            shares = layer_shares(cut_weights(truth[None], 2e-4)[0])
            free = max(shares, key=shares.get)
            seen = studied(random, truth, prompts, SPREAD)
            if tail is not None:
                tokens = seen.sums.tokens
                noise = random.standard_t(tail, (prompts, len(truth))) * np.sqrt(1 - 2 / tail)
                sums = ((truth + SPREAD * noise) * tokens[:, None])[..., None]
                seen = Profile(None, PromptSums(sums, tokens), 2e-4)
            look = decide(seen, until_sure, resamples)
            rows.append((case, look.sure, look.prompts, look.layer, free, planted))
    columns = ["case", "sure", "prompts", "layer", "free", "planted"]
    frame = pd.DataFrame(rows, columns=columns)
    for name in ("layer", "free", "planted"):
        frame[name] = frame[name].astype("float").fillna(0).astype(int)
    known = frame["planted"] != GRADUAL
    frame["wrong"] = frame["sure"] & (
        (frame["layer"] != frame["free"]) | (known & (frame["layer"] != frame["planted"]))
    )
    frame["unlike_free"] = frame["sure"] & (frame["layer"] != frame["free"])
    return frame
