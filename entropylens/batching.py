"""Which responses share a forward pass, and the padded tensors for it.

Padding goes to the right: with causal attention it cannot reach a position that is read.
A batch holds at most `batch_tokens` response positions; a response that is longer on its own
is walked in pieces over the model's key-value cache, or whole where a model has none that
continues (recurrent mixers). Samples of one prompt that share a pass read the prompt once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from entropylens.anatomy import Anatomy
from entropylens.capture import States, capture
from entropylens.responses import Response

__all__ = ["Batch", "Piece", "batch", "pieces", "plan"]

#: Padded positions of a forward pass, as a multiple of the response positions it may hold.
FORWARD_FACTOR = 4
#: Positions of prompts that must be saved for a pass over the prompt alone to pay.
WORTH_SHARING = 128


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
        input_ids: token ids, padded on the right.
        mask: 0 at padding, or None where there is none.
        positions: indices into the flattened [batch * sequence].
        tokens: the token produced at each position.
        owner: the index, in the caller's list, of the response that each position belongs to.
    """

    input_ids: Int[Tensor, "batch sequence"]
    mask: Int[Tensor, "batch sequence"] | None
    positions: Int[Tensor, " positions"]
    tokens: Int[Tensor, " positions"]
    owner: Int[Tensor, " positions"]


def plan(responses: Sequence[Response], batch_tokens: int) -> list[list[int]]:
    """Group responses so that each group fits one forward pass.

    Samples of one prompt stay among themselves where reading it once saves enough; else similar
    lengths come together.
    """
    samples: dict[tuple[int, ...], list[int]] = {}
    for index, response in enumerate(responses):
        samples.setdefault(response.prompt_ids, []).append(index)
    groups, others = [], []
    for prompt, members in samples.items():
        if _saved(prompt, members) < WORTH_SHARING:
            others += members
        else:
            groups += _fitting(responses, members, batch_tokens)
    return groups + _fitting(responses, others, batch_tokens)


def _saved(prompt: Sequence[int], members: Sequence[int]) -> int:
    """Positions of a prompt that are not read again; its last one predicts each first token."""
    return (len(prompt) - 1) * (len(members) - 1)


def _fitting(
    responses: Sequence[Response], members: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """Groups of similar lengths, as even as the limit allows: products of few rows are dear."""
    total = sum(responses[index].num_tokens for index in members)
    share = total / max(1, math.ceil(total / batch_tokens))
    order = sorted(members, key=lambda index: (responses[index].length, index))
    groups: list[list[int]] = []
    tokens = 0
    for index in order:
        response = responses[index]
        group = groups[-1] if groups else []
        fits = (
            bool(group)
            and tokens < share
            and tokens + response.num_tokens <= batch_tokens
            and (len(group) + 1) * response.length <= FORWARD_FACTOR * batch_tokens
        )
        if fits:
            group.append(index)
            tokens += response.num_tokens
        else:
            groups.append([index])
            tokens = response.num_tokens
    return groups


def pieces(
    anatomy: Anatomy, responses: Sequence[Response], group: Sequence[int], batch_tokens: int
) -> Iterator[Piece]:
    """Run one group of `plan` through the model, and hand out its states."""
    first = responses[group[0]]
    too_long = first.length > FORWARD_FACTOR * batch_tokens or first.num_tokens > batch_tokens
    if len(group) == 1 and too_long and anatomy.continues:
        yield from _walk(anatomy, first, group[0], batch_tokens)
    elif anatomy.continues and _share(responses, group):
        yield _after_prompt(anatomy, responses, group)
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
    mask = torch.zeros(len(group), width, dtype=torch.long)
    positions: list[int] = []
    owner: list[int] = []
    tokens: list[int] = []
    for row, index in enumerate(group):
        response = responses[index]
        ids = (*response.prompt_ids, *response.response_ids)[skipped:-1]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        start = row * width + len(response.prompt_ids) - 1 - skipped
        positions.extend(range(start, start + response.num_tokens))
        owner.extend([index] * response.num_tokens)
        tokens.extend(response.response_ids)
    return Batch(
        input_ids=input_ids,
        mask=None if bool(mask.all()) else mask,
        positions=torch.tensor(positions),
        tokens=torch.tensor(tokens),
        owner=torch.tensor(owner),
    )


def _together(anatomy: Anatomy, responses: Sequence[Response], group: Sequence[int]) -> Piece:
    whole = batch(responses, group)
    padded = {} if whole.mask is None else {"attention_mask": whole.mask.to(anatomy.device)}
    states, _ = capture(anatomy, whole.positions, whole.input_ids, use_cache=False, **padded)
    return Piece(states, whole.tokens, whole.owner)


def _share(responses: Sequence[Response], group: Sequence[int]) -> bool:
    prompt = responses[group[0]].prompt_ids
    same = all(responses[index].prompt_ids == prompt for index in group)
    return same and _saved(prompt, group) >= WORTH_SHARING


def _after_prompt(anatomy: Anatomy, responses: Sequence[Response], group: Sequence[int]) -> Piece:
    """Read the prompt but for its last position, then that one and the answers, a row each."""
    read = responses[group[0]].prompt_ids[:-1]
    with torch.inference_mode():
        ids = torch.tensor([read], device=anatomy.device)
        cache = anatomy.decoder(input_ids=ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(group))
    rest = batch(responses, group, skipped=len(read))
    padded = {}
    if rest.mask is not None:
        before = torch.ones(len(group), len(read), dtype=rest.mask.dtype)
        padded["attention_mask"] = torch.cat([before, rest.mask], dim=1).to(anatomy.device)
    states, _ = capture(
        anatomy, rest.positions, rest.input_ids, past_key_values=cache, use_cache=True, **padded
    )
    return Piece(states, rest.tokens, rest.owner)


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
