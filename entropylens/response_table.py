"""The table of responses that an analysis keeps: what must hold of it, several made one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from entropylens.quantities import quantities_of

__all__ = ["gap_of", "numbered_on", "per_response"]


def per_response(responses: pd.DataFrame) -> pd.DataFrame:
    """One row a response, for what does not depend on the layer."""
    return responses.drop_duplicates("response_id")


def gap_of(responses: pd.DataFrame, reading: str, num_layers: int) -> str | None:
    """What is not as it was written: a layer that is missing, or a value that is no number."""
    if sorted(responses["layer"].unique()) != list(range(1, num_layers + 1)) or (
        len(responses) != num_layers * responses["response_id"].nunique()
    ):
        return "rows are missing"
    for name in ("policy_entropy", "policy_nll", *quantities_of(reading)):
        finite = np.isfinite(responses[name].to_numpy(float))
        if finite.all():
            continue
        # What a layer has not is NaN in all responses; the stream and the policy are everywhere.
        by_layer = pd.Series(finite).groupby(responses["layer"].to_numpy()).mean()
        optional = name.startswith("rms_mid") or any(
            part in ("attn", "ffn") for part in name.split("_")
        )
        wrong = by_layer[by_layer < 1 if not optional else (by_layer > 0) & (by_layer < 1)]
        if len(wrong) or np.isinf(responses[name].to_numpy(float)).any():
            layer = f" at layer {wrong.index[0]}" if len(wrong) else ""
            return f"{name} is no number in some responses{layer}"
    return None


def numbered_on(
    frames: Sequence[pd.DataFrame], tables: Sequence[pd.DataFrame], starts: Sequence[int]
) -> pd.DataFrame:
    """Frames of several analyses in one, in which each response has one number throughout.

    Args:
        frames: with a `response_id`, one an analysis.
        tables: the tables of all responses of each.
        starts: the number of each analysis' first response.
    """
    moved = []
    for frame, table, start in zip(frames, tables, starts, strict=True):
        ids = sorted(table["response_id"].unique())
        numbers = {identity: start + place for place, identity in enumerate(ids)}
        moved.append(frame.assign(response_id=frame["response_id"].map(numbers)))
    return pd.concat(moved, ignore_index=True)
