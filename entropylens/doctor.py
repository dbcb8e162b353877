"""What is here: versions, devices, optional parts, the cache; and how a model is understood."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from entropylens.anatomy import Anatomy, Passes
    from entropylens.verification import Verification

__all__ = [
    "Examined",
    "environment",
    "examine",
    "family_table",
    "free_cores",
    "usable_cores",
]

_PACKAGES = ("entropylens", "torch", "transformers", "numpy", "pandas", "matplotlib", "safetensors")
_OPTIONAL = {
    "transformer_lens": "TransformerLens bridges (pip install 'entropylens[transformer-lens]')",
    "nnsight": "nnsight models (pip install 'entropylens[nnsight]')",
    "verl": "training (pip install 'entropylens[train]')",
    "vllm": "fast generation (pip install 'entropylens[vllm]')",
}


def environment() -> list[tuple[str, str]]:
    """Name and finding of everything that a run depends on."""
    import torch

    from entropylens.demo import MODEL_NAME, cache_directory, is_complete

    found = [("python", platform.python_version())]
    found += [(name, importlib.metadata.version(name)) for name in _PACKAGES]
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found += [
        ("cuda", ", ".join(cuda) or "no"),
        ("cpu cores", str(usable_cores())),
        ("C++ compiler", shutil.which("g++") or shutil.which("c++") or "no (apt install g++)"),
    ]
    for module, purpose in _OPTIONAL.items():
        there = importlib.util.find_spec(module) is not None
        found.append((module, "yes" if there else f"no: {purpose}"))
    cache = cache_directory()
    found.append(("cache", f"{cache} ({_size(cache)})"))
    found.append(
        ("bundled model", "ready" if is_complete(cache / MODEL_NAME) else "not fetched yet")
    )
    return found


def _how_long_ones(passes: Passes) -> str:
    if not passes.continues:
        return "whole (no cache that continues)"
    limit = passes.alike_up_to
    return "in pieces" + ("" if limit is None else f", those of over {limit} positions whole")


@dataclass(frozen=True)
class Examined:
    """How a model is understood.

    Args:
        text: its anatomy and the errors of each layer, for printing.
        verification: the same errors, to be raised where they are too large.
    """

    text: str
    verification: Verification


def examine(model: str, **loading: Any) -> Examined:
    """Load a model as analyze does, but hand out its verification also where it fails."""
    from entropylens.recognition import recognise
    from entropylens.sources import load_named

    loaded, _ = load_named(model, **loading)
    anatomy, verification = recognise(loaded)
    unembedding, family = anatomy.unembedding, anatomy.family
    head = [
        f"{model}: {type(loaded).__name__}, {anatomy.num_layers} layers, {verification.dtype}",
        f"family {family.model_type}: {type(anatomy.decoder).__name__}.{family.layers}[l]: "
        f"attention {family.attention_out or family.attention}, FFN {family.ffn_out or family.ffn}"
        f"{' in parallel' if anatomy.parallel else ''}; final norm {family.final_norm}",
        f"mixers: {', '.join(sorted(set(anatomy.mixers)))}; responses longer than --batch-tokens "
        f"are read {_how_long_ones(anatomy.passes)}",
        f"E_u: {unembedding.vocab_size} x {unembedding.d_model}, bias: "
        f"{'no' if unembedding.bias is None else 'yes'}, scale {unembedding.transform.scale:g}, "
        f"soft cap {unembedding.transform.softcap or 'none'}",
        f"verify(): logits {verification.logits_error:.2g} "
        f"(allowed {verification.logits_bound:.2g})",
        verification.to_frame().to_string(index=False, float_format=lambda value: f"{value:.2g}"),
    ]
    return Examined("\n".join(head), verification)


def family_table() -> pd.DataFrame:
    """What is known of every family, and how exactly it holds on a tiny random model of it.

    Returns:
        One row a family or variant: `family, class, mixers, parallel, norms, transform,
        verified_error` (the largest of the streams' and the logits' relative errors).
    """
    import pandas as pd

    from entropylens.recognition import anatomy_of
    from entropylens.specimens import EVERY_FAMILY, tiny_model
    from entropylens.verification import verify

    rows = []
    for name in EVERY_FAMILY:
        model = tiny_model(name)
        anatomy = anatomy_of(model)
        found = verify(model, anatomy)
        rows.append(
            {
                "family": name,
                "class": type(model).__name__,
                "mixers": "+".join(sorted(set(anatomy.mixers) - {"none"})),
                "parallel": "yes" if anatomy.parallel else "no",
                "norms": _norms(anatomy),
                "transform": _transform(anatomy),
                "verified_error": max(*found.stream_errors, found.logits_error),
            }
        )
    return pd.DataFrame(rows)


def _norms(anatomy: Anatomy) -> str:
    """Where a layer's norms stand: before its branches, behind them, or both."""
    branch = anatomy.attention[0] or anatomy.ffn[0]
    assert branch is not None  # every layer has one
    kinds = [type(module).__name__.lower() for module in anatomy.layers[0].children()]
    count = sum("norm" in kind for kind in kinds)
    behind = any("norm" in type(module).__name__.lower() for module in branch.adds)
    return "sandwich" if behind and count > 2 else "post" if behind else "pre"


def _transform(anatomy: Anatomy) -> str:
    transform = anatomy.unembedding.transform
    said = [f"x{transform.scale:g}"] if transform.scale != 1 else []
    said += [] if transform.softcap is None else [f"cap {transform.softcap:g}"]
    said += [f"stream x{anatomy.residual_scale:g}"] if anatomy.residual_scale != 1 else []
    return ", ".join(said) or "none"


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_cores() -> int:
    """The cores to compute with: those that others keep busy would make threads wait for each
    other, which costs ten times what they bring.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, min(usable_cores(), round((os.cpu_count() or 1) - load)))


def _size(path: Path) -> str:
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return f"{total / 1e6:.0f} MB" if path.is_dir() else "empty"
