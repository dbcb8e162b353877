"""How answers are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from entropylens.errors import SettingError

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["Sampling", "suggested"]

_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty")
#: Ways to draw that a model may suggest and that are not ours, with their neutral values.
_FOREIGN: Mapping[str, tuple[Any, ...]] = {
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
}


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: the paper's settings (A.6), unless others are given.

    Nothing comes from the model's generation_config but its end tokens; `suggested` reads the
    rest of it for those who ask.

    Args:
        num_samples: answers a prompt.
        max_new_tokens: tokens an answer at most.
        temperature: of the softmax; 0 takes the likeliest token.
        seed: of the draws.
        top_p: draw from the likeliest tokens that hold this probability together.
        top_k: draw from this many likeliest tokens; 0 for all.
        repetition_penalty: divides the positive logits of tokens that prompt or answer hold, and
            multiplies the negative ones.

    Raises:
        SettingError: a value that makes no sense.
    """

    num_samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):  # 1 and 1.0 are one setting
            object.__setattr__(self, name, float(getattr(self, name)))
        for name, value, low, high in (
            ("--seed", self.seed, 0, float("inf")),
            ("--samples", self.num_samples, 1, float("inf")),
            ("--max-new-tokens", self.max_new_tokens, 1, float("inf")),
            ("--temperature", self.temperature, 0, float("inf")),
            ("--top-p", self.top_p, 1e-9, 1),
            ("--top-k", self.top_k, 0, float("inf")),
            ("--repetition-penalty", self.repetition_penalty, 1e-9, float("inf")),
        ):
            if not low <= value <= high or value == float("inf"):
                bounds = f"at least {low:g}" if high > 1 else f"more than 0 and at most {high:g}"
                raise SettingError(f"{name} is {value}", f"give {bounds}")

    @property
    def of_a_sample(self) -> dict[str, Any]:
        """What one sample depends on: all but how many there are."""
        found = asdict(self)
        del found["num_samples"]
        return found


def suggested(config: GenerationConfig) -> dict[str, Any]:
    """The fields of Sampling that a model's generation_config sets.

    Raises:
        SettingError: it sets a way to draw that Sampling has not.
    """
    for name, neutral in _FOREIGN.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise SettingError(
                f"the model's generation_config sets {name}={value}",
                "entropylens does not draw so; give the settings yourself",
            )
    if config.do_sample is False:
        return {"temperature": 0.0}
    found = {name: getattr(config, name, None) for name in _FIELDS}
    return {name: value for name, value in found.items() if value is not None}
