"""Which packages made a result."""

from __future__ import annotations

import importlib.metadata

__all__ = ["versions"]


def versions(*more: str) -> dict[str, str]:
    """The versions of the packages that numbers depend on.

    Args:
        more: packages beside the usual ones.
    """
    names = ("entropylens", "torch", "transformers", "numpy", "pandas", *more)
    return {name: importlib.metadata.version(name) for name in names}
