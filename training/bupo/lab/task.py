r"""The laboratory's task: sums of three numbers, one step at a time.

The prompt "7+12+5=" is answered by "7+12=19;19+5=24;\boxed{24}". Which first two numbers are
added decides the split, in either order: a pair that is tested is never added in training, neither
first nor second.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "LARGEST",
    "MAX_ANSWER_TOKENS",
    "MAX_PROMPT_TOKENS",
    "Split",
    "Sum",
    "draw_sums",
    "make_tokenizer",
]

#: The numbers are 1 to LARGEST.
LARGEST = 20
#: Tokens of the longest right answer, its end included, and a few for one that strays.
MAX_ANSWER_TOKENS = 28
#: Tokens of the longest prompt.
MAX_PROMPT_TOKENS = 9

Split = Literal["train", "development", "test"]
_SHARES = {"train": 0.7, "development": 0.1, "test": 0.2}
# veRL asks a Qwen3 for a token of this name.
_PAD, _END, _BOX = "<pad>", "<|im_end|>", "\\boxed{"
_TOKENS = [_PAD, _END, _BOX, "}", "+", "=", ";", *"0123456789"]


@dataclass(frozen=True)
class Sum:
    """One problem.

    Args:
        numbers: what is added.
    """

    numbers: tuple[int, int, int]

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return "+".join(map(str, self.numbers)) + "="

    @property
    def gold(self) -> str:
        """The right answer."""
        return str(sum(self.numbers))

    @property
    def demonstration(self) -> str:
        """A right response."""
        first, second, third = self.numbers
        between = first + second
        return f"{first}+{second}={between};{between}+{third}={self.gold};{_BOX}{self.gold}}}"


@cache
def _pairs(split: Split) -> tuple[tuple[int, int], ...]:
    """The first two numbers, smaller first, of a split's problems."""
    pairs = list(itertools.combinations_with_replacement(range(1, LARGEST + 1), 2))
    order = np.random.default_rng(0).permutation(len(pairs))
    ends = np.cumsum([round(_SHARES[it] * len(pairs)) for it in get_args(Split)[:-1]])
    part = np.split(order, ends)[get_args(Split).index(split)]
    return tuple(pairs[place] for place in part)


@cache
def _thirds(split: Split, first: int, second: int) -> tuple[int, ...]:
    """The third numbers of a split's problems with these first two.

    A training problem's second addition is no other split's first one.
    """
    between = first + second
    numbers = range(1, LARGEST + 1)
    if split != "train" or between > LARGEST:
        return tuple(numbers)
    known = set(_pairs("train"))
    return tuple(it for it in numbers if (min(between, it), max(between, it)) in known)


def draw_sums(split: Split, count: int, *key: int) -> list[Sum]:
    """Problems of a split, drawn with replacement.

    Args:
        split: where from.
        count: how many.
        key: what tells this draw from others, a seed among it.
    """
    generator = np.random.default_rng([get_args(Split).index(split), *key])
    pairs = [pair for pair in _pairs(split) if _thirds(split, *pair)]
    found = []
    for _ in range(count):
        pair = pairs[generator.integers(len(pairs))]
        first, second = pair if generator.integers(2) else pair[::-1]
        thirds = _thirds(split, *pair)
        found.append(Sum((first, second, thirds[generator.integers(len(thirds))])))
    return found


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, and one for the opening of a box; prompts are rendered as they are."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({token: place for place, token in enumerate(_TOKENS)}, unk_token=_PAD)
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=_PAD, eos_token=_END,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )  # fmt: skip
