"""Which sites may take bf16 products: tried against exact ones on a sample of the same run.

A site whose mean moves by more than `BOUND` nats takes float32 products for the whole run. So do
FFN sites that the recommendation rests on, where the change that they give would move by more
than `SHARE` of itself: fast products must not change which layer is recommended.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropylens.batching import Piece, pieces
from entropylens.capture import evaluating
from entropylens.fast_reading import FastSites, why_not_fast
from entropylens.planning import plan
from entropylens.policy import Body, policy_head
from entropylens.quantities import READINGS
from entropylens.readings import PolicyReadings, normed_sites, raw_sites, read_policies
from entropylens.responses import Response
from entropylens.sources.subject import Subject

__all__ = ["BOUND", "Precision", "settle"]

logger = logging.getLogger(__name__)

#: Largest error of a fast site's mean, in nats (of its agreement, as a share).
BOUND = 0.01
#: Largest error of an FFN's entropy change, as a share of it.
SHARE = 0.02
#: Positions tried: this share of the run's, between these numbers.
SAMPLE, LEAST, MOST = 1 / 16, 32, 256
#: Responses that they come from.
RESPONSES = 8
#: Standard errors added to what the sample shows.
MARGIN = 2.0


@dataclass(frozen=True)
class Precision:
    """What was settled.

    Args:
        sites: reading -> which sites are fast; empty where all is exact.
        told: the same for results: `precision` (fast, or exact and why), `precision_error` (the
            largest of a fast site's mean, in nats, two standard errors added),
            `precision_exact_sites` and `precision_positions`.
    """

    sites: Mapping[str, FastSites]
    told: Mapping[str, Any]


def settle(
    subject: Subject,
    items: Sequence[Response],
    reading: str,
    body: Body,
    batch_tokens: int,
) -> Precision:
    """Try bf16 products on a sample of the responses.

    Args:
        subject: the model.
        items: all responses.
        reading: raw | normed | both.
        body: reduces the logits.
        batch_tokens: response positions whose states are held at a time.
    """
    anatomy = subject.anatomy
    why_not = why_not_fast(anatomy.device)
    if why_not is not None:
        logger.warning("fast precision is not faster here: %s; all is computed exactly", why_not)
        return Precision({}, {"precision": f"exact ({why_not})"})
    readings = READINGS if reading == "both" else (reading,)
    errors: dict[str, list[_Errors]] = {name: [] for name in readings}
    unembedding = anatomy.unembedding
    with evaluating(subject.model), torch.inference_mode():
        for piece in _sampled(subject, items, batch_tokens):
            tokens = piece.tokens.to(anatomy.device)
            head = policy_head(piece.states.final, unembedding, tokens, body)
            for name in readings:
                sites = (
                    raw_sites(piece.states)
                    if name == "raw"
                    else normed_sites(piece.states, anatomy.norm)
                )
                rest = (sites, piece.states.final, unembedding, head, tokens, body)
                everything = FastSites(
                    torch.ones(len(sites.plain) + 2, anatomy.num_layers, dtype=torch.bool),
                    torch.ones(anatomy.num_layers, dtype=torch.bool),
                )
                exact = read_policies(*rest)
                errors[name].append(_Errors.of(exact, read_policies(*rest, fast=everything)))
    found = {name: _judge(_Errors.together(parts)) for name, parts in errors.items()}
    exact_sites = sum(sites.exact for sites, _ in found.values())
    total = sum(sites.alone.numel() + sites.stream.numel() for sites, _ in found.values())
    told = {
        "precision": "fast",
        "precision_error": max(error for _, error in found.values()),
        "precision_exact_sites": f"{exact_sites} of {total}",
        "precision_positions": sum(part.positions for part in errors[readings[0]]),
    }
    logger.info(
        "bf16 products: means move by at most %.4f nats (on %d positions); %s sites in float32",
        *(told["precision_error"], told["precision_positions"], told["precision_exact_sites"]),
    )
    return Precision({name: sites for name, (sites, _) in found.items()}, told)


@dataclass(frozen=True)
class _Errors:
    """Fast less exact, of each site at each position.

    Args:
        alone: [groups, layers, positions] of entropies.
        stream: [quantities, layers, positions] of entropy, NLL, KL and agreement of H^1..H^L.
        delta: [layers, positions], the exact entropy change of the FFN.
    """

    alone: Float[Tensor, "groups layers positions"]
    stream: Float[Tensor, "quantities layers positions"]
    delta: Float[Tensor, "layers positions"]

    @classmethod
    def of(cls, exact: PolicyReadings, fast: PolicyReadings) -> _Errors:
        one, other = ([*it.plain, *it.added] for it in (exact, fast))
        stream = [
            getattr(fast, name)[1:] - getattr(exact, name)[1:]
            for name in ("stream", "nll", "kl", "agree")
        ]
        return cls(
            torch.stack(other) - torch.stack(one),
            torch.stack(stream),
            exact.added[1] - exact.plain[-1],
        )

    @classmethod
    def together(cls, parts: Sequence[_Errors]) -> _Errors:
        return cls(*(torch.cat([getattr(it, one.name) for it in parts], -1) for one in fields(cls)))

    @property
    def positions(self) -> int:
        return self.delta.shape[-1]


def _judge(errors: _Errors) -> tuple[FastSites, float]:
    """The sites that stay fast, and the largest error among them."""
    alone, stream = _bound(errors.alone), _bound(errors.stream).amax(0)
    ffn_in, ffn_out = alone.shape[0] - 3, alone.shape[0] - 1  # the plain ones, then A and F
    change = _bound(errors.alone[ffn_out] - errors.alone[ffn_in])
    fast = alone <= BOUND
    near = change <= SHARE * errors.delta.mean(-1).abs()
    fast[ffn_in] &= near
    fast[ffn_out] &= near
    found = FastSites(fast, stream <= BOUND)
    kept = torch.cat([alone[found.alone], stream[found.stream]])
    return found, float(kept.max()) if len(kept) else 0.0


def _bound(errors: Float[Tensor, "*sites positions"]) -> Float[Tensor, "*sites"]:
    count = errors.shape[-1]
    spread = errors.std(-1, correction=min(1, count - 1)) / count**0.5
    return errors.mean(-1).abs() + MARGIN * spread


def _sampled(subject: Subject, items: Sequence[Response], batch_tokens: int) -> Iterator[Piece]:
    """States at evenly spaced positions of responses of all lengths."""
    order = sorted(range(len(items)), key=lambda index: (items[index].num_tokens, index))
    places = torch.linspace(0, len(order) - 1, min(RESPONSES, len(order))).round().long()
    chosen = [items[order[place]] for place in places.tolist()]
    wanted = min(MOST, max(LEAST, round(SAMPLE * sum(it.num_tokens for it in items))))
    share = wanted / sum(response.num_tokens for response in chosen)
    for group in plan(chosen, batch_tokens, subject.anatomy.passes):
        for piece in pieces(subject.anatomy, chosen, group, batch_tokens):
            there = len(piece.tokens)
            count = min(there, max(1, round(share * there)))
            yield _at(piece, torch.linspace(0, there - 1, count).round().long())


def _at(piece: Piece, places: Int[Tensor, " places"]) -> Piece:
    parts = {
        one.name: getattr(piece.states, one.name)
        for one in fields(piece.states)
        if one.name != "parallel"
    }
    held = {name: it[..., places.to(it.device), :] for name, it in parts.items()}
    states = replace(piece.states, **held)
    return Piece(states, piece.tokens[places], piece.owner[places])
