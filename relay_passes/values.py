"""What a float expression of the quantize/dequantize form is worth in integers.

Lowering walks the module once and keeps, for every float variable, one of these values. A value
is either finished (:class:`Codes`: an integer tensor with a scale) or pending: it waits for the
quantize node that says to which codes it must be rounded, so that every result is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from tvm import relax

__all__ = [
    "Activation",
    "Codes",
    "Constant",
    "Mean",
    "Norm",
    "Product",
    "Real",
    "Score",
    "Sum",
    "Value",
    "Weight",
    "shape_of",
]


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """Static shape of a Relax expression."""
    return tuple(int(dim) for dim in expr.ty.shape.values)


@dataclass(frozen=True)
class Codes:
    """An integer tensor: real = scale * (expr - zero_point), all codes in [qmin, qmax]."""

    expr: relax.Expr
    scale: float
    zero_point: int
    qmin: int
    qmax: int

    @property
    def dtype(self) -> str:
        """Element type of the codes."""
        return str(self.expr.ty.dtype)

    def moved(self, expr: relax.Expr) -> Codes:
        """Return the same codes after a layout operator."""
        return replace(self, expr=expr)


@dataclass(frozen=True)
class Real:
    """A float tensor that is not quantized yet: the network's input."""

    expr: relax.Expr


@dataclass(frozen=True)
class Constant:
    """A float constant (bias, position embedding, mask, scalar factor)."""

    data: np.ndarray


@dataclass(frozen=True)
class Weight:
    """Quantized weight constant: real[k, n] = scale[n] * codes[k, n]."""

    codes: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Product:
    """x @ W + bias, not rounded: x codes, int8 weight, float bias of shape [N] in real units."""

    x: Codes
    weight: Weight
    bias: np.ndarray


@dataclass(frozen=True)
class Score:
    """Product of two activations times a real factor, not rounded."""

    a: Codes
    b: Codes
    factor: float = 1.0


@dataclass(frozen=True)
class Sum:
    """Sum of two or more terms, not rounded."""

    terms: tuple[Codes | Constant | Product | Score, ...]


@dataclass(frozen=True)
class Activation:
    """Softmax or GELU of codes, not rounded; ``channel_scale`` multiplies a GELU's output."""

    kind: str
    x: Codes
    method: str
    channel_scale: np.ndarray | None = None


@dataclass(frozen=True)
class Norm:
    """LayerNorm over the last axis, not rounded."""

    x: Codes
    gamma: np.ndarray
    beta: np.ndarray
    eps: float


@dataclass(frozen=True)
class Mean:
    """Mean over one axis, not rounded."""

    x: Codes
    axis: int
    keepdims: bool
    size: int = field(default=1)


Value = Codes | Real | Constant | Weight | Product | Score | Sum | Activation | Norm | Mean
