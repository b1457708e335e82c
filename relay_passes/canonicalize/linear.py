"""Rules that turn every product with a constant into ``linear(x, W [K, N], b [N])``."""

from __future__ import annotations

import numpy as np

from ..errors import VitqError
from .graph import Graph, Node, Rule
from .layout import trace_chain
from .naming import module_path, place

__all__ = ["RULES", "scaled_weight"]

_F32 = np.float32


def _f32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=_F32)


def scaled_weight(graph: Graph, weight: Node, factor: np.ndarray) -> Node:
    """Return ``weight * factor`` ([N] or scalar), rounded once; integer codes keep their values."""
    out = graph.const(_f32(weight.array.astype("float64") * factor), weight.name)
    if weight.quant is not None:
        codes, scales = weight.quant
        sign = np.where(np.asarray(factor) < 0, -1, 1)
        out.quant = ((codes * sign).astype(codes.dtype), scales * np.abs(factor))
    return out


def _sliced(graph: Graph, node: Node, axis: int, begin: int, end: int) -> Node:
    index = tuple([slice(None)] * axis + [slice(begin, end)])
    out = graph.const(np.ascontiguousarray(node.array[index]), node.name)
    if node.quant is not None:
        out.quant = (node.quant[0][index], node.quant[1][index])
    return out


def _matmul_to_linear(graph: Graph, node: Node) -> Node | None:
    a, b = node.inputs
    if not b.is_const or a.is_const or node.attrs["transpose_b"] or len(b.shape) < 2:
        return None
    stack = b.array.reshape(-1, *b.shape[-2:])
    if not (stack == stack[:1]).all():
        return None
    weight = graph.const(stack[0], b.name)
    if b.quant is not None:
        weight.quant = tuple(q.reshape(stack.shape)[0] for q in b.quant)  # type: ignore[assignment]
    return graph.reshape(graph.linear(a, weight, name=module_path(b.name)), node.shape)


def _optional(node: Node, i: int) -> Node | None:
    return node.inputs[i] if len(node.inputs) > i else None


def _vector(const: Node, n: int) -> np.ndarray | None:
    """Read a constant that varies only along the last axis as a vector [n]."""
    if const.size == 1:
        return np.broadcast_to(const.array.reshape(-1), (n,))
    if const.shape[-1] == n and const.size == n:
        return const.array.reshape(n)
    return None


def _operands(node: Node, op: str) -> tuple[Node, Node] | None:
    """Split a commutative node into (operand that is ``op``, constant)."""
    for x, c in (node.inputs, node.inputs[::-1]):
        if x.op == op and c.is_const and not x.is_const:
            return x, c
    return None


def _bias(graph: Graph, node: Node) -> Node | None:
    found = _operands(node, "linear")
    if found is None:
        return None
    x, c = found
    vector = _vector(c, x.shape[-1])
    if vector is None or x.only_user() is not node or node.shape != x.shape:
        return None
    if len(x.inputs) == 3:
        vector = vector.astype("float64") + x.inputs[2].array
    bias = graph.const(_f32(vector), c.name)
    return graph.linear(x.inputs[0], x.inputs[1], bias, name=x.name)


def _bias_through_layout(graph: Graph, node: Node) -> Node | None:
    """A convolution's bias is added per channel before the channels move last."""
    for x, c in (node.inputs, node.inputs[::-1]):
        if x.op not in ("reshape", "permute") or not c.is_const or node.shape != x.shape:
            continue
        source, _, steps = trace_chain(x)
        if source.op != "linear" or len(source.inputs) == 3 or c.size > source.shape[-1]:
            continue
        if len(x.users) > 1 or any(len(n.users) > 1 for n in [source, *steps]):
            continue
        array = np.broadcast_to(c.array, x.shape)
        for step in reversed(steps):
            before = step.inputs[0].shape
            if step.op == "permute":
                array = array.transpose(np.argsort(step.attrs["axes"]))
            else:
                array = array.reshape(before)
        rows = array.reshape(-1, source.shape[-1])
        if not (rows == rows[:1]).all():
            continue
        bias = graph.const(_f32(rows[0]), c.name)
        out = graph.linear(source.inputs[0], source.inputs[1], bias, name=source.name)
        for step in steps:
            out = (
                graph.permute(out, step.attrs["axes"])
                if step.op == "permute"
                else graph.reshape(out, step.shape)
            )
        return out
    return None


