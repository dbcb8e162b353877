"""What the trainer tells the engine with a batch: which policy, at what cost, and what to watch.

veRL hands `batch.extra_info` to the engine's micro-batches, and keeps it for whatever comes next:
an order is therefore taken back as soon as it is carried out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Order"]

_PREFIX = "bupo_order_"


@dataclass(frozen=True)
class Order:
    """One pass over a batch.

    Args:
        layer: l of the inner policy that takes part; 0 for none.
        internal: whether pi_l is the policy that is asked for, rather than pi_theta.
        skip_upper_layers: do not run layers l+1..L.
        stride: read the other policy at every stride-th response position; 0 for none.
        freeze_unembedding: drop E_u's gradient.
    """

    layer: int = 0
    internal: bool = False
    skip_upper_layers: bool = False
    stride: int = 0
    freeze_unembedding: bool = False

    @contextmanager
    def given_with(self, extra_info: dict[str, Any]) -> Iterator[None]:
        """Send the order along, and take it back."""
        order = {_PREFIX + name: value for name, value in asdict(self).items()}
        extra_info.update(order)
        try:
            yield
        finally:
            self.taken_from(extra_info)

    @staticmethod
    def taken_from(extra_info: dict[str, Any]) -> None:
        """Remove an order where it lingers."""
        for field in fields(Order):
            extra_info.pop(_PREFIX + field.name, None)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Order:
        """The order that came with a micro-batch's non-tensor values."""
        found = {field.name: values.get(_PREFIX + field.name) for field in fields(cls)}
        return cls(**{name: value for name, value in found.items() if value is not None})

    @staticmethod
    def names() -> list[str]:
        """The names under which an order travels."""
        return [_PREFIX + field.name for field in fields(Order)]
