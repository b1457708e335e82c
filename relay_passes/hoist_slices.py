"""Compute only the rows that are read: slices move up through what treats rows alike.

A class-token network reads one token of its last block, so that of this block only K and V need the
others. Backwards, every variable gets the part of it that is read; forwards, what is read in part
is computed in part. Row-wise operators (linear, layer_norm, softmax, gelu, ...) pass the slice of
their result on to their operands, matmuls to the operand that has the axis:

Before::

    p = vitq.softmax(s)                              # [B, H, T, T]
    o = vitq.matmul_requant(p, v)                    # [B, H, T, d]
    y = vitq.linear_requant_add(x, w, b, m, e, r)    # [B, T, C], x being o with heads side by side
    z = strided_slice(vitq.layer_norm(y), [1], [0], [1])

After::

    p = vitq.softmax(s')                             # [B, H, 1, T]
    o = vitq.matmul_requant(p, v)                    # [B, H, 1, d]
    z = vitq.layer_norm(vitq.linear_requant_add(x', w, b, m, e, strided_slice(r, [1], [0], [1])))

A variable is computed in part only if at most half of it is read, since operands that others need
whole are then copied in part. No bit changes: what is left out is what nothing read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from .dialect.registry import constant_of
from .values import shape_of

__all__ = ["HoistSlices"]


@dataclass(frozen=True)
class Part:
    """Elements [begin, end) along one axis."""

    axis: int
    begin: int
    end: int

    def hull(self, other: Part | None) -> Part | None:
        """Return the smallest part that holds both, None for everything."""
        if other is None or other.axis != self.axis:
            return None
        return Part(self.axis, min(self.begin, other.begin), max(self.end, other.end))


def _row_wise(call: relax.Call, part: Part) -> list[Part | None] | None:
    """Operators that treat every row of their first operand alike, and of a residual if any."""
    if part.axis == len(shape_of(call)) - 1:
        return None
    parts: list[Part | None] = [part] + [None] * (len(call.args) - 1)
    if _op_name(call) == "vitq.linear_requant_add":
        parts[-1] = part
    return parts


def _elementwise(call: relax.Call, part: Part) -> list[Part | None] | None:
    """Operators of a tensor and of parameters of the last axis, or of tensors that broadcast."""
    shape = shape_of(call)
    if part.axis == len(shape) - 1:
        return None
    parts: list[Part | None] = []
    for arg in call.args:
        own = shape_of(arg)
        axis = part.axis - len(shape) + len(own)
        whole = axis < 0 or own[axis] != shape[part.axis]
        parts.append(None if whole else Part(axis, part.begin, part.end))
    return parts


def _matmul(call: relax.Call, part: Part) -> list[Part | None] | None:
    rank = len(shape_of(call))
    if part.axis == rank - 1:
        return None
    parts = [part, None if part.axis == rank - 2 else part]
    for residual in call.args[2:]:
        parts.append(part if shape_of(residual)[part.axis] > 1 else None)
    return parts


def _reshape(call: relax.Call, part: Part) -> list[Part | None] | None:
    before, after = shape_of(call.args[0]), shape_of(call)
    ahead = int(np.prod(after[: part.axis], dtype=np.int64))
    for axis, extent in enumerate(before):
        if extent == after[part.axis] and int(np.prod(before[:axis], dtype=np.int64)) == ahead:
            return [Part(axis, part.begin, part.end), None]
    return None


def _permute(call: relax.Call, part: Part) -> list[Part | None] | None:
    axis = int(call.attrs.axes[part.axis]) % len(shape_of(call))
    return [Part(axis, part.begin, part.end)]


RULES: dict[str, Callable[[relax.Call, Part], list[Part | None] | None]] = {
    **{f"vitq.linear{end}": _row_wise for end in ("", "_requant", "_requant_add")},
    "vitq.layer_norm": _row_wise,
    "vitq.softmax": _row_wise,
    "vitq.gelu": _row_wise,
    "vitq.requantize": _elementwise,
    "vitq.add": _elementwise,
    "vitq.matmul": _matmul,
    "vitq.matmul_requant": _matmul,
    "vitq.matmul_requant_add": _matmul,
    "relax.reshape": _reshape,
    "relax.permute_dims": _permute,
}
"""Operator to what is read of its operands (None: all of one) if a part of its result is; None if
the operator needs them whole."""


def _slice_of(call: relax.Expr) -> Part | None:
    """Return what a ``strided_slice`` reads, if it is part of one axis with step 1."""
    if not (isinstance(call, relax.Call) and getattr(call.op, "name", "") == "relax.strided_slice"):
        return None
    axes, begins, ends, *steps = ([int(v.value) for v in arg.fields] for arg in call.args[1:])
    if len(axes) != 1 or (steps and steps[0] != [1]):
        return None
    extents = shape_of(call.args[0])
    axis = axes[0] % len(extents)
    begin, end, _ = slice(begins[0], ends[0]).indices(extents[axis])
    return Part(axis, begin, end)


def _op_name(expr: relax.Expr) -> str:
    return str(getattr(getattr(expr, "op", None), "name", ""))


class _Hoist:
    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.bindings = [b for block in func.body.blocks for b in block.bindings]
        self.parts = self._read_parts()
        self.values: dict[relax.Var, relax.Expr] = {}
        self.sliced: dict[tuple[relax.Var, Part], relax.Var] = {}

    def _read_parts(self) -> dict[relax.Var, Part]:
        """Return the part that is computed, for each variable that need not be computed whole."""
        read: dict[relax.Var, Part | None] = {}
        parts: dict[relax.Var, Part] = {}

        def reads(expr: relax.Expr, part: Part | None) -> None:
            if isinstance(expr, relax.Tuple):
                for field in expr.fields:
                    reads(field, None)
            elif isinstance(expr, relax.TupleGetItem):
                reads(expr.tuple_value, None)
            elif isinstance(expr, relax.Var):
                known = part is not None and (expr not in read or read[expr] is not None)
                joined = read.get(expr, part)
                read[expr] = part.hull(joined) if known and part is not None else None

        reads(self.func.body.body, None)
        for binding in reversed(self.bindings):
            value, wanted = binding.value, read.get(binding.var)
            operands: list[Part | None] | None = None
            rule = RULES.get(_op_name(value))
            if wanted is not None and rule is not None:
                extent = shape_of(binding.var)[wanted.axis]
                if 2 * (wanted.end - wanted.begin) <= extent:
                    operands = rule(value, wanted)
                if operands is not None:
                    parts[binding.var] = wanted
            if operands is None and (cut := _slice_of(value)) is not None:
                operands = [cut]
            if not isinstance(value, relax.Call):
                reads(value, None)
                continue
            for i, arg in enumerate(value.args):
                reads(arg, operands[i] if operands is not None and i < len(operands) else None)
        return parts

    def run(self) -> relax.Function:
        """Return the function with what is read in part computed in part."""
        if not self.parts:
            return self.func
        self.bb = relax.BlockBuilder()
        params = [relax.Var(p.name, p.ty) for p in self.func.params]
        self.values.update(zip(self.func.params, params, strict=True))
        name = str(self.func.attrs["global_symbol"])
        with self.bb.function(name, params, attrs={"global_symbol": name}):
            with self.bb.dataflow():
                for binding in self.bindings:
                    self.values[binding.var] = self._binding(binding.var, binding.value)
                out = self.bb.emit_output(self._whole(self.func.body.body))
            self.bb.emit_func_output(out)
        return self.bb.get()[name]

    def _binding(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        part = self.parts.get(var)
        if part is not None:
            operands = RULES[_op_name(value)](value, part)
            assert operands is not None
            args = [self._part(arg, cut) for arg, cut in zip(value.args, operands, strict=True)]
            if _op_name(value) == "relax.reshape":
                shape = list(shape_of(var))
                shape[part.axis] = part.end - part.begin
                args[1] = relax.ShapeExpr(shape)
            return self.bb.emit(relax.Call(value.op, args, value.attrs), var.name)
        cut = _slice_of(value)
        if cut is not None and value.args[0] in self.parts:
            return self._part(value.args[0], cut)
        return self.bb.emit(self._whole(value), var.name)

    def _whole(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var):
            assert expr not in self.parts
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._whole(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._whole(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            return relax.Call(expr.op, [self._whole(arg) for arg in expr.args], expr.attrs)
        return expr

    def _part(self, expr: relax.Expr, part: Part | None) -> relax.Expr:
        """Return part of an operand; what has been computed in part holds it."""
        if part is None:
            return self._whole(expr)
        constant = constant_of(expr)
        if constant is not None:
            index = [slice(None)] * constant.ndim
            index[part.axis] = slice(part.begin, part.end)
            return relax.const(np.ascontiguousarray(constant[tuple(index)]))
        held = self.parts.get(expr)
        inner = part
        if held is not None:
            inner = Part(part.axis, part.begin - held.begin, part.end - held.begin)
            if part == held:
                return self.values[expr]
        if (expr, part) not in self.sliced:
            cut = relax.op.strided_slice(self.values[expr], [inner.axis], [inner.begin],
                                         [inner.end])
            self.sliced[expr, part] = self.bb.emit(cut)
        return self.sliced[expr, part]


@tvm.transform.module_pass(opt_level=0, name="vitq.HoistSlices")
class HoistSlices:
    """Compute of every tensor only the rows that something reads."""

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite every Relax function of the module."""
        result = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                result.update_func(gvar, _Hoist(func).run())
        return relax.transform.DeadCodeElimination()(result)
