"""Token by token: what analyze(keep_tokens=...) keeps beside the sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from entropylens.errors import SettingError
from entropylens.quantities import quantities_of
from entropylens.readings import TopTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from entropylens.responses import Response

__all__ = ["EVERYTHING", "SHOWN", "Extent", "TokenKeeper"]

#: Bytes of a row beside its quantities, and of a top token, in parquet, roughly.
ROW_BYTES, TOP_BYTES = 4, 10


@dataclass(frozen=True)
class Extent:
    """How much is kept: of the first responses, the first positions; None is all."""

    responses: int | None
    positions: int | None


EVERYTHING = Extent(None, None)
#: What the token view of a report shows.
SHOWN = Extent(3, 256)


class TokenKeeper:
    """Makes rows of tokens.parquet, one a response, position and layer.

    Args:
        names: quantities to keep, as layers.csv names them.
        top: how many of pi_l's most probable tokens to keep with their probabilities.
        reading: raw | normed | both; the top tokens are of the first of them.
        tokenizer: decodes the tokens, or None where there is none.
        extent: of which responses and positions.

    Raises:
        SettingError: a quantity that this reading does not measure, or a negative `top`.
    """

    def __init__(
        self,
        names: Sequence[str],
        top: int,
        reading: str,
        tokenizer: PreTrainedTokenizerBase | None,
        extent: Extent = EVERYTHING,
    ) -> None:
        known = quantities_of(reading)
        for name in names:
            if name not in known:
                raise SettingError(
                    f"no quantity {name!r} in the {reading} reading to keep",
                    f"choose from {', '.join(known)}",
                )
        if top < 0:
            raise SettingError(f"top_tokens is {top}", "give 0 or more")
        self.names, self.top, self.tokenizer = list(dict.fromkeys(names)), top, tokenizer
        self.extent = extent
        self._texts: dict[int, str] = {}
        self._seen: Counter[int] = Counter()
        self._next: list[tuple[int, int]] = []

    def size(self, lengths: Sequence[int], num_layers: int) -> int:
        """Bytes that tokens.parquet will take, roughly.

        Args:
            lengths: tokens of each response.
            num_layers: L.
        """
        row = ROW_BYTES + 4 * len(self.names) + TOP_BYTES * self.top
        longest = self.extent.positions
        kept = [it if longest is None else min(it, longest) for it in lengths]
        return row * sum(kept[: self.extent.responses]) * num_layers

    def expect(self, owner: Tensor) -> Tensor:
        """Which of the positions that come next are to be kept.

        Args:
            owner: [positions] the response of each position; a response's stand in order.

        Returns:
            [kept] places among them.
        """
        kept, self._next = [], []
        for place, index in enumerate(owner.tolist()):
            position = self._seen[index]
            self._seen[index] += 1
            if _below(index, self.extent.responses) and _below(position, self.extent.positions):
                kept.append(place)
                self._next.append((index, position))
        return torch.tensor(kept, dtype=torch.long)

    def rows(
        self,
        kept: Tensor,
        responses: Sequence[Response],
        quantities: Mapping[str, Tensor],
        top: TopTokens | None,
    ) -> pd.DataFrame:
        """`response_id, position, layer, token_id, token`, the quantities, top tokens, `rank`.

        Args:
            kept: what `expect` returned for these positions.
            responses: all responses.
            quantities: name -> [layers, positions].
            top: the top tokens of the kept positions, where they were asked for.
        """
        layers = len(next(iter(quantities.values())))
        owners, places = [list(it) for it in zip(*self._next, strict=True)]
        ids = [responses[index].response_ids[place] for index, place in self._next]
        frame = pd.DataFrame(
            {
                "response_id": np.repeat(owners, layers),
                "position": np.repeat(np.array(places) + 1, layers),
                "layer": np.tile(np.arange(1, layers + 1), len(owners)),
                "token_id": np.repeat(ids, layers),
            }
        )
        if self.tokenizer is not None:
            frame["token"] = np.repeat([self._text(token) for token in ids], layers)
        for name in self.names:
            values = quantities[name]
            frame[name] = values[:, kept.to(values.device)].T.reshape(-1).float().cpu().numpy()
        if top is not None:
            chosen = top.ids.transpose(0, 1).reshape(-1, self.top).tolist()
            frame["top_token_ids"] = chosen
            if self.tokenizer is not None:
                frame["top_tokens"] = [[self._text(token) for token in row] for row in chosen]
            probs = top.probs.transpose(0, 1).reshape(-1, self.top).float()
            frame["top_probs"] = list(probs.cpu().numpy())
            frame["rank"] = top.ranks.T.reshape(-1).cpu().numpy()
        return frame

    def _text(self, token: int) -> str:
        if token not in self._texts:
            assert self.tokenizer is not None  # asked by the caller
            self._texts[token] = str(self.tokenizer.decode([token]))
        return self._texts[token]


def _below(number: int, limit: int | None) -> bool:
    return limit is None or number < limit
