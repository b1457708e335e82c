"""Rules for tokens: class token, registers, position embedding, pooling."""

from __future__ import annotations

import math

from .graph import Graph, Node, Rule

__all__ = ["RULES"]


def _add_through_concat(graph: Graph, node: Node) -> Node | None:
    """The position embedding goes into the constant tokens and onto the patches."""
    for x, c in (node.inputs, node.inputs[::-1]):
        if x.op != "concat" or not c.is_const or not any(p.is_const for p in x.inputs):
            continue
        if node.shape != x.shape or x.only_user() is not node:
            continue
        axis = x.attrs["axis"]
        array = c.array.reshape((1,) * (len(x.shape) - len(c.shape)) + c.shape)
        parts: list[Node] = []
        start = 0
        for part in x.inputs:
            stop = start + part.shape[axis]
            index = [slice(None)] * len(x.shape)
            if array.shape[axis] > 1:
                index[axis] = slice(start, stop)
            piece = array[tuple(index)]
            if part.is_const:
                parts.append(graph.const(part.array + piece, part.name))
            else:
                parts.append(graph.binary("add", part, graph.const(piece, c.name), part.name))
            start = stop
        return graph.concat(parts, axis)
    return None


def _mean(graph: Graph, node: Node) -> Node | None:
    axes = node.attrs["axis"]
    if isinstance(axes, int):
        return None
    x = node.inputs[0]
    if axes != list(range(axes[0], axes[-1] + 1)):
        return None
    first, last = axes[0], axes[-1]
    merged = math.prod(x.shape[first : last + 1])
    x = graph.reshape(x, [*x.shape[:first], merged, *x.shape[last + 1 :]])
    shape = [*x.shape[:first], *x.shape[first + 1 :]]
    mean = Node("mean", [x], shape, x.dtype, {"axis": first}, name=node.name)
    return graph.reshape(mean, node.shape)


def _full_rank(graph: Graph, node: Node) -> Node | None:
    rank = len(node.shape)
    for i, c in enumerate(node.inputs):
        if c.is_const and 1 < len(c.shape) < rank:
            shape = (1,) * (rank - len(c.shape)) + c.shape
            widened = graph.const(c.array.reshape(shape), c.name)
            return graph.binary("add", node.inputs[1 - i], widened, node.name)
    return None


RULES = (
    Rule("add-through-concat", ("add",), _add_through_concat, "class token + position is constant"),
    Rule("full-rank", ("add",), _full_rank, "positions and biases have the rank of what they meet"),
    Rule("mean", ("mean",), _mean, "pooling is over one axis, not kept"),
)