def _feeds_product(node: Node) -> bool:
    """Whether every consumer beyond layouts is a product of two activations."""
    users = list(node.users)
    while users:
        user = users.pop()
        if user.op in ("reshape", "permute", "slice", "multiply", "divide"):
            users.extend(user.users)
        elif user.op != "matmul":
            return False
    return True


def _scale(graph: Graph, node: Node) -> Node | None:
    found = _operands(node, "linear")
    if found is None:
        return None
    x, c = found
    vector = _vector(c, x.shape[-1])
    if vector is None or x.only_user() is not node or node.shape != x.shape:
        return None
    if c.size == 1 and _feeds_product(node):
        return None
    vector = vector.astype("float64")
    bias = None
    if len(x.inputs) == 3:
        bias = graph.const(_f32(x.inputs[2].array * vector), x.inputs[2].name)
    return graph.linear(x.inputs[0], scaled_weight(graph, x.inputs[1], vector), bias, name=x.name)


def _scaled_input(graph: Graph, node: Node) -> Node | None:
    x, weight = node.inputs[:2]
    if x.op != "multiply":
        return None
    for inner, c in (x.inputs, x.inputs[::-1]):
        if c.is_const and c.size == 1 and not inner.is_const:
            scaled = scaled_weight(graph, weight, c.array.astype("float64").reshape(()))
            return graph.linear(inner, scaled, _optional(node, 2), name=node.name)
    return None


def _split(graph: Graph, node: Node) -> Node | None:
    """A slice of a linear's features is a smaller linear: the fused q, k, v come apart."""
    x = node.inputs[0]
    if x.op != "linear" or node.attrs["axis"] != len(x.shape) - 1:
        return None
    begin, end = node.attrs["begin"], node.attrs["end"]
    weight = _sliced(graph, x.inputs[1], 1, begin, end)
    bias = _sliced(graph, x.inputs[2], 0, begin, end) if len(x.inputs) == 3 else None
    return graph.linear(x.inputs[0], weight, bias, name=_part_name(x, begin, end))


def _part_name(x: Node, begin: int, end: int) -> str:
    size = end - begin
    if x.shape[-1] == 3 * size and begin % size == 0 and x.name.endswith("qkv"):
        return f"{x.name[:-3]}{'qkv'[begin // size]}"
    return f"{x.name}[{begin}:{end}]" if x.name else ""


def _sum_of_linears(graph: Graph, node: Node) -> Node | None:
    a, b = node.inputs
    if a.op != "linear" or b.op != "linear" or a is b or a.shape != b.shape:
        return None
    if a.only_user() is not node or b.only_user() is not node:
        return None
    x = graph.concat([a.inputs[0], b.inputs[0]], len(a.shape) - 1)
    weight = graph.const(np.concatenate([a.inputs[1].array, b.inputs[1].array]), a.inputs[1].name)
    biases = [n.inputs[2].array.astype("float64") for n in (a, b) if len(n.inputs) == 3]
    bias = graph.const(_f32(np.sum(biases, axis=0)), a.name) if biases else None
    return graph.linear(x, weight, bias, name=a.name)


