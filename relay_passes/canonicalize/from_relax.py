"""Relax function -> :class:`~.graph.Graph`, with constants folded on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..errors import VitqError
from .fold import evaluate, fold
from .graph import Graph, Node
from .naming import SUPPORTED, digest, module_path, place
from .operators import HANDLERS, static_shape

__all__ = ["Importer", "from_relax"]

Value = Any  # Node, or a tuple of Values


class Importer:
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

    def make(
        self, op: str, inputs: Sequence[Node], shape: Sequence[int], dtype: str, **attrs: Any
    ) -> Node:
        """Make a node, or a constant if all operands are constant and numpy can compute it."""
        name = next((i.name for i in inputs if i.name), "")
        if inputs and all(i.is_const for i in inputs):
            folded = self._fold(op, inputs, {"shape": tuple(shape), "dtype": dtype, **attrs}, dtype)
            if folded is not None:
                folded.name = name
                return folded
        named = [i.name for i in inputs if i.is_const and i.name]
        return Node(op, inputs, shape, dtype, attrs, name=module_path(named[0]) if named else "")

    def _fold(
        self, op: str, inputs: Sequence[Node], attrs: dict[str, Any], dtype: str
    ) -> Node | None:
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
            raise VitqError(
                f"the model has {len(data)} inputs {names}; one image tensor is supported"
            )
        for param in func.params:
            if param.name in self.params:
                name, array = self.params[param.name]
                self.env[param] = self.graph.const(array, name)
            else:
                shape = static_shape(param, f"input {param.name!r}")
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
                raise VitqError(
                    f"the model returns {len(out)} tensors; one logits tensor is supported"
                )
            out = out[0]
        self.graph.output = out
        self.graph.prune()
        return self.graph

    @staticmethod
    def _name(value: Value, name: str) -> None:
        generic = name[:2] in ("lv", "gv") and (name[2:] or "0").isdigit()
        if isinstance(value, Node) and not generic and not value.is_const:
            value.label = name

    # -------------------------------------------------------------- calls
    def call(self, call: relax.Call) -> Value:
        """Import one call."""
        if not isinstance(call.op, tvm.ir.Op):
            raise VitqError(f"the model calls a function {call.op}; only operators are supported")
        name = call.op.name.removeprefix("relax.")
        handler = HANDLERS.get(name)
        if handler is not None:
            return handler(self, call)
        return self.generic(name, call)

    def _near(self, call: relax.Call) -> str:
        values = [self.value(a) for a in call.args if isinstance(a, relax.Var)]
        named = [v.name for v in values if isinstance(v, Node) and v.is_const and v.name]
        return (
            module_path(named[0])
            if named
            else next((place(v) for v in values if isinstance(v, Node)), "?")
        )

    def generic(self, name: str, call: relax.Call) -> Value:
        """Import a call that has no special form: one node, or a constant."""
        if not isinstance(call.ty, relax.TensorType):
            raise VitqError(
                f"operator {name} near {self._near(call)} is not supported; "
                f"supported are {SUPPORTED}"
            )
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
        shape = static_shape(call, f"operator {name}")
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
    return Importer(mod, params, constants or {}).run()
