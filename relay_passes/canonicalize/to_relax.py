""":class:`~.graph.Graph` -> Relax, with bindings named after the model's modules."""

from __future__ import annotations

import re

import numpy as np
import tvm
from tvm import relax

from .graph import Graph, Node

__all__ = ["to_relax"]


def _constant(node: Node) -> relax.Expr:
    array = node.array
    if array.dtype == np.float64:
        array = array.astype("float32")
    return relax.const(array.copy(order="C"), str(array.dtype))


def _weight(node: Node) -> relax.Expr:
    """Float constant [K, N], or the int8 codes it came with under a dequantize."""
    if node.quant is None or not (node.quant[1] == node.quant[1][:1]).all():
        return _constant(node)
    codes, scales = node.quant
    return relax.op.dequantize(
        relax.const(np.ascontiguousarray(codes, dtype="int8")),
        relax.const(np.ascontiguousarray(scales[0], dtype="float32")),
        relax.const(np.int8(0)),
        axis=1,
        out_dtype="float32",
    )


def _label(node: Node) -> str:
    """Name of the binding: the module's path and, for other than its own output, a role."""
    if node.label:
        return node.label
    path = node.name
    parent = path.rpartition(".")[0]
    role = {
        "gelu": f"{path}.gelu",
        "gelu_tanh": f"{path}.gelu",
        "matmul": f"{parent}.product",
        "multiply": f"{parent}.logits",
        "softmax": f"{parent}.softmax",
        "mean": f"{path}.mean",
        "add": f"{path}.add",
        "linear": path,
        "layer_norm": path,
    }.get(node.op)
    if not path or role is None:
        return ""
    return re.sub(r"\W+", "_", role).strip("_")


def _emit(builder: relax.BlockBuilder, node: Node, args: list[relax.Expr]) -> relax.Expr:
    op, attrs = node.op, node.attrs
    if op == "reshape":
        return relax.op.reshape(args[0], node.shape)
    if op == "permute":
        return relax.op.permute_dims(args[0], list(attrs["axes"]))
    if op == "slice":
        return relax.op.strided_slice(
            args[0], [attrs["axis"]], [attrs["begin"]], [attrs["end"]], [1]
        )
    if op == "concat":
        return relax.op.concat(args, axis=attrs["axis"])
    if op == "take":
        return relax.op.take(args[0], args[1], axis=attrs["axis"])
    if op == "linear":
        weight = _weight(node.inputs[1])
        if isinstance(weight, relax.Call):
            weight = builder.emit(weight)
        product = relax.op.matmul(args[0], weight)
        return relax.op.add(builder.emit(product), args[2]) if len(args) == 3 else product
    if op == "matmul":
        b = args[1]
        if attrs["transpose_b"]:
            rank = len(node.inputs[1].shape)
            b = builder.emit(relax.op.permute_dims(b, [*range(rank - 2), rank - 1, rank - 2]))
        return relax.op.matmul(args[0], b)
    if op == "layer_norm":
        return relax.op.nn.layer_norm(*args, axes=[-1], epsilon=attrs["epsilon"])
    if op == "softmax":
        return relax.op.nn.softmax(args[0], axis=-1)
    if op == "mean":
        return relax.op.mean(args[0], axis=[attrs["axis"]], keepdims=False)
    if op == "qdq":
        scale = relax.const(np.float32(attrs["scale"]))
        zero_point = relax.const(np.array(attrs["zero_point"], attrs["dtype"]))
        codes = relax.op.quantize(args[0], scale, zero_point, axis=-1, out_dtype=attrs["dtype"])
        return relax.op.dequantize(
            builder.emit(codes), scale, zero_point, axis=-1, out_dtype="float32"
        )
    if op == "pixels":
        zero = relax.const(np.uint8(0))
        return relax.op.dequantize(
            args[0], relax.const(np.float32(1)), zero, axis=-1, out_dtype="float32"
        )
    simple = {
        "add": relax.op.add,
        "multiply": relax.op.multiply,
        "gelu": relax.op.nn.gelu,
        "gelu_tanh": relax.op.nn.gelu_tanh,
    }
    return simple[op](*args)


def to_relax(graph: Graph) -> tvm.IRModule:
    """Write a canonical graph as a module with the one function ``main(x)``.

    Every constant is inline; binding names are the model's module paths with ``_`` for ``.``.
    """
    assert graph.input is not None
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(graph.input.shape, graph.input.dtype))
    env: dict[int, relax.Expr] = {id(graph.input): x}
    used: set[str] = set()
    nodes = [n for n in graph.nodes() if not n.is_const and n.op != "input"]
    with builder.function("main", [x]):
        with builder.dataflow():
            for node in nodes:
                args = [
                    env[id(i)] if id(i) in env else _constant(i)
                    for i in node.inputs
                    if not (node.op == "linear" and i is node.inputs[1])
                ]
                if node.op == "linear":
                    args.insert(1, args[0])
                value = _emit(builder, node, args)
                label = _label(node)
                label = "" if label in used else label
                used.add(label)
                last = node is nodes[-1]
                emit = builder.emit_output if last else builder.emit
                env[id(node)] = emit(value, name_hint=label) if label else emit(value)
        builder.emit_func_output(env[id(graph.output)])
    return builder.get()
