"""How a language model's uncertainty moves through its layers, and which to train first.

The names below are loaded on first use, so that `import entropylens` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropylens.analysis import analyze as analyze
    from entropylens.anatomy import Family as Family
    from entropylens.decision import Decision as Decision
    from entropylens.errors import EntropyLensError as EntropyLensError
    from entropylens.families import register as register
    from entropylens.internal import internal_policy as internal_policy
    from entropylens.quick import recommend_layer as recommend_layer
    from entropylens.recommend import Recommendation as Recommendation
    from entropylens.responses import Response as Response
    from entropylens.results import Analysis as Analysis
    from entropylens.sampling import Sampling as Sampling
    from entropylens.series import Series as Series
    from entropylens.series import analyze_series as analyze_series

__version__ = "0.1.0"

_HOME = {
    "Analysis": "results",
    "Decision": "decision",
    "EntropyLensError": "errors",
    "Family": "anatomy",
    "Recommendation": "recommend",
    "Response": "responses",
    "Sampling": "sampling",
    "Series": "series",
    "analyze": "analysis",
    "analyze_series": "series",
    "internal_policy": "internal",
    "recommend_layer": "quick",
    "register": "families",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'entropylens' has no attribute {name!r}")
    return getattr(importlib.import_module(f"entropylens.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
