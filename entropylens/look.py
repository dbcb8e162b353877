"""Look: what one step's weights are like over the fixed set; and all looks of a run (Figure 5)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from entropylens.errors import AnalysisFilesError
from entropylens.files import write_text, write_whole

__all__ = ["LOOK_FILE", "Look", "trajectory"]

#: Written last, as the sign of completion.
LOOK_FILE = "look.json"


@dataclass(frozen=True)
class Look:
    """One step's weights over the fixed set; means are over its generated tokens.

    Args:
        step: of training; 0 is before the first update.
        layer: l, the layer that is trained.
        reading: raw | normed | both.
        num_tokens: generated tokens of the set.
        perplexity: exp of the mean NLL of pi_theta (Fig. 5c).
        kl: KL(pi_theta of step 0 || pi_theta) in nats a token, over the whole vocabulary.
        kl_interval: 95 %, by resampling prompts (studentised); NaN under 3 prompts.
        entropy_layer, nll_layer: of pi_l, in nats; of the raw reading where it was measured,
            else of the normed one.
        delta_layer: H(pi_l) - H(pi_{l-1}) of the same reading, in nats (Eq. 12, Fig. 5b).
        similarity: m -> cos(H^l, H^m) for every m > l (Fig. 5a).
    """

    step: int
    layer: int
    reading: str
    num_tokens: int
    perplexity: float
    kl: float
    kl_interval: tuple[float, float]
    entropy_layer: float
    delta_layer: float
    nll_layer: float
    similarity: Mapping[int, float]

    @property
    def cos_final(self) -> float:
        """cos(H^l, H^L)."""
        return self.similarity[max(self.similarity)] if self.similarity else 1.0

    def to_metrics(self) -> dict[str, float]:
        """What a training log takes: `fixed_set/kl`, ...; an interval only where there is one."""
        names = ("perplexity", "kl", "entropy_layer", "delta_layer", "nll_layer", "cos_final")
        metrics = {f"fixed_set/{name}": float(getattr(self, name)) for name in names}
        if not any(map(math.isnan, self.kl_interval)):
            metrics["fixed_set/kl_low"], metrics["fixed_set/kl_high"] = self.kl_interval
        return metrics

    def to_dict(self) -> dict[str, Any]:
        """What look.json holds; null for an interval that there is not."""
        interval = [None if math.isnan(end) else end for end in self.kl_interval]
        similarity = {str(other): cosine for other, cosine in self.similarity.items()}
        return asdict(self) | {"kl_interval": interval, "similarity": similarity}

    def save(self, directory: Path) -> None:
        """Write similarity.csv (`layer, other, cosine`), then look.json, each whole.

        Raises:
            OutputDirectoryError: the directory cannot be written.
        """
        curve = pd.DataFrame(list(self.similarity.items()), columns=["other", "cosine"])
        curve.insert(0, "layer", self.layer)
        write_whole(directory / "similarity.csv", lambda aside: curve.to_csv(aside, index=False))
        write_text(directory / LOOK_FILE, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Look:
        """Read what `save` wrote.

        Raises:
            AnalysisFilesError: there is no look, or an unreadable one.
        """
        try:
            content = json.loads((directory / LOOK_FILE).read_text(encoding="utf-8"))
            low, high = (math.nan if end is None else end for end in content["kl_interval"])
            similarity = {int(other): it for other, it in content["similarity"].items()}
            return cls(**content | {"kl_interval": (low, high), "similarity": similarity})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AnalysisFilesError(
                f"the look in {str(directory)!r} cannot be read ({error})",
                "remove that directory; the step is looked at again where its weights are there",
            ) from error


def trajectory(directory: str | Path) -> pd.DataFrame:
    """All looks of a run, one row each, by step.

    Returns:
        `step, layer, reading, num_tokens, perplexity, kl, entropy_layer, delta_layer, nll_layer,
        kl_low, kl_high, cos_final`, and `cos_<m>` for every m > l.

    Raises:
        AnalysisFilesError: there is none, or an unreadable one.
    """
    looks = [Look.load(file.parent) for file in Path(directory).glob(f"step_*/{LOOK_FILE}")]
    if not looks:
        raise AnalysisFilesError(
            f"{str(directory)!r} holds no look (no step_<N>/{LOOK_FILE} in it)",
            "name the directory of a run's fixed set",
        )
    return pd.DataFrame([_row(look) for look in sorted(looks, key=lambda look: look.step)])


def _row(look: Look) -> dict[str, Any]:
    row = asdict(look)
    similarity = row.pop("similarity")
    low, high = row.pop("kl_interval")
    cosines = {f"cos_{other}": cosine for other, cosine in similarity.items()}
    return row | {"kl_low": low, "kl_high": high, "cos_final": look.cos_final} | cosines
