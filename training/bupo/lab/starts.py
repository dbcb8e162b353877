"""A start before it is used: is there a profile at all, which layer is recommended, and what would
each layer's gradient do?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bupo.lab.answering import ask
from bupo.lab.task import draw_sums
from bupo.layer_probe import Graded, LayerProbe, probe_layers
from entropylens.analysis import analyze
from entropylens.errors import SettingError
from entropylens.results import Analysis

__all__ = ["Inspection", "inspect", "recommended"]

#: Tells the draws of inspections from others.
_INSPECTION = 4
#: A profile worth looking at: H(pi_l), as a share of a uniform policy's entropy, falls by at least
#: the first over depth, and at half of the inner layers it is above the second.
LEAST_FALL, ONE_HOT = 0.2, 0.02


@dataclass(frozen=True)
class Inspection:
    """A start looked at, in its directory: `analysis/` and `layer_probe/`.

    Args:
        analysis: of its answers to training problems, in both readings.
        probe: its gradients, layer by layer.
    """

    analysis: Analysis
    probe: LayerProbe

    @classmethod
    def load(cls, start: Path) -> Inspection:
        """Read what `inspect` wrote."""
        return cls(Analysis.load(start / "analysis"), LayerProbe.load(start / "layer_probe"))


def inspect(start: Path, analyzed: int, probed: int, samples: int) -> Inspection:
    """Analyze a start and compare its layers' gradients, once.

    Args:
        start: the directory of the model.
        analyzed: training problems whose answers are analyzed, one answer each.
        probed: training problems whose answers give the gradients.
        samples: answers to each of these.

    Raises:
        SettingError: its policies do not change with depth.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (start / "layer_probe" / "layer_probe.json").is_file():
        return Inspection.load(start)
    model = AutoModelForCausalLM.from_pretrained(start, attn_implementation="sdpa").float().eval()
    tokenizer = AutoTokenizer.from_pretrained(start)
    sums = draw_sums("train", analyzed, _INSPECTION)
    answered = ask(model, tokenizer, sums, 1, (_INSPECTION, 0))
    analysis = analyze(
        model, answered.responses, tokenizer=tokenizer, reading="both", progress=False
    )
    _check_profile(analysis, start)
    analysis.save(start / "analysis")
    sums = draw_sums("train", probed, _INSPECTION, 1)
    answered = ask(model, tokenizer, sums, samples, (_INSPECTION, 1))
    graded = [
        Graded(it.prompt_ids, it.response_ids, reward, group)
        for it, reward, group in zip(
            answered.responses, answered.rewards.flatten().tolist(), answered.groups, strict=True
        )
    ]
    probe = probe_layers(model, graded, progress=False)
    probe.save(start / "layer_probe")
    return Inspection(analysis, probe)


def recommended(analyses: Sequence[Analysis]) -> tuple[int, str]:
    """The layer that all starts' analyses recommend, and the first reading in which they do.

    Raises:
        SettingError: there is none in any reading.
    """
    told = []
    for reading in ("raw", "normed"):
        found = [it.recommend(reading=reading) for it in analyses]
        layers = {it.layer if it.applies == "yes" else None for it in found}
        if len(layers) == 1 and (layer := layers.pop()) is not None:
            return layer, reading
        told.append(f"{reading}: " + ", ".join(f"{it.layer} ({it.applies})" for it in found))
    raise SettingError(
        f"no reading recommends one layer for all starts ({'; '.join(told)})",
        "choose other seeds of lessons, or give the plan a layer",
    )


def _check_profile(analysis: Analysis, start: Path) -> None:
    shares = analysis.layers["entropy_layer"] / math.log(analysis.vocab_size)
    what = None
    if shares.max() - shares.iloc[-1] < LEAST_FALL:
        what = "flat: depth changes nothing"
    elif shares.iloc[:-1].median() < ONE_HOT:
        what = "one-hot: all is decided at once"
    if what is not None:
        raise SettingError(f"the profile of {start} is {what}", "choose another lesson")
