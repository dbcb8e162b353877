"""Faster bodies of the entropy kernel, each held against the float64 oracle."""
