"""Proof that everything between the float boundary's two sides is integer.

Two checks. :func:`check_integer_only` walks the integer dialect: a float tensor may exist only
before ``vitq.quantize`` (the input, possibly moved by layout operators) and after
``vitq.dequantize`` (the logits), and a logit may not flow back. :func:`check_integer_only_tir`
walks the legalised module: besides the same flow, every PrimFunc that is not the boundary itself
must be free of float buffers, loads, casts, immediates and arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx

from relay_passes.dialect.registry import constant_of
from relay_passes.errors import VitqError

__all__ = [
    "LAYOUT_OPS",
    "check_integer_only",
    "check_integer_only_tir",
    "check_primfuncs",
    "float_nodes",
    "reachable",
]

LAYOUT_OPS = frozenset(
    f"relax.{name}"
    for name in (
        "broadcast_to",
        "concat",
        "expand_dims",
        "flatten",
        "permute_dims",
        "reshape",
        "split",
        "squeeze",
        "strided_slice",
        "take",
    )
)
"""Stock operators that move elements and compute nothing."""

_BOUNDARY = ("vitq.quantize", "vitq.dequantize")
_ENTRIES = ("main", "main_codes")
# What a PrimFunc that only moves floats consists of.
_MOVES = frozenset({"Buffer", "BufferType", "PrimType", "TensorLoad", "Var"})


def check_integer_only(mod: tvm.IRModule) -> dict[str, Any]:
    """Check that a module of the integer dialect has no float between its boundary's sides.

    Parameters
    ----------
    mod : tvm.IRModule
        Integer dialect, fused or not, before or after legalisation; functions reachable from
        ``main`` and ``main_codes`` are checked.

    Returns
    -------
    dict
        ``integer_only`` (True), ``bindings``, ``integer_tensors``, ``float_tensors`` (counts),
        ``boundary`` (list of ``binding: operator``) and ``dtypes`` (dtype to number of tensors).

    Raises
    ------
    VitqError
        Naming the first binding that holds or makes a float it may not.
    """
    walk = _FlowWalk(mod)
    for name, func in reachable(mod).items():
        walk.function(name, func)
    dtypes = walk.dtypes
    floats = sum(count for dtype, count in dtypes.items() if "float" in dtype)
    return {
        "integer_only": True,
        "bindings": walk.bindings,
        "integer_tensors": sum(dtypes.values()) - floats,
        "float_tensors": floats,
        "boundary": walk.boundary,
        "dtypes": dict(sorted(dtypes.items())),
    }


def check_primfuncs(mod: tvm.IRModule) -> dict[str, Any]:
    """Check a legalised module: the flow between kernels, and the inside of every PrimFunc.

    Returns
    -------
    dict
        The report of :func:`check_integer_only`, and ``primfuncs``, ``integer_primfuncs`` (counts),
        ``boundary_primfuncs`` (names).

    Raises
    ------
    VitqError
        Naming the first PrimFunc with a float in it, or the first binding as above.
    """
    report = check_integer_only(mod)
    funcs = {v.name_hint: f for v, f in mod.functions.items() if isinstance(f, tirx.PrimFunc)}
    kinds = Counter(_primfunc_kind(name, func) for name, func in funcs.items())
    report["primfuncs"] = len(funcs)
    report["integer_primfuncs"] = kinds["integer"]
    report["boundary_primfuncs"] = sorted(n for n, f in funcs.items() if _tag(f) in _BOUNDARY)
    return report


def check_integer_only_tir() -> tvm.transform.Pass:
    """Return a pass that runs :func:`check_primfuncs` and leaves the module as it is."""

    @tvm.transform.module_pass(opt_level=0, name="vitq.CheckIntegerOnly")
    def _check(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        check_primfuncs(mod)
        return mod

    return _check


def reachable(mod: tvm.IRModule) -> dict[str, relax.Function]:
    """Return the Relax functions that ``main`` and ``main_codes`` call, themselves included."""
    table = {v.name_hint: f for v, f in mod.functions.items() if isinstance(f, relax.Function)}
    found: dict[str, relax.Function] = {}
    pending = [name for name in _ENTRIES if name in table]
    if not pending:
        raise VitqError(f"the module has no function main; it has {', '.join(table) or 'none'}")
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found[name] = table[name]
        for block in table[name].body.blocks:
            for binding in block.bindings:
                op = getattr(binding.value, "op", None)
                if isinstance(op, tvm.ir.GlobalVar) and op.name_hint in table:
                    pending.append(op.name_hint)
    return found


def float_nodes(func: tirx.PrimFunc) -> Iterator[Any]:
    """Yield every expression, buffer and immediate of a PrimFunc whose dtype is a float."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        ty = node if isinstance(node, tvm.ir.PrimType) else getattr(node, "ty", None)
        if "float" in str(getattr(ty, "dtype", "")):
            found.append(node)

    tvm_ffi.structural_walk(func, (object, visit))
    yield from found


