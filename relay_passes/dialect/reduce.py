"""``vitq.sum``: int32 sum over one axis (mean pooling; its 1/n is in the requantisation after)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, te

from relay_passes.dialect.checking import ACTIVATION_DTYPES, fail, tensor_of
from relay_passes.dialect.registry import Claim, Interval, call, register

__all__ = ["sum_"]


def sum_(x: relax.Expr, axis: int, keepdims: bool = False) -> relax.Call:
    """Sum int8, uint8 or int16 codes over ``axis`` to int32."""
    return call("sum", x, axis=int(axis), keepdims=bool(keepdims))


def _axis(node: relax.Call) -> tuple[list[int], int]:
    shape, _ = tensor_of(node, 0, ACTIVATION_DTYPES, "x")
    axis = node.attrs["axis"]
    if not -len(shape) <= axis < len(shape):
        raise fail(node, f"axis {axis} is outside shape {shape}")
    return shape, axis % len(shape)


def _infer(node: relax.Call) -> relax.TensorType:
    shape, axis = _axis(node)
    middle = [1] if node.attrs["keepdims"] else []
    return relax.TensorType(shape[:axis] + middle + shape[axis + 1 :], "int32")


def _compute(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    (x,) = tensors
    axis, keep = attrs["axis"] % len(x.shape), int(attrs["keepdims"])
    k = te.reduce_axis((0, x.shape[axis]), name="k")
    shape = [*x.shape[:axis], *([1] * keep), *x.shape[axis + 1 :]]
    return te.compute(
        shape,
        lambda *i: te.sum(x(*i[:axis], k, *i[axis + keep :]).astype("int32"), axis=k),
        name="acc",
    )


def _bounds(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    shape, axis = _axis(node)
    lo, hi = shape[axis] * args[0].lo, shape[axis] * args[0].hi
    claims = [
        Claim("partial sums", min(lo, 0), max(hi, 0), "int32"),
        Claim("accumulator", lo, hi, "int32"),
    ]
    return Interval(lo, hi), claims


register(
    "sum",
    ["x"],
    "int32 sum over one axis.",
    infer=_infer,
    compute=_compute,
    bounds=_bounds,
)
