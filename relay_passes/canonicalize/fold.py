"""Constant folding in numpy, so that a constant's bits don't depend on who exported the model.

Operators numpy does not cover here are evaluated by a compiled Relax function (:func:`evaluate`);
they are rare: an interpolated position embedding, for example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from .graph import Graph, Node, Rule

__all__ = ["BINARY", "RULES", "UNARY", "evaluate", "fold", "run_prim_func"]

BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": lambda a, b: np.divide(a, b) if a.dtype.kind == "f" else (a // b).astype(a.dtype),
    "floor_divide": np.floor_divide,
    "mod": np.mod,
    "floor_mod": np.mod,
    "power": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
}
UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "negative": np.negative,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "log": np.log,
    "abs": np.abs,
    "tanh": np.tanh,
    "nn.relu": lambda a: np.maximum(a, 0),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "floor": np.floor,
    "ceil": np.ceil,
    "logical_not": np.logical_not,
}


def fold(op: str, arrays: Sequence[np.ndarray], attrs: dict[str, Any]) -> np.ndarray | None:
    """Compute a node whose operands are all constant; None if numpy does not cover ``op`` here."""
    if op in BINARY:
        return np.asarray(BINARY[op](*arrays))
    if op in UNARY:
        return np.asarray(UNARY[op](arrays[0]))
    if op == "reshape":
        return arrays[0].reshape(attrs["shape"])
    if op == "broadcast_to":
        return np.broadcast_to(arrays[0], attrs["shape"])
    if op == "permute":
        return arrays[0].transpose(attrs["axes"])
    if op == "slice":
        index = [slice(None)] * arrays[0].ndim
        index[attrs["axis"]] = slice(attrs["begin"], attrs["end"], attrs.get("step", 1))
        return arrays[0][tuple(index)]
    if op == "concat":
        return np.concatenate(list(arrays), axis=attrs["axis"])
    if op == "take":
        return np.take(arrays[0], arrays[1], axis=attrs["axis"])
    if op == "matmul":
        return np.matmul(
            arrays[0], np.swapaxes(arrays[1], -1, -2) if attrs.get("transpose_b") else arrays[1]
        )
    if op == "linear":
        return np.matmul(arrays[0], arrays[1]) + (arrays[2] if len(arrays) == 3 else 0)
    if op == "where":
        return np.where(*arrays)
    if op == "astype":
        return arrays[0].astype(attrs["dtype"])
    return None


def _fold_constants(graph: Graph, node: Node) -> Node | None:
    if any(not i.is_const for i in node.inputs):
        return None
    attrs = {**node.attrs, "shape": node.shape, "dtype": node.dtype}
    array = fold(node.op, [i.array for i in node.inputs], attrs)
    if array is None:
        return None
    out = graph.const(array.astype(node.dtype, copy=False), node.name)
    source = node.inputs[0]
    if source.quant is not None and node.op in ("reshape", "permute", "slice"):
        codes, scales = (fold(node.op, [part], attrs) for part in source.quant)
        out.quant = (codes, scales)  # type: ignore[assignment]
    return out


_FOLDED = (
    *BINARY,
    *UNARY,
    "reshape",
    "broadcast_to",
    "permute",
    "slice",
    "concat",
    "take",
    "matmul",
    "linear",
)
RULES = (Rule("fold", _FOLDED, _fold_constants, "what depends on constants only is a constant"),)


def evaluate(
    operands: Sequence[np.ndarray], rebuild: Callable[[Sequence[relax.Expr]], relax.Expr]
) -> np.ndarray:
    """Evaluate one Relax call on constants with TVM's own kernels.

    Parameters
    ----------
    operands : sequence of numpy.ndarray
        Values of the call's tensor operands.
    rebuild : callable
        Makes the call from Relax expressions for the operands.
    """
    builder = relax.BlockBuilder()
    params = [
        relax.Var(f"c{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(operands)
    ]
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(builder.normalize(rebuild(params)))
        builder.emit_func_output(out)
    machine = relax.VirtualMachine(tvm.compile(builder.get(), target="llvm"), tvm.cpu())
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in operands]
    return machine["main"](*tensors).numpy()


def run_prim_func(func: tvm.tirx.PrimFunc, x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Run a PrimFunc with one input and one output of the given shape."""
    kernel = tvm.compile(
        tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target="llvm"
    )
    out = tvm.runtime.tensor(np.zeros(shape, x.dtype))
    kernel["main"](tvm.runtime.tensor(x), out)
    return out.numpy()
