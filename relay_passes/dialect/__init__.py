"""The ``vitq.*`` operators: type inference, definition, bounds, builders; one file per family.

Importing this package registers every family of :data:`FAMILIES`; a new family is one file and one
name in that list. ``registry.SPECS`` then knows all operators.
"""

from __future__ import annotations

from importlib import import_module

__all__ = ["FAMILIES"]

FAMILIES = (
    "boundary",
    "linear",
    "matmul",
    "requantize",
    "add",
    "reduce",
    "softmax",
    "gelu",
    "layer_norm",
    "float_ops",
    "packed",
)
"""Modules of this package that register operators."""

for _family in FAMILIES:
    import_module(f"{__name__}.{_family}")
