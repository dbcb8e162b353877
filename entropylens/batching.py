"""Groups of responses through the model: padded tensors, passes, and the states of each.

Padding goes to the right, where causal attention cannot reach it from a position that is read: it
needs no mask. With one, float64 models in eager attention make NaN of rows whose window is padding.
A batch holds at most `batch_tokens` response positions; a response that is longer on its own
is walked in pieces over the model's key-value cache, or whole where it must be (see
`anatomy.Passes`). Samples of one prompt in a group read the prompt once, and go on from its cache
in as many passes as the limit asks for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from entropylens.anatomy import Anatomy
from entropylens.capture import States, capture
from entropylens.planning import FORWARD_FACTOR, reads_once
from entropylens.responses import Response

__all__ = ["Batch", "Piece", "batch", "pieces"]


@dataclass(frozen=True)
class Piece:
    """Captured states of some response positions.

    Args:
        states: the states, positions of all owners in a row.
        tokens: the token produced at each position.
        owner: the index, in the caller's list, of the response that each position belongs to.
    """

    states: States
    tokens: Int[Tensor, " positions"]
    owner: Int[Tensor, " positions"]


@dataclass(frozen=True)
class Batch:
    """Padded token ids of some responses, and the positions that are read of them.

    Args:
        input_ids: token ids, each row's last repeated to the width.
        positions: indices into the flattened [batch * sequence].
        tokens: the token produced at each position.
        owner: the index, in the caller's list, of the response that each position belongs to.
    """

    input_ids: Int[Tensor, "batch sequence"]
    positions: Int[Tensor, " positions"]
    tokens: Int[Tensor, " positions"]
    owner: Int[Tensor, " positions"]


def pieces(
    anatomy: Anatomy, responses: Sequence[Response], group: Sequence[int], batch_tokens: int
) -> Iterator[Piece]:
    """Run one group of `plan` through the model, and hand out its states."""
    first = responses[group[0]]
    too_long = first.length > FORWARD_FACTOR * batch_tokens or first.num_tokens > batch_tokens
    continues = anatomy.passes.continues and anatomy.passes.takes(first.length)
    if len(group) == 1 and too_long and continues:
        yield from _walk(anatomy, first, group[0], batch_tokens)
    elif continues and reads_once(responses, group):
        yield from _after_prompt(anatomy, responses, group, batch_tokens)
    else:
        yield _together(anatomy, responses, group)


def batch(responses: Sequence[Response], group: Sequence[int], skipped: int = 0) -> Batch:
    """Pad the responses of one group of `plan` to one batch.

    Args:
        responses: all of them.
        group: the indices of those in the batch.
        skipped: positions at the beginning of each that the batch leaves out.
    """
    width = max(responses[index].length for index in group) - skipped
    input_ids = torch.zeros(len(group), width, dtype=torch.long)
    positions: list[int] = []
    owner: list[int] = []
    tokens: list[int] = []
    for row, index in enumerate(group):
        response = responses[index]
        ids = (*response.prompt_ids, *response.response_ids)[skipped:-1]
        input_ids[row] = torch.tensor(ids + ids[-1:] * (width - len(ids)))
        start = row * width + len(response.prompt_ids) - 1 - skipped
        positions.extend(range(start, start + response.num_tokens))
        owner.extend([index] * response.num_tokens)
        tokens.extend(response.response_ids)
    return Batch(
        input_ids=input_ids,
        positions=torch.tensor(positions),
        tokens=torch.tensor(tokens),
        owner=torch.tensor(owner),
    )


def _together(anatomy: Anatomy, responses: Sequence[Response], group: Sequence[int]) -> Piece:
    whole = batch(responses, group)
    states, _ = capture(anatomy, whole.positions, whole.input_ids, use_cache=False)
    return Piece(states, whole.tokens, whole.owner)


def _after_prompt(
    anatomy: Anatomy, responses: Sequence[Response], group: Sequence[int], batch_tokens: int
) -> Iterator[Piece]:
    """Read the prompt but for its last position, then that one and the answers, a row each.

    No pass and no cache holds more than FORWARD_FACTOR * batch_tokens positions, or those of one
    response.
    """
    most = FORWARD_FACTOR * batch_tokens
    read = responses[group[0]].prompt_ids[:-1]
    # Scores of attention over a long cache are as large as those of a walk.
    prompt = _cached(anatomy, read, most if len(read) <= most else batch_tokens)
    length = max(responses[index].length for index in group)
    passes = math.ceil(len(group) / max(1, most // length))
    rows = math.ceil(len(group) / passes)  # even: products of few rows are dear
    for start in range(0, len(group), rows):
        part = group[start : start + rows]
        with torch.inference_mode():
            cache = prompt if start + rows >= len(group) else copy.deepcopy(prompt)
            if len(part) > 1:
                cache.batch_repeat_interleave(len(part))
        rest = batch(responses, part, skipped=len(read))
        states, output = capture(
            anatomy, rest.positions, rest.input_ids, past_key_values=cache, use_cache=True
        )
        piece = Piece(states, rest.tokens, rest.owner)
        if cache is prompt:
            del prompt
        del states, output, cache  # beside the piece, at most the prompt's own cache is held
        yield piece
        del piece


@torch.inference_mode()
def _cached(anatomy: Anatomy, ids: Sequence[int], most: int) -> Any:
    """The key-value cache of token ids, `most` of them a pass; nothing is captured."""
    cache = None
    for start in range(0, len(ids), most):
        part = torch.tensor([ids[start : start + most]], device=anatomy.device)
        output = anatomy.decoder(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    return cache


def _walk(anatomy: Anatomy, response: Response, index: int, batch_tokens: int) -> Iterator[Piece]:
    ids = torch.tensor((*response.prompt_ids, *response.response_ids))
    first_read = len(response.prompt_ids) - 1
    cache = None
    for start in range(0, response.length, batch_tokens):
        stop = min(start + batch_tokens, response.length)
        positions = torch.arange(min(max(start, first_read), stop), stop)
        states, output = capture(
            anatomy,
            positions - start,
            ids[None, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        piece = Piece(states, ids[positions + 1], torch.full_like(positions, index))
        del states, output  # one piece at a time is held
        if len(positions):
            yield piece
        del piece