def _patch_embedding(graph: Graph, node: Node) -> Node | None:
    x, kernel = node.inputs
    attrs = node.attrs
    out_c, in_c, kh, kw = kernel.shape
    where = place(node)
    if not kernel.is_const:
        raise VitqError(f"conv2d near {where} has a kernel that is not constant; not supported")
    if list(attrs["strides"]) != [kh, kw] or any(attrs["padding"]) or attrs["groups"] != 1:
        raise VitqError(
            f"conv2d near {where} (kernel {kh}x{kw}, stride {list(attrs['strides'])}, padding "
            f"{list(attrs['padding'])}, groups {attrs['groups']}) is not supported: only patch "
            "embeddings, stride = kernel without padding"
        )
    if list(attrs["dilation"]) != [1, 1] or attrs["data_layout"] != "NCHW":
        raise VitqError(
            f"conv2d near {where} with dilation or layout {attrs['data_layout']} is not supported"
        )
    batch, _, height, width = x.shape
    gh, gw = height // kh, width // kw
    x = graph.slice(graph.slice(x, 2, 0, gh * kh), 3, 0, gw * kw)
    patches = graph.reshape(x, [batch, in_c, gh, kh, gw, kw])
    patches = graph.permute(patches, [0, 2, 4, 1, 3, 5])
    patches = graph.reshape(patches, [batch, gh, gw, in_c * kh * kw])
    weight = graph.const(np.ascontiguousarray(kernel.array.reshape(out_c, -1).T), kernel.name)
    if kernel.quant is not None:
        weight.quant = tuple(q.reshape(out_c, -1).T for q in kernel.quant)  # type: ignore[assignment]
    return graph.permute(graph.linear(patches, weight, name=module_path(kernel.name)), [0, 3, 1, 2])


# ---------------------------------------------------------------- rows
def _with_rows(graph: Graph, linear: Node, x: Node) -> Node:
    return graph.linear(x, linear.inputs[1], _optional(linear, 2), name=linear.name)


def _rows_above(graph: Graph, node: Node) -> Node | None:
    """Layouts of a linear's rows move above it: it then sits next to the add it feeds."""
    x = node.inputs[0]
    if x.op != "linear" or x.only_user() is not node:
        return None
    rank, n = len(x.shape), x.shape[-1]
    if node.op == "permute":
        axes = node.attrs["axes"]
        if axes[-1] != rank - 1:
            return None
        return _with_rows(graph, x, graph.permute(x.inputs[0], axes))
    if node.op == "slice":
        if node.attrs["axis"] == rank - 1:
            return None
        a = node.attrs
        return _with_rows(graph, x, graph.slice(x.inputs[0], a["axis"], a["begin"], a["end"]))
    size, split = 1, len(node.shape)
    while split > 0 and size < n:
        split -= 1
        size *= node.shape[split]
    if size != n:
        return None
    rows = node.shape[:split]
    if rows == x.shape[:-1]:
        return None
    k = x.inputs[0].shape[-1]
    return graph.reshape(_with_rows(graph, x, graph.reshape(x.inputs[0], [*rows, k])), node.shape)


def _roll_above(graph: Graph, node: Node) -> Node | None:
    """A roll (concat of row slices of one linear) moves above the linear."""
    first = node.inputs[0]
    if any(p.op != "slice" or p.inputs[0] is not first.inputs[0] for p in node.inputs):
        return None
    x = first.inputs[0]
    axis = node.attrs["axis"]
    if x.op != "linear" or axis == len(x.shape) - 1 or len(x.users) != len(node.inputs):
        return None
    if any(p.attrs["axis"] != axis for p in node.inputs):
        return None
    source = x.inputs[0]
    parts = [graph.slice(source, axis, p.attrs["begin"], p.attrs["end"]) for p in node.inputs]
    return _with_rows(graph, x, graph.concat(parts, axis))


RULES = (
    Rule(
        "patch-embedding",
        ("nn.conv2d",),
        _patch_embedding,
        "stride = kernel is a matmul of patches",
    ),
    Rule("linear", ("matmul",), _matmul_to_linear, "a constant operand makes it a linear layer"),
    Rule("bias", ("add",), _bias, "the bias belongs to the linear"),
    Rule("bias-layout", ("add",), _bias_through_layout, "a convolution's bias, too"),
    Rule("scale", ("multiply",), _scale, "LayerScale folds into weight and bias"),
    Rule("scaled-input", ("linear",), _scaled_input, "a scalar on the input folds into the weight"),
    Rule("split", ("slice",), _split, "q, k and v get a linear (and scales) of their own"),
    Rule("sum", ("add",), _sum_of_linears, "two heads averaged are one linear over both tokens"),
    Rule("rows-above", ("reshape", "permute", "slice"), _rows_above, "linear next to its add"),
    Rule("roll-above", ("concat",), _roll_above, "linear next to its add"),
)