class _FlowWalk:
    """Follow floats through the bindings: ``input`` -> quantize, dequantize -> ``output``."""

    def __init__(self, mod: tvm.IRModule) -> None:
        self.mod = mod
        self.bindings = 0
        self.boundary: list[str] = []
        self.dtypes: Counter[str] = Counter()
        self.kinds: dict[str, str] = {}

    def function(self, name: str, func: relax.Function) -> None:
        """Check one Relax function."""
        state: dict[relax.Var, Any] = {}
        for param in func.params:
            state[param] = "input" if _is_float(param.ty) else "integer"
            self.dtypes[str(param.ty.dtype)] += 1
        for block in func.body.blocks:
            for binding in block.bindings:
                where = f"{name}.{binding.var.name}" if name != "main" else binding.var.name
                result = self._binding(where, binding.value, state)
                state[binding.var] = result
                self.bindings += 1
                if isinstance(binding.value, relax.Call):
                    self._count(where, binding.var.ty, result)

    def _count(self, where: str, ty: relax.Type, result: Any) -> None:
        for field in ty.fields if isinstance(ty, relax.TupleType) else [ty]:
            self.dtypes[str(field.dtype)] += 1
            if _is_float(field) and result == "integer":
                raise VitqError(
                    f"{where}: makes a {field.dtype} tensor inside the integer part; only "
                    "vitq.dequantize of the logits may"
                )

    def _binding(self, where: str, expr: relax.Expr, state: dict[relax.Var, Any]) -> Any:
        if not isinstance(expr, relax.Call):
            return self._state(where, expr, state)
        name, kind, operands = self._call(where, expr)
        states = [self._state(where, operand, state) for operand in operands]
        flat = {s for group in states for s in (group if isinstance(group, tuple) else (group,))}
        flat.discard(None)
        if kind == "quantize":
            if flat != {"input"}:
                raise VitqError(f"{where}: {name} takes a tensor that is not the network's input")
            self.boundary.append(f"{where}: {name}")
            return "integer"
        if kind == "layout":
            if len(flat) > 1:
                raise VitqError(f"{where}: {name} mixes float and integer tensors")
            return flat.pop() if flat else "integer"
        if kind == "call":
            return "output" if _is_float(expr.ty) else "integer"
        if flat - {"integer"}:
            raise VitqError(f"{where}: {name} takes a float tensor; it has no integer form here")
        if kind == "dequantize":
            self.boundary.append(f"{where}: {name}")
            return "output"
        return "integer"

    def _call(self, where: str, call: relax.Call) -> tuple[str, str, list[relax.Expr]]:
        """Return (operator's name, kind, tensor operands)."""
        if isinstance(call.op, tvm.ir.GlobalVar):
            return call.op.name_hint, "call", list(call.args)
        if not isinstance(call.op, tvm.ir.Op):
            raise VitqError(f"{where}: calls {call.op}, which cannot be checked")
        name = str(call.op.name)
        if name == "relax.call_tir":
            callee = call.args[0].name_hint
            if callee not in self.kinds:
                func = self.mod[callee]
                self.kinds[callee] = _primfunc_kind(callee, func)
            return callee, self.kinds[callee], [call.args[1]]
        if name in _BOUNDARY:
            return name, name.removeprefix("vitq."), list(call.args)
        return name, "layout" if name in LAYOUT_OPS else "integer", list(call.args)

    def _state(self, where: str, expr: relax.Expr, state: dict[relax.Var, Any]) -> Any:
        if isinstance(expr, relax.Var):
            return state[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self._state(where, field, state) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            group = self._state(where, expr.tuple_value, state)
            return group[expr.index] if isinstance(group, tuple) else group
        if isinstance(expr, tvm.ir.GenericConst):
            constant = constant_of(expr)
            if constant is not None and np.issubdtype(constant.dtype, np.floating):
                raise VitqError(f"{where}: has a float constant of shape {list(constant.shape)}")
            return "integer"
        return None  # a shape, an index


def _is_float(ty: Any) -> bool:
    return "float" in str(getattr(ty, "dtype", ""))


def _tag(func: tirx.PrimFunc) -> str:
    return str((func.attrs or {}).get("vitq.op", ""))


def _primfunc_kind(name: str, func: tirx.PrimFunc) -> str:
    """Return quantize, dequantize, integer or layout (moves floats only); refuse the rest."""
    tag = _tag(func)
    if tag in _BOUNDARY:
        return tag.removeprefix("vitq.")
    nodes = list(float_nodes(func))
    if not nodes:
        return "integer"
    moves = [type(node).__name__ in _MOVES for node in nodes]
    if all(moves) and not tag:
        return "layout"
    node = nodes[moves.index(False)] if not all(moves) else nodes[0]
    dtype = node.dtype if isinstance(node, tvm.ir.PrimType) else node.ty.dtype
    raise VitqError(
        f"{name} ({tag or 'no vitq operator'}): has {type(node).__name__} of dtype {dtype} in an "
        "integer kernel; give its operator an integer definition"
    )
