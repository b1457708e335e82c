"""Expressions of TE definitions, taken over into a kernel.

A kernel that fuses an operator does not write its arithmetic a second time: it takes the stages of
the operator's PrimFunc (:func:`stages_of`) and rebuilds their expressions (:class:`Expressions`)
with its own registers in place of the tensors that the stages load from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import tirx

from schedules.apply import blocks_of

__all__ = ["Expressions", "TeStage", "loads_of", "stages_of", "substitute"]

Read = Callable[[Any, Callable[[Any], Any]], Any]
"""Gives the value of a TensorLoad node; the second argument rebuilds an expression (an index)."""

_LEAVES = ("IntImm", "FloatImm", "Var", "StringImm")


@dataclass(frozen=True)
class TeStage:
    """One stage of an unscheduled PrimFunc.

    Parameters
    ----------
    name
        Of its block.
    buffer
        What it stores.
    axes, reduced
        Variables of its spatial and of its reduction axes.
    value
        The element; of a reduction, what each step adds or compares.
    kind
        ``"map"``, or the class of the reducing node: ``"Add"``, ``"Max"``, ``"Min"``.
    """

    name: str
    buffer: Any
    axes: tuple[Any, ...]
    reduced: tuple[Any, ...]
    value: Any
    kind: str


def stages_of(func: tirx.PrimFunc) -> list[TeStage]:
    """Return the stages of an unscheduled PrimFunc in order.

    Raises
    ------
    ValueError
        If a block is not a single store of a TE stage.
    """
    found = []
    for block in blocks_of(func.body):
        if not block.iter_vars:
            continue
        store = block.body
        if not isinstance(store, tirx.BufferStore):
            raise ValueError(f"block {block.name_hint} is no stage of a TE definition")
        axes = tuple(v.var for v in block.iter_vars if int(v.iter_type) == 0)
        reduced = tuple(v.var for v in block.iter_vars if int(v.iter_type) == 2)
        value, kind = store.value, "map"
        if reduced:
            value, kind = store.value.b, type(store.value).__name__
        found.append(TeStage(block.name_hint, store.buffer, axes, reduced, value, kind))
    return found


def loads_of(expr: Any) -> list[Any]:
    """Return the TensorLoad nodes of an expression, in the indices of others too."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if type(node).__name__ == "TensorLoad":
            found.append(node)

    tvm_ffi.structural_walk(expr, (object, visit))
    return found


class Expressions:
    """Rebuilds expressions for one place of a kernel.

    Equal parts are computed once: every step is bound, in the scope that is open when :meth:`code`
    is called, except in the arms of a choice, which may be guarded. A step of bound values is equal
    to another if its node is, so a definition that is a tree of thousands of nodes, where its
    author wrote a name several times, is as few steps as he meant.

    Parameters
    ----------
    writer
        Where steps are bound; None: nothing is bound.
    axes
        Values of the definition's variables.
    read
        Gives the value of a load, from the node and a function that rebuilds its indices.
    """

    def __init__(self, writer: Any, axes: Mapping[Any, Any], read: Read) -> None:
        self.w = writer
        self.axes = axes
        self.read = read
        self.done: dict[Any, Any] = {}
        self.steps: dict[int, list[tuple[Any, Any]]] = {}
        self.guarded = False

    def code(self, expr: Any) -> Any:
        """Return an expression with loads and variables replaced."""
        if expr in self.axes:
            return self.axes[expr]
        kind = type(expr).__name__
        if kind in _LEAVES:
            return expr
        if expr in self.done:
            return self.done[expr]
        value = self._rebuilt(expr, kind)
        if self.guarded or self.w is None:
            return value
        if type(value).__name__ not in _LEAVES:
            value = self._bound(value)
        self.done[expr] = value
        return value

    def _bound(self, value: Any) -> Any:
        same = self.steps.setdefault(tvm_ffi.structural_hash(value), [])
        for step, var in same:
            if tvm_ffi.structural_equal(step, value):
                return var
        same.append((value, self.w.bind("v", value)))
        return same[-1][1]

    def _rebuilt(self, expr: Any, kind: str) -> Any:
        if kind == "TensorLoad":
            return self.read(expr, self.code)
        if kind == "Cast":
            return tirx.Cast(str(expr.ty.dtype), self.code(expr.value))
        if kind == "Select":
            return tirx.Select(self.code(expr.condition), self._arm(expr.true_value),
                               self._arm(expr.false_value))
        if kind == "Not":
            return tirx.Not(self.code(expr.a))
        if kind == "Call" and expr.op.name == "tirx.if_then_else":
            condition, yes, no = expr.args
            return tirx.if_then_else(self.code(condition), self._arm(yes), self._arm(no))
        if kind == "Call":
            args = [self.code(arg) for arg in expr.args]
            return type(expr)(expr.op, args, expr.attrs, ret_ty=expr.ty)
        a, b = self.code(expr.a), self.code(expr.b)
        if kind == "FloorDiv" and not isinstance(b, tirx.IntImm) and self.w is not None:
            return self._quotient(a, b)
        return type(expr)(a, b)

    def _quotient(self, a: Any, b: Any) -> Any:
        """Return the floor of a quotient by a positive number, without float instructions."""
        if str(a.ty.dtype) != "int32":
            raise ValueError(f"a division of {a.ty.dtype}; only int32 is divided on a GPU")
        return self.w.value("vitq_divide", a, b)

    def _arm(self, expr: Any) -> Any:
        before, self.guarded = self.guarded, True
        try:
            return self.code(expr)
        finally:
            self.guarded = before


def substitute(
    expr: Any, buffers: Mapping[Any, Callable[[list[Any]], Any]], axes: Mapping[Any, Any],
    writer: Any = None,
) -> Any:
    """Return ``expr`` with loads of some buffers and some variables replaced.

    Parameters
    ----------
    buffers
        Buffer -> function of the rebuilt indices; loads of other buffers stay.
    axes
        Variable -> expression.
    writer
        Where shared steps are bound, if anywhere.
    """

    def read(node: Any, code: Callable[[Any], Any]) -> Any:
        indices = [code(index) for index in node.indices]
        if node.source in buffers:
            return buffers[node.source](indices)
        return tirx.BufferLoad(node.source, indices)

    return Expressions(writer, axes, read).code(expr)
