"""Reference of the stock Relax operators that move elements and compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

__all__ = ["LAYOUT"]

LayoutFn = Callable[[list[Any], relax.Call], Any]


def _ints(expr: Any) -> list[int]:
    """Return the integers of a shape, a tuple of values or an attribute list."""
    for name in ("values", "fields"):
        if hasattr(expr, name):
            expr = getattr(expr, name)
            break
    return [int(getattr(item, "value", item)) for item in expr]


def _strided_slice(args: list[Any], call: relax.Call) -> np.ndarray:
    x = args[0]
    axes, begin, end = (_ints(call.args[i]) for i in (1, 2, 3))
    strides = _ints(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    index = [slice(None)] * x.ndim
    for axis, first, last, step in zip(axes, begin, end, strides, strict=True):
        # A negative step that runs past the front is written with an end below -extent.
        stop = None if step < 0 and last < -x.shape[axis] else last
        index[axis] = slice(first, stop, step)
    return x[tuple(index)]


def _permute(args: list[Any], call: relax.Call) -> np.ndarray:
    axes = call.attrs.axes
    return np.transpose(args[0], None if axes is None else _ints(axes))


def _split(args: list[Any], call: relax.Call) -> tuple[np.ndarray, ...]:
    where = call.attrs.indices_or_sections
    parts = int(where) if not hasattr(where, "__len__") else _ints(where)
    return tuple(np.split(args[0], parts, axis=int(call.attrs.axis)))


def _take(args: list[Any], call: relax.Call) -> np.ndarray:
    axis = call.attrs.axis
    return np.take(args[0], args[1], axis=None if axis is None else int(axis))


def _axes_of_type(args: list[Any], call: relax.Call) -> np.ndarray:
    return np.reshape(args[0], _ints(call.ty.shape))


LAYOUT: dict[str, LayoutFn] = {
    "relax.reshape": _axes_of_type,
    "relax.flatten": _axes_of_type,
    "relax.expand_dims": _axes_of_type,
    "relax.squeeze": _axes_of_type,
    "relax.permute_dims": _permute,
    "relax.strided_slice": _strided_slice,
    "relax.concat": lambda args, call: np.concatenate(args[0], axis=int(call.attrs.axis or 0)),
    "relax.split": _split,
    "relax.take": _take,
    "relax.broadcast_to": lambda args, call: np.broadcast_to(args[0], _ints(call.ty.shape)),
    "relax.astype": lambda args, call: args[0].astype(np.int64),
}
"""Operator name to a function of (argument values, call); the interpreter checks the dtype."""
