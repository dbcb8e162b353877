"""The names of what is measured a layer, in the order of the files."""

from __future__ import annotations

__all__ = ["DELTAS", "GEOMETRY", "READINGS", "prefix_of", "quantities_of"]

READINGS = ("raw", "normed")

#: RMS and cosines belong to no reading.
GEOMETRY = (
    *("cos_attn", "cos_ffn", "cos_final"),
    *("rms_layer", "rms_attn", "rms_ffn", "rms_attn_in", "rms_mid", "rms_ffn_in"),
)
DELTAS = ("delta_layer", "delta_attn", "delta_ffn")
_ENTROPIES = ("entropy_layer", "entropy_attn", "entropy_ffn")
_KNOWS = ("nll_layer", "agree_layer", "kl_layer")
_CONTROL = ("control_delta_attn", "control_delta_ffn")
_STEPS = ("step_attn", "step_ffn")


def prefix_of(reading: str) -> str:
    """What a reading's columns begin with."""
    return "normed_" if reading == "normed" else ""


def quantities_of(reading: str) -> tuple[str, ...]:
    """The per-layer quantities of a reading (raw | normed | both)."""
    raw = (*_ENTROPIES, *DELTAS)
    normed = tuple(f"normed_{name}" for name in (*_ENTROPIES, *DELTAS, *_STEPS, *_KNOWS))
    return (
        *(raw if reading != "normed" else ()),
        *GEOMETRY,
        *((*_KNOWS, *_CONTROL) if reading != "normed" else ()),
        *(normed if reading != "raw" else ()),
    )
