"""The datasets of the paper by their short names: where they are, and what they are used for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from entropylens.errors import DatasetError

__all__ = ["BENCHMARKS", "NAMED", "HubDataset", "Purpose", "column_title", "default_samples"]

#: What a dataset's problems are for.
Purpose = Literal["train", "test"]


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hub.

    Args:
        hub_id: owner/name.
        test: its split of problems to evaluate with, or None where it has none.
        train: its split of problems to train with, or None where it has none.
        config: the name of its configuration, or None where it has one only.
    """

    hub_id: str
    test: str | None = None
    train: str | None = None
    config: str | None = None

    def split(self, purpose: Purpose) -> str:
        """The split to take.

        Raises:
            DatasetError: it has none for this purpose.
        """
        found = self.train if purpose == "train" else self.test
        if found is None:
            use = "evaluating" if purpose == "train" else "training"
            raise DatasetError(f"{self.hub_id} is for {use} only", "name another dataset")
        return found


#: By short name. AIME 2024 lies in a split called train; nobody should train on it.
NAMED: Mapping[str, HubDataset] = {
    "math500": HubDataset("HuggingFaceH4/MATH-500", test="test"),
    "amc23": HubDataset("math-ai/amc23", test="test"),
    "aime24": HubDataset("HuggingFaceH4/aime_2024", test="train"),
    "aime25": HubDataset("math-ai/aime25", test="test"),
    "gsm8k": HubDataset("openai/gsm8k", test="test", train="train", config="main"),
    "deepmath": HubDataset("zwhe99/DeepMath-103K", train="train"),
}

BENCHMARKS = tuple(name for name, one in NAMED.items() if one.test is not None)

#: Table 1's columns in its order: the title, and what its dataset may be called.
_TITLES = {
    "AMC": ("amc23", "amc2023", "amc"),
    "MATH500": ("math500", "math"),
    "AIME24": ("aime24", "aime2024"),
    "AIME25": ("aime25", "aime2025"),
}


def default_samples(name: str) -> int:
    """Answers a problem: 32 for AIME, 16 for others (section 5.1)."""
    return 32 if "aime" in name.lower() else 16


def column_title(name: str) -> tuple[int, str]:
    """Where a benchmark stands in the layout of Table 1, and its title there."""
    plain = name.lower().rsplit("/", 1)[-1].replace("_", "").replace("-", "")
    for place, (title, names) in enumerate(_TITLES.items()):
        if plain in names:
            return place, title
    return len(_TITLES), name
