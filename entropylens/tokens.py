"""Token by token: what analyze(keep_tokens=...) keeps beside the sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import Tensor

from entropylens.errors import SettingError
from entropylens.quantities import quantities_of
from entropylens.readings import TopTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from entropylens.responses import Response

__all__ = ["TokenKeeper"]

#: Bytes of a row beside its quantities, and of a top token, in parquet, roughly.
ROW_BYTES, TOP_BYTES = 4, 10


class TokenKeeper:
    """Makes rows of tokens.parquet, one a response, position and layer.

    Args:
        names: quantities to keep, as layers.csv names them.
        top: how many of pi_l's most probable tokens to keep with their probabilities.
        reading: raw | normed | both; the top tokens are of the first of them.
        tokenizer: decodes the tokens, or None where there is none.

    Raises:
        SettingError: a quantity that this reading does not measure, or a negative `top`.
    """

    def __init__(
        self,
        names: Sequence[str],
        top: int,
        reading: str,
        tokenizer: PreTrainedTokenizerBase | None,
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
        self._texts: dict[int, str] = {}

    def size(self, num_tokens: int, num_layers: int) -> int:
        """Bytes that tokens.parquet will take, roughly."""
        row = ROW_BYTES + 4 * len(self.names) + TOP_BYTES * self.top
        return row * num_tokens * num_layers

    def rows(
        self,
        owner: Tensor,
        responses: Sequence[Response],
        first: Mapping[int, int],
        quantities: Mapping[str, Tensor],
        top: TopTokens | None,
    ) -> pd.DataFrame:
        """`response_id, position, layer, token_id, token`, the quantities, and the top tokens.

        Args:
            owner: [positions] the response of each position; a response's stand in order.
            responses: all responses.
            first: the position, from 0, that a response's first one here is of it.
            quantities: name -> [layers, positions].
            top: the top tokens, where they were asked for.
        """
        layers = len(next(iter(quantities.values())))
        owners = owner.tolist()
        seen = dict(first)
        places = []
        for index in owners:
            places.append(seen.get(index, 0))
            seen[index] = places[-1] + 1
        ids = [
            responses[index].response_ids[place]
            for index, place in zip(owners, places, strict=True)
        ]
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
            frame[name] = quantities[name].T.reshape(-1).float().cpu().numpy()
        if top is not None:
            chosen = top.ids.transpose(0, 1).reshape(-1, self.top).tolist()
            frame["top_token_ids"] = chosen
            if self.tokenizer is not None:
                frame["top_tokens"] = [[self._text(token) for token in row] for row in chosen]
            probs = top.probs.transpose(0, 1).reshape(-1, self.top).float()
            frame["top_probs"] = list(probs.cpu().numpy())
        return frame

    def _text(self, token: int) -> str:
        if token not in self._texts:
            assert self.tokenizer is not None  # asked by the caller
            self._texts[token] = str(self.tokenizer.decode([token]))
        return self._texts[token]
