"""Relax function -> :class:`~.graph.Graph`: one spelling per operator, constants folded on the way."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..errors import VitqError
from .fold import evaluate, fold, run_prim_func
from .graph import Graph, Node

__all__ = ["digest", "from_relax", "module_path", "place"]

Value = Any  # Node, or a tuple of Values


def place(node: Node) -> str:
    """Say where in the model a node is: its own name or that of the nearest named operand above."""
    seen = {id(node)}
    frontier = [node]
    while frontier:
        for candidate in frontier:
            if candidate.name:
                return candidate.name
        above = [i for n in frontier for i in n.inputs if id(i) not in seen]
        seen.update(id(n) for n in above)
        frontier = above
    return "the input"


def module_path(parameter: str) -> str:
    """Turn a parameter's name into its module's: ``blocks.0.mlp.fc1.weight`` -> ``blocks.0.mlp.fc1``."""
    head, _, tail = parameter.rpartition(".")
    return head if head and tail in ("weight", "bias", "gamma", "beta") else parameter


def digest(array: np.ndarray) -> bytes:
    """Digest of a constant's type, shape and content."""
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(array).tobytes(), digest_size=16).digest()


def _shape(expr: relax.Expr, what: str = "a value") -> tuple[int, ...]:
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
    raise VitqError(f"slice bounds of {expr} depend on the input: export the model with static shapes")


