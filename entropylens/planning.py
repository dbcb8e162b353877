"""Which responses share a forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

from entropylens.anatomy import PLAIN, Passes
from entropylens.responses import Response

__all__ = ["FORWARD_FACTOR", "WORTH_SHARING", "plan", "reads_once"]

#: Padded positions of a forward pass, as a multiple of the response positions it may hold.
FORWARD_FACTOR = 4
#: Positions of prompts that must be saved for a pass over the prompt alone to pay.
WORTH_SHARING = 128


def plan(
    responses: Sequence[Response], batch_tokens: int, passes: Passes = PLAIN
) -> list[list[int]]:
    """Group responses of similar lengths so that each group fits one forward pass.

    Args:
        responses: all of them.
        batch_tokens: response positions that a group may hold.
        passes: of the model that `pieces` runs them through. Where it continues, samples of one
            prompt stay among themselves if reading it once saves enough, however long it is.
    """
    taken = [passes.takes(response.length) for response in responses]
    together = [index for index, takes in enumerate(taken) if takes]
    groups = [[index] for index, takes in enumerate(taken) if not takes]
    if not passes.continues:
        return groups + _fitting(responses, together, batch_tokens)
    samples: dict[tuple[int, ...], list[int]] = {}
    for index in together:
        samples.setdefault(responses[index].prompt_ids, []).append(index)
    others: list[int] = []
    for prompt, members in samples.items():
        for group in _fitting(responses, members, batch_tokens, read=len(prompt) - 1):
            if reads_once(responses, group):
                groups.append(group)
            else:
                others += group
    return groups + _fitting(responses, others, batch_tokens)


def reads_once(responses: Sequence[Response], group: Sequence[int]) -> bool:
    """Whether a group is of one prompt that is worth a pass of its own.

    Its last position, which predicts each first token, is read with the answers.
    """
    prompt = responses[group[0]].prompt_ids
    same = all(responses[index].prompt_ids == prompt for index in group)
    return same and (len(prompt) - 1) * (len(group) - 1) >= WORTH_SHARING


def _fitting(
    responses: Sequence[Response], members: Sequence[int], batch_tokens: int, read: int = 0
) -> list[list[int]]:
    """Groups of similar lengths, as even as the limit allows: products of few rows are dear.

    The first `read` positions of each are read once for all, and do not count.
    """
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
            and (len(group) + 1) * (response.length - read) <= FORWARD_FACTOR * batch_tokens
        )
        if fits:
            group.append(index)
            tokens += response.num_tokens
        else:
            groups.append([index])
            tokens = response.num_tokens
    return groups
