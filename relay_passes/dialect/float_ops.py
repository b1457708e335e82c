"""``vitq.float_softmax``, ``vitq.float_gelu``: a nonlinearity with the choice of its integer form.

They stand in the quantize/dequantize form in place of ``nn.softmax`` and ``nn.gelu`` and carry one
attribute, ``method``: ``table``, ``poly`` or ``shift``. Executed as they are they compute the exact
float function; lowering replaces them by ``vitq.softmax`` and ``vitq.gelu`` of that method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, te, tirx, topi

from relay_passes.dialect.checking import fail, tensor_of
from relay_passes.dialect.registry import Claim, Interval, call, register

__all__ = ["METHODS", "float_gelu", "float_softmax"]

METHODS = ("table", "poly", "shift")


def float_softmax(x: relax.Expr, method: str) -> relax.Call:
    """Softmax over the last axis of float32 ``x``, to be lowered with ``method``."""
    return call("float_softmax", x, method=method)


def float_gelu(x: relax.Expr, method: str) -> relax.Call:
    """GELU (erf) of float32 ``x``, to be lowered with ``method``."""
    return call("float_gelu", x, method=method)


def _infer(node: relax.Call) -> relax.TensorType:
    shape, dtype = tensor_of(node, 0, ["float32"], "x")
    if node.attrs["method"] not in METHODS:
        raise fail(node, f"method {node.attrs['method']!r} is unknown; use {', '.join(METHODS)}")
    return relax.TensorType(shape, dtype)


def _softmax(tensors: Sequence[te.Tensor], _attrs: Any) -> te.Tensor:
    return topi.nn.softmax(tensors[0], axis=-1)


def _gelu(tensors: Sequence[te.Tensor], _attrs: Any) -> te.Tensor:
    x = tensors[0]
    half, root = tirx.const(0.5, x.dtype), tirx.const(0.5**0.5, x.dtype)
    return x * (half + topi.erf(x * root) * half)


def _bounds(node: relax.Call, _args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    raise fail(node, "still float after lowering; run LowerToInteger first")


for _name, _compute in (("float_softmax", _softmax), ("float_gelu", _gelu)):
    register(
        _name,
        ("x",),
        f"{_name.removeprefix('float_')} in float, with the integer method it is lowered with",
        infer=_infer,
        compute=_compute,
        bounds=_bounds,
    )
