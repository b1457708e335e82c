"""Softmax and GELU of the ``shift`` family in real arithmetic, for calibration.

The ``table`` and ``poly`` families are exact to far below a code. The shifts of I-ViT are not:
their mean error is several codes behind a GELU. Weights are therefore rounded, and biases
corrected, with these forms in place (the formulas of :mod:`relay_passes.dialect.exponent` and
``gelu``, without their integer rounding).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tvm_vitq.quantizers.recipe import Recipe
from tvm_vitq.quantizers.structure import GELU, SOFTMAX
from tvm_vitq.reference.float_interpreter import Operator

__all__ = ["shift_gelu", "shift_operators", "shift_softmax"]


def _exponential(d: torch.Tensor) -> torch.Tensor:
    """``e**-d`` for ``d >= 0``: base 2 by ``1 + 1/2 - 1/16``, a straight line between powers."""
    t = d * (1 + 1 / 2 - 1 / 16)
    whole = t.floor()
    return (1 - (t - whole) / 2) * torch.exp2(-whole)


def shift_softmax(x: torch.Tensor) -> torch.Tensor:
    """Shiftmax over the last axis, float32 of any shape."""
    e = _exponential(x.amax(-1, keepdim=True) - x)
    return e / e.sum(-1, keepdim=True)


def shift_gelu(x: torch.Tensor) -> torch.Tensor:
    """``x * sigma(1.702 x)`` by shifts, split by sign; float32 of any shape."""
    u = x.abs()
    z = _exponential(u * (1 + 1 / 2 + 1 / 8 + 1 / 16))
    return x.clamp(min=0) - u * z * (1 - z * (7 / 8 - 3 / 8 * z))


def shift_operators(recipe: Recipe) -> Mapping[str, Operator]:
    """Operators that the recipe computes by shifts, by name; the others stay as they are."""
    found: dict[str, Operator] = {}
    if recipe.method("softmax") == "shift":
        found |= {name: lambda tensors, _step: shift_softmax(tensors[0]) for name in SOFTMAX}
    if recipe.method("gelu") == "shift":
        found |= {name: lambda tensors, _step: shift_gelu(tensors[0]) for name in GELU}
    return found
