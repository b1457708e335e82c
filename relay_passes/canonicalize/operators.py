"""One handler per Relax operator that an importer may write: its one spelling in the graph.

Operators that are not listed in :data:`HANDLERS` become a node of their own name; the grammar
check then says that they are not supported, unless all their operands are constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax

from ..errors import VitqError
from .fold import run_prim_func
from .graph import Node
from .naming import place

if TYPE_CHECKING:
    from .from_relax import Importer

__all__ = ["HANDLERS", "static_shape"]

Value = Any  # Node, or a tuple of Values


def static_shape(expr: relax.Expr, what: str = "a value") -> tuple[int, ...]:
    """Read the shape of a Relax value; dynamic shapes are the user's mistake."""
    dims = expr.ty.shape
    if dims is None or any(not isinstance(d, tvm.tirx.IntImm) for d in dims):
        raise VitqError(f"{what} has a dynamic shape {dims}: export the model with static shapes")
    return tuple(int(d) for d in dims)


def _int_list(expr: Any, env: Callable[[Any], Value]) -> list[int]:
    if isinstance(expr, relax.Tuple):
        return [int(f) for f in expr.fields]
    value = env(expr)
    if isinstance(value, Node) and value.is_const:
        return [int(v) for v in value.array.reshape(-1)]
    raise VitqError(
        f"slice bounds of {expr} depend on the input: export the model with static shapes"
    )