class _Importer:
    """Walks the bindings of one function and builds the graph."""

    def __init__(
        self,
        mod: tvm.IRModule,
        params: dict[str, tuple[str, np.ndarray]],
        constants: dict[bytes, str],
    ) -> None:
        self.mod = mod
        self.params = params
        self.constants = constants
        self.graph = Graph()
        self.env: dict[Any, Value] = {}

    # -------------------------------------------------------------- values
    def value(self, expr: Any) -> Value:
        """Return the graph value of a Relax expression."""
        if isinstance(expr, relax.Var):
            return self.env[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            array = expr.value.numpy()
            named = self.constants and array.size > 1
            return self.graph.const(array, self.constants.get(digest(array), "") if named else "")
        if isinstance(expr, relax.Tuple):
            return tuple(self.value(f) for f in expr.fields)
        if isinstance(expr, relax.ShapeExpr):
            return self.graph.const(np.array([int(v) for v in expr.values], "int64"))
        if isinstance(expr, tvm.tirx.IntImm):
            return self.graph.const(np.int64(int(expr)))
        if isinstance(expr, tvm.tirx.FloatImm):
            return self.graph.const(np.float32(expr.value))
        if isinstance(expr, relax.TupleGetItem):
            return self.value(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.Call):
            return self.call(expr)
        raise VitqError(f"cannot read {type(expr).__name__} in the imported model")

    def make(self, op: str, inputs: Sequence[Node], shape: Sequence[int], dtype: str, **attrs: Any) -> Node:
        """Make a node, or a constant if all operands are constant and numpy can compute it."""
        name = next((i.name for i in inputs if i.name), "")
        if inputs and all(i.is_const for i in inputs):
            folded = self._fold(op, inputs, {"shape": tuple(shape), "dtype": dtype, **attrs}, dtype)
            if folded is not None:
                folded.name = name
                return folded
        named = [i.name for i in inputs if i.is_const and i.name]
        return Node(op, inputs, shape, dtype, attrs, name=module_path(named[0]) if named else "")

    def _fold(self, op: str, inputs: Sequence[Node], attrs: dict[str, Any], dtype: str) -> Node | None:
        array = fold(op, [i.array for i in inputs], attrs)
        if array is None:
            return None
        node = self.graph.const(array.astype(dtype, copy=False))
        if op in ("reshape", "permute", "slice") and inputs[0].quant is not None:
            codes, scales = (fold(op, [a], attrs) for a in inputs[0].quant)
            node.quant = (codes, scales)  # type: ignore[assignment]
        return node

    # -------------------------------------------------------------- the function
    def run(self) -> Graph:
        """Import ``main``."""
        func = self.mod["main"]
        data = [p for p in func.params if p.name not in self.params]
        if len(data) != 1:
            names = [p.name for p in data]
            raise VitqError(f"the model has {len(data)} inputs {names}; one image tensor is supported")
        for param in func.params:
            if param.name in self.params:
                name, array = self.params[param.name]
                self.env[param] = self.graph.const(array, name)
            else:
                shape = _shape(param, f"input {param.name!r}")
                node = Node("input", [], shape, str(param.ty.dtype), name="")
                node.attrs["name"] = param.name
                self.graph.input = self.env[param] = node
        blocks = func.body.blocks
        for block in blocks:
            for binding in block.bindings:
                self.env[binding.var] = self.value(binding.value)
                self._name(self.env[binding.var], binding.var.name)
        out = self.value(func.body.body)
        while isinstance(out, tuple):
            if len(out) != 1:
                raise VitqError(f"the model returns {len(out)} tensors; one logits tensor is supported")
            out = out[0]
        self.graph.output = out
        return self.graph

    @staticmethod
    def _name(value: Value, name: str) -> None:
        generic = name.startswith(("lv", "gv")) and name[2:].isdigit() or name in ("lv", "gv")
        if isinstance(value, Node) and not value.name and not generic and not value.is_const:
            value.name = name

    # -------------------------------------------------------------- calls
    def call(self, call: relax.Call) -> Value:
        """Import one call."""
        if not isinstance(call.op, tvm.ir.Op):
            raise VitqError(f"the model calls a function {call.op}; only operators are supported")
        name = call.op.name.removeprefix("relax.")
        handler = _HANDLERS.get(name)
        if handler is not None:
            return handler(self, call)
        return self.generic(name, call)

    def _near(self, call: relax.Call) -> str:
        values = [self.value(a) for a in call.args if isinstance(a, relax.Var)]
        named = [v.name for v in values if isinstance(v, Node) and v.is_const and v.name]
        return module_path(named[0]) if named else next((place(v) for v in values if isinstance(v, Node)), "?")

    def generic(self, name: str, call: relax.Call) -> Value:
        """Import a call that has no special form: one node, or a constant."""
        if not isinstance(call.ty, relax.TensorType):
            raise VitqError(f"operator {name} near {self._near(call)} is not supported")
        operands: list[Node] = []
        pieces: list[tuple[str, Any]] = []
        for arg in call.args:
            if isinstance(arg, (relax.ShapeExpr, tvm.tirx.IntImm, tvm.tirx.FloatImm)):
                pieces.append(("expr", arg))
                continue
            value = self.value(arg)
            values = value if isinstance(value, tuple) else (value,)
            operands.extend(values)
            pieces.append(("tuple" if isinstance(value, tuple) else "node", len(values)))
        shape = _shape(call, f"operator {name}")
        dtype = str(call.ty.dtype)
        node = self.make(name, operands, shape, dtype, **_plain_attrs(call.attrs))
        if operands and not node.is_const and all(o.is_const for o in operands):

            def rebuild(exprs: Sequence[relax.Expr]) -> relax.Call:
                args: list[Any] = []
                rest = list(exprs)
                for kind, piece in pieces:
                    if kind == "expr":
                        args.append(piece)
                    else:
                        taken, rest = rest[:piece], rest[piece:]
                        args.append(relax.Tuple(taken) if kind == "tuple" else taken[0])
                return relax.Call(call.op, args, call.attrs, call.ty_args)

            folded = self.graph.const(evaluate([o.array for o in operands], rebuild), node.name)
            self.graph.drop(node)
            return folded
        return node


def _plain_attrs(attrs: Any) -> dict[str, Any]:
    if attrs is None:
        return {}
    out: dict[str, Any] = {}
    for key in dir(attrs):
        if key.startswith("_") or key == "id_":
            continue
        value = getattr(attrs, key)
        if callable(value):
            continue
        out[key] = [int(v) for v in value] if isinstance(value, tvm.ir.Array) else value
    return out


# ---------------------------------------------------------------- one handler per Relax operator
def _reshape(im: _Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    shape, name = _shape(call), call.op.name
    if not isinstance(x, Node):
        raise VitqError(f"operator {name} on a tuple is not supported")
    return x if shape == x.shape else im.make("reshape", [x], shape, x.dtype)


def _permute(im: _Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    rank = len(x.shape)
    axes = call.attrs.axes
    axes = tuple(range(rank))[::-1] if axes is None else tuple(int(a) % rank for a in axes)
    return im.make("permute", [x], [x.shape[a] for a in axes], x.dtype, axes=axes)


def _strided_slice(im: _Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    axes = [a % len(x.shape) for a in _int_list(call.args[1], im.value)]
    begins = _int_list(call.args[2], im.value)
    ends = _int_list(call.args[3], im.value)
    steps = _int_list(call.args[4], im.value) if len(call.args) > 4 else [1] * len(axes)
    for axis, begin, end, step in sorted(zip(axes, begins, ends, steps, strict=True)):
        begin, end, step = slice(begin, end, step).indices(x.shape[axis])
        x = _slice(im, x, axis, begin, end, step)
    return x


def _slice(im: _Importer, x: Node, axis: int, begin: int, end: int, step: int = 1) -> Node:
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


def _take(im: _Importer, call: relax.Call) -> Value:
    x, index = im.value(call.args[0]), im.value(call.args[1])
    axis = call.attrs.axis
    axis = 0 if axis is None else int(axis) % len(x.shape)
    shape = [*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]]
    if not index.is_const:
        raise VitqError(f"take near {place(x)} has indices that depend on the input; not supported")
    index = im.graph.const(index.array % x.shape[axis])
    return im.make("take", [x, index], shape, x.dtype, axis=axis)


def _concat(im: _Importer, call: relax.Call) -> Value:
    parts = im.value(call.args[0])
    axis = int(call.attrs.axis or 0) % len(parts[0].shape)
    return im.make("concat", parts, _shape(call), parts[0].dtype, axis=axis)


def _stack(im: _Importer, call: relax.Call) -> Value:
    parts = im.value(call.args[0])
    axis = int(call.attrs.axis or 0) % (len(parts[0].shape) + 1)
    parts = [
        im.make("reshape", [p], [*p.shape[:axis], 1, *p.shape[axis:]], p.dtype) for p in parts
    ]
    return im.make("concat", parts, _shape(call), parts[0].dtype, axis=axis)


def _split(im: _Importer, call: relax.Call) -> Value:
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
    return tuple(_slice(im, x, axis, a, b) for a, b in zip(bounds, bounds[1:], strict=False))


def _broadcast(im: _Importer, call: relax.Call) -> Value:
    x, shape = im.value(call.args[0]), _shape(call)
    if shape == x.shape:
        return x
    if x.size == math.prod(shape):
        return im.make("reshape", [x], shape, x.dtype)
    return im.make("broadcast_to", [x], shape, x.dtype)


def _resize(im: _Importer, call: relax.Call) -> Value:
    """A position embedding 'resized' to the size that it has."""
    x = im.value(call.args[0])
    return x if _shape(call) == x.shape else im.generic("image.resize2d", call)


def _arange(im: _Importer, call: relax.Call) -> Value:
    start, stop, step = (im.value(a).array.item() for a in call.args[:3])
    return im.graph.const(np.arange(start, stop, step, dtype=str(call.ty.dtype)))


def _full(im: _Importer, call: relax.Call) -> Value:
    fill = {"zeros": 0, "zeros_like": 0, "ones": 1, "ones_like": 1}.get(call.op.name[6:])
    if fill is None:
        fill = im.value(call.args[1])
        if not fill.is_const:
            raise VitqError("full with a value that depends on the input is not supported")
        fill = fill.array.item()
    return im.graph.const(np.full(_shape(call), fill, dtype=str(call.ty.dtype)))


def _shape_of(im: _Importer, call: relax.Call) -> Value:
    return im.graph.const(np.array(im.value(call.args[0]).shape, "int64"))


def _identity(im: _Importer, call: relax.Call) -> Value:
    return im.value(call.args[0])


def _astype(im: _Importer, call: relax.Call) -> Value:
    x, dtype = im.value(call.args[0]), str(call.ty.dtype)
    if dtype == x.dtype:
        return x
    return im.make("astype", [x], x.shape, dtype)


def _matmul(im: _Importer, call: relax.Call) -> Value:
    a, b = im.value(call.args[0]), im.value(call.args[1])
    return im.make("matmul", [a, b], _shape(call), "float32", transpose_b=False)


def _softmax(im: _Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    axis = int(call.attrs.axis) % len(x.shape)
    if axis != len(x.shape) - 1:
        raise VitqError(f"softmax over axis {axis} near {place(x)}: only the last axis is supported")
    return im.make("softmax", [x], x.shape, x.dtype)


def _layer_norm(im: _Importer, call: relax.Call) -> Value:
    x, gamma, beta = (im.value(a) for a in call.args)
    axes = [int(a) % len(x.shape) for a in call.attrs.axes]
    if axes != [len(x.shape) - 1]:
        raise VitqError(f"layer_norm over axes {axes} near {place(gamma)}: only the last axis is supported")
    epsilon = float(np.float32(call.attrs.epsilon))
    return im.make("layer_norm", [x, gamma, beta], x.shape, x.dtype, epsilon=epsilon)


def _mean(im: _Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    axes = call.attrs.axis
    rank = len(x.shape)
    axes = list(range(rank)) if axes is None else sorted(int(a) % rank for a in axes)
    axis = axes[0] if len(axes) == 1 and not call.attrs.keepdims else axes
    return im.make("mean", [x], _shape(call), x.dtype, axis=axis)


def _pad(im: _Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    widths = [int(w) for w in call.attrs.pad_width]
    if any(widths) and str(call.attrs.pad_mode) != "constant":
        raise VitqError(f"pad mode {call.attrs.pad_mode} near {place(x)} is not supported; only constant")
    return _padded(im, x, widths, float(call.attrs.pad_value))


def _padded(im: _Importer, x: Node, widths: list[int], fill: float) -> Node:
    for axis in range(len(x.shape)):
        parts = [x]
        for side, width in enumerate(widths[2 * axis : 2 * axis + 2]):
            if width:
                shape = [*x.shape[:axis], width, *x.shape[axis + 1 :]]
                filler = im.graph.const(np.full(shape, fill, "float32"))
                parts = [*parts, filler] if side else [filler, *parts]
        x = im.graph.concat(parts, axis)
    return x


def _call_tir(im: _Importer, call: relax.Call) -> Value:
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
    if len(inside) != x.size or tuple(high - low) != x.shape or len(np.unique(zeros[ones == zeros])) != 1:
        raise VitqError(f"pad near {place(x)} must be with one constant")
    return _padded(im, x, widths, float(zeros[ones == zeros][0]))


def _dequantize(im: _Importer, call: relax.Call) -> Value:
    x, scale, zero = (im.value(a) for a in call.args)
    where = f"near {place(x)}"
    if not scale.is_const or not zero.is_const:
        raise VitqError(f"dequantize {where} has a scale that depends on the input; not supported")
    if x.op == "quantize":
        node = x
        same = node.attrs["scale"] == float(scale.array.reshape(-1)[0])
        if scale.size != 1 or not same or node.attrs["zero_point"] != int(zero.array.reshape(-1)[0]):
            raise VitqError(f"dequantize {where} has another scale than the quantize before it")
        return im.graph.like("qdq", node.inputs[0], node.inputs, **node.attrs)
    if x.op == "input" and x.dtype == "uint8" and scale.size == 1 and float(scale.array) == 1.0:
        return Node("pixels", [x], x.shape, "float32")
    if not x.is_const:
        raise VitqError(f"dequantize {where} of something that is not a quantize or a constant is not supported")
    shape = [1] * len(x.shape)
    if scale.size > 1:
        shape[int(call.attrs.axis) % len(x.shape)] = scale.size
    zeros = zero.array.astype("int32").reshape(shape if zero.size > 1 else [1] * len(x.shape))
    scales = np.broadcast_to(scale.array.astype("float32").reshape(shape), x.shape)
    codes = x.array.astype("int32") - zeros
    node = im.graph.const((codes * scales).astype("float32"), x.name)
    if codes.min(initial=0) >= -128 and codes.max(initial=0) <= 127 and x.dtype in ("int8", "uint8"):
        node.quant = (codes.astype("int8"), scales)
    return node


def _quantize(im: _Importer, call: relax.Call) -> Value:
    x, scale, zero = (im.value(a) for a in call.args)
    if not (scale.is_const and zero.is_const and scale.size == 1 and zero.size == 1):
        raise VitqError(f"quantize near {place(x)} must have one constant scale and zero point per tensor")
    attrs = {
        "scale": float(scale.array.reshape(-1)[0]),
        "zero_point": int(zero.array.reshape(-1)[0]),
        "dtype": str(call.ty.dtype),
    }
    return Node("quantize", [x], x.shape, attrs["dtype"], attrs, name=x.name)


def _gelu(im: _Importer, call: relax.Call) -> Value:
    x = im.value(call.args[0])
    return im.make(call.op.name.removeprefix("relax.nn."), [x], x.shape, x.dtype)


_HANDLERS: dict[str, Callable[[_Importer, relax.Call], Value]] = {
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


def from_relax(
    mod: tvm.IRModule,
    names: dict[str, str] | None = None,
    constants: dict[bytes, str] | None = None,
) -> Graph:
    """Read the function ``main`` of a module into a graph.

    Parameters
    ----------
    mod : tvm.IRModule
        Output of an importer. Parameters may be inline constants or, with their values in the
        function attribute ``params``, trailing arguments (their names then appear in errors).
    names : dict, optional
        Argument name -> parameter name in the original model.
    constants : dict, optional
        :func:`digest` of an inline constant -> parameter name.

    Raises
    ------
    VitqError
        For dynamic shapes, several inputs or outputs, or an operator that cannot be read.
    """
    func = mod["main"]
    params: dict[str, tuple[str, np.ndarray]] = {}
    if func.attrs is not None and "params" in func.attrs:
        values = list(func.attrs["params"])
        for var, value in zip(func.params[len(func.params) - len(values) :], values, strict=True):
            params[var.name] = ((names or {}).get(var.name, var.name), value.numpy())
    return _Importer(mod, params, constants or {}).run()