def _reshape(im: Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    shape, name = static_shape(call), call.op.name
    if not isinstance(x, Node):
        raise VitqError(f"operator {name} on a tuple is not supported")
    return x if shape == x.shape else im.make("reshape", [x], shape, x.dtype)


def _permute(im: Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    rank = len(x.shape)
    axes = call.attrs.axes
    axes = tuple(range(rank))[::-1] if axes is None else tuple(int(a) % rank for a in axes)
    return im.make("permute", [x], [x.shape[a] for a in axes], x.dtype, axes=axes)


def _strided_slice(im: Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    axes = [a % len(x.shape) for a in _int_list(call.args[1], im.value)]
    begins = _int_list(call.args[2], im.value)
    ends = _int_list(call.args[3], im.value)
    steps = _int_list(call.args[4], im.value) if len(call.args) > 4 else [1] * len(axes)
    for axis, begin, end, step in sorted(zip(axes, begins, ends, steps, strict=True)):
        begin, end, step = slice(begin, end, step).indices(x.shape[axis])
        x = _slice(im, x, axis, begin, end, step)
    return x


def _slice(im: Importer, x: Node, axis: int, begin: int, end: int, step: int = 1) -> Node:
    n = x.shape[axis]
    length = len(range(begin, end, step))
    shape = [*x.shape[:axis], length, *x.shape[axis + 1 :]]
    if x.is_const:
        return im.make("slice", [x], shape, x.dtype, axis=axis, begin=begin, end=end, step=step)
    if step == 1:
        return im.graph.slice(x, axis, begin, end)
    if step > 1 and n % step == 0 and length == n // step:
        offset = begin % step
        split = im.graph.reshape(x, [*x.shape[:axis], n // step, step, *x.shape[axis + 1 :]])
        return im.graph.reshape(im.graph.slice(split, axis + 1, offset, offset + 1), shape)
    raise VitqError(f"slice [{begin}:{end}:{step}] of axis {axis} near {place(x)} is not supported")


def _take(im: Importer, call: relax.Call) -> Value:
    x, index = im.value(call.args[0]), im.value(call.args[1])
    axis = call.attrs.axis
    axis = 0 if axis is None else int(axis) % len(x.shape)
    shape = [*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]]
    if not index.is_const:
        raise VitqError(f"take near {place(x)} has indices that depend on the input; not supported")
    index = im.graph.const(index.array % x.shape[axis])
    return im.make("take", [x, index], shape, x.dtype, axis=axis)


def _concat(im: Importer, call: relax.Call) -> Value:
    parts = im.value(call.args[0])
    axis = int(call.attrs.axis or 0) % len(parts[0].shape)
    return im.make("concat", parts, static_shape(call), parts[0].dtype, axis=axis)


def _stack(im: Importer, call: relax.Call) -> Value:
    parts = im.value(call.args[0])
    axis = int(call.attrs.axis or 0) % (len(parts[0].shape) + 1)
    parts = [im.make("reshape", [p], [*p.shape[:axis], 1, *p.shape[axis:]], p.dtype) for p in parts]
    return im.make("concat", parts, static_shape(call), parts[0].dtype, axis=axis)


def _split(im: Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    axis = int(call.attrs.axis) % len(x.shape)
    sections = call.attrs.indices_or_sections
    n = x.shape[axis]
    if isinstance(sections, (int, tvm.tirx.IntImm)):
        step = math.ceil(n / int(sections))
        cuts = list(range(step, n, step))
    else:
        cuts = [int(s) for s in sections]
    bounds = [0, *cuts, n]
    return tuple(_slice(im, x, axis, a, b) for a, b in itertools.pairwise(bounds))


def _broadcast(im: Importer, call: relax.Call) -> Value:
    x, shape = im.value(call.args[0]), static_shape(call)
    if shape == x.shape:
        return x
    if x.size == math.prod(shape):
        return im.make("reshape", [x], shape, x.dtype)
    return im.make("broadcast_to", [x], shape, x.dtype)


def _resize(im: Importer, call: relax.Call) -> Value:
    """A position embedding 'resized' to the size that it has."""
    x = im.value(call.args[0])
    return x if static_shape(call) == x.shape else im.generic("image.resize2d", call)


def _arange(im: Importer, call: relax.Call) -> Value:
    start, stop, step = (im.value(a).array.item() for a in call.args[:3])
    return im.graph.const(np.arange(start, stop, step, dtype=str(call.ty.dtype)))


def _full(im: Importer, call: relax.Call) -> Value:
    fill = {"zeros": 0, "zeros_like": 0, "ones": 1, "ones_like": 1}.get(call.op.name[6:])
    if fill is None:
        fill = im.value(call.args[1])
        if not fill.is_const:
            raise VitqError("full with a value that depends on the input is not supported")
        fill = fill.array.item()
    return im.graph.const(np.full(static_shape(call), fill, dtype=str(call.ty.dtype)))


def _shape_of(im: Importer, call: relax.Call) -> Value:
    return im.graph.const(np.array(im.value(call.args[0]).shape, "int64"))


def _identity(im: Importer, call: relax.Call) -> Value:
    return im.value(call.args[0])


def _astype(im: Importer, call: relax.Call) -> Value:
    x, dtype = im.value(call.args[0]), str(call.ty.dtype)
    if dtype == x.dtype:
        return x
    return im.make("astype", [x], x.shape, dtype)


def _matmul(im: Importer, call: relax.Call) -> Value:
    a, b = im.value(call.args[0]), im.value(call.args[1])
    return im.make("matmul", [a, b], static_shape(call), "float32", transpose_b=False)


def _softmax(im: Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    axis = int(call.attrs.axis) % len(x.shape)
    if axis != len(x.shape) - 1:
        raise VitqError(
            f"softmax over axis {axis} near {place(x)}: only the last axis is supported"
        )
    return im.make("softmax", [x], x.shape, x.dtype)


def _layer_norm(im: Importer, call: relax.Call) -> Value:
    x, gamma, beta = (im.value(a) for a in call.args)
    axes = [int(a) % len(x.shape) for a in call.attrs.axes]
    if axes != [len(x.shape) - 1]:
        raise VitqError(
            f"layer_norm over axes {axes} near {place(gamma)}: only the last axis is supported"
        )
    epsilon = float(np.float32(call.attrs.epsilon))
    return im.make("layer_norm", [x, gamma, beta], x.shape, x.dtype, epsilon=epsilon)


def _mean(im: Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    axes = call.attrs.axis
    rank = len(x.shape)
    axes = list(range(rank)) if axes is None else sorted(int(a) % rank for a in axes)
    axis = axes[0] if len(axes) == 1 and not call.attrs.keepdims else axes
    return im.make("mean", [x], static_shape(call), x.dtype, axis=axis)


def _pad(im: Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    widths = [int(w) for w in call.attrs.pad_width]
    if any(widths) and str(call.attrs.pad_mode) != "constant":
        raise VitqError(
            f"pad mode {call.attrs.pad_mode} near {place(x)} is not supported; only constant"
        )
    return _padded(im, x, widths, float(call.attrs.pad_value))


def _padded(im: Importer, x: Node, widths: list[int], fill: float) -> Node:
    for axis in range(len(x.shape)):
        parts = [x]
        for side, width in enumerate(widths[2 * axis : 2 * axis + 2]):
            if width:
                shape = [*x.shape[:axis], width, *x.shape[axis + 1 :]]
                filler = im.graph.const(np.full(shape, fill, "float32"))
                parts = [*parts, filler] if side else [filler, *parts]
        x = im.graph.concat(parts, axis)
    return x


def _call_tir(im: Importer, call: relax.Call) -> Value:
    """The ONNX importer writes Pad as a PrimFunc: see where it puts its input."""
    symbol = call.args[0].name_hint
    x = im.value(call.args[1].fields[0])
    shape = tuple(int(d) for d in call.ty_args[0].shape)
    if not symbol.startswith("pad") or len(call.args[1].fields) != 1 or len(shape) != len(x.shape):
        raise VitqError(f"operator {symbol} near {place(x)} is not supported")
    if shape == x.shape:
        return x
    func = im.mod[call.args[0]]
    ones, zeros = (run_prim_func(func, np.full(x.shape, v, x.dtype), shape) for v in (1, 0))
    inside = np.argwhere(ones != zeros)
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    widths = [int(w) for axis, n in enumerate(shape) for w in (low[axis], n - high[axis])]
    if (
        len(inside) != x.size
        or tuple(high - low) != x.shape
        or len(np.unique(zeros[ones == zeros])) != 1
    ):
        raise VitqError(f"pad near {place(x)} must be with one constant")
    return _padded(im, x, widths, float(zeros[ones == zeros][0]))


def _dequantize(im: Importer, call: relax.Call) -> Value:
    x, scale, zero = (im.value(a) for a in call.args)
    where = f"near {place(x)}"
    if not scale.is_const or not zero.is_const:
        raise VitqError(f"dequantize {where} has a scale that depends on the input; not supported")
    if x.op == "quantize":
        node = x
        same = node.attrs["scale"] == float(scale.array.reshape(-1)[0])
        if (
            scale.size != 1
            or not same
            or node.attrs["zero_point"] != int(zero.array.reshape(-1)[0])
        ):
            raise VitqError(f"dequantize {where} has another scale than the quantize before it")
        return Node("qdq", node.inputs, node.shape, "float32", dict(node.attrs), name=node.name)
    if x.op == "input" and x.dtype == "uint8" and scale.size == 1 and float(scale.array) == 1.0:
        return Node("pixels", [x], x.shape, "float32")
    if not x.is_const:
        raise VitqError(
            f"dequantize {where} of something that is not a quantize or a constant is not supported"
        )
    shape = [1] * len(x.shape)
    if scale.size > 1:
        shape[int(call.attrs.axis) % len(x.shape)] = scale.size
    zeros = zero.array.astype("int32").reshape(shape if zero.size > 1 else [1] * len(x.shape))
    scales = np.broadcast_to(scale.array.astype("float32").reshape(shape), x.shape)
    codes = x.array.astype("int32") - zeros
    node = im.graph.const((codes * scales).astype("float32"), x.name)
    if (
        codes.min(initial=0) >= -128
        and codes.max(initial=0) <= 127
        and x.dtype in ("int8", "uint8")
    ):
        node.quant = (codes.astype("int8"), scales)
    node.attrs = dict(x.attrs)
    return node


def _quantized_const(
    im: Importer, x: Node, scale: np.ndarray, zero: np.ndarray, call: relax.Call
) -> Node:
    dtype = str(call.ty.dtype)
    shape = [1] * len(x.shape)
    if scale.size > 1:
        shape[int(call.attrs.axis) % len(shape)] = scale.size
    zero = np.broadcast_to(zero, scale.shape).reshape(shape).astype("int64")
    codes = np.rint(x.array / scale.reshape(shape)).astype("int64") + zero
    info = np.iinfo(dtype)
    out = im.graph.const(np.clip(codes, info.min, info.max).astype(dtype), x.name)
    out.attrs["exact"] = x.array
    return out


def _quantize(im: Importer, call: relax.Call) -> Value:
    x, scale, zero = (im.value(a) for a in call.args)
    if x.is_const and scale.is_const and zero.is_const:
        return _quantized_const(im, x, scale.array, zero.array, call)
    if not (scale.is_const and zero.is_const and scale.size == 1 and zero.size == 1):
        raise VitqError(
            f"quantize near {place(x)} must have one constant scale and zero point per tensor"
        )
    dtype = str(call.ty.dtype)
    attrs = {
        "scale": float(scale.array.reshape(-1)[0]),
        "zero_point": int(zero.array.reshape(-1)[0]),
        "dtype": dtype,
    }
    return Node("quantize", [x], x.shape, dtype, attrs, name=x.name)


def _gelu(im: Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    return im.make(call.op.name.removeprefix("relax.nn."), [x], x.shape, x.dtype)


HANDLERS: dict[str, Callable[[Importer, relax.Call], Value]] = {
    **dict.fromkeys(["reshape", "expand_dims", "squeeze", "flatten"], _reshape),
    **dict.fromkeys(["full", "full_like", "zeros", "zeros_like", "ones", "ones_like"], _full),
    **dict.fromkeys(["shape_to_tensor", "tensor_to_shape", "nn.dropout"], _identity),
    "permute_dims": _permute,
    "strided_slice": _strided_slice,
    "dynamic_strided_slice": _strided_slice,
    "take": _take,
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "broadcast_to": _broadcast,
    "arange": _arange,
    "shape_of": _shape_of,
    "astype": _astype,
    "matmul": _matmul,
    "nn.softmax": _softmax,
    "nn.layer_norm": _layer_norm,
    "mean": _mean,
    "nn.pad": _pad,
    "image.resize2d": _resize,
    "nn.gelu": _gelu,
    "nn.gelu_tanh": _gelu,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "call_tir": _call_tir,
}
