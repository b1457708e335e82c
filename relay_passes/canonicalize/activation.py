"""Rules that recognise GELU and LayerNorm where the exporter decomposed them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .graph import Graph, Node, Rule

__all__ = ["RULES"]


def _const_scalar(node: Node) -> float | None:
    return float(node.array.reshape(-1)[0]) if node.is_const and node.size == 1 else None


def _with_scalar(node: Node, op: str, value: float) -> Node | None:
    """Match ``x op value`` (either order) and return x."""
    if node.op != op:
        return None
    for x, c in (node.inputs, node.inputs[::-1]):
        scalar = _const_scalar(c)
        if scalar is not None and not x.is_const and abs(scalar - value) <= 1e-5 * abs(value):
            return x
    return None


def _factors(node: Node) -> Iterator[Node]:
    if node.op == "multiply":
        for operand in node.inputs:
            yield from _factors(operand)
    else:
        yield node


def _gelu_erf(graph: Graph, node: Node) -> Node | None:
    """``0.5 * x * (1 + erf(x / sqrt(2)))`` in any order of the factors."""
    factors = list(_factors(node))
    if len(factors) != 3:
        return None
    half = [f for f in factors if (s := _const_scalar(f)) is not None and abs(s - 0.5) < 1e-6]
    if len(half) != 1:
        return None
    rest = [f for f in factors if f is not half[0]]
    for x, gate in (rest, rest[::-1]):
        erf = _with_scalar(gate, "add", 1.0)
        if erf is None or erf.op != "erf":
            continue
        if _with_scalar(erf.inputs[0], "multiply", 1 / math.sqrt(2)) is x:
            return graph.like("gelu", x, [x])
    return None


def _layer_norm(graph: Graph, node: Node) -> Node | None:
    """``(x - mean) / sqrt(mean((x - mean)^2) + eps)``, then gamma and beta by the next rules."""
    centred, root = node.inputs
    if centred.op != "subtract" or root.op != "sqrt":
        return None
    x, mean = centred.inputs
    if not _is_last_mean(mean, x):
        return None
    shifted = root.inputs[0]
    if shifted.op != "add":
        return None
    for variance, c in (shifted.inputs, shifted.inputs[::-1]):
        epsilon = _const_scalar(c)
        if epsilon is None or _mean_below(variance).op != "mean":
            continue
        square = _mean_below(variance).inputs[0]
        if _is_square_of(square, centred) and _is_last_mean(variance, square):
            n = x.shape[-1]
            ones, zeros = graph.const(np.ones(n, "float32")), graph.const(np.zeros(n, "float32"))
            return graph.like("layer_norm", x, [x, ones, zeros], epsilon=float(np.float32(epsilon)))
    return None


def _is_last_mean(node: Node, x: Node) -> bool:
    """Whether ``node`` is the mean of x over its last axis, which is kept."""
    kept = len(node.shape) == len(x.shape)
    node = _mean_below(node)
    return (
        node.op == "mean"
        and kept
        and node.inputs[0] is x
        and node.attrs["axis"] == len(x.shape) - 1
    )


def _mean_below(node: Node) -> Node:
    return node.inputs[0] if node.op == "reshape" else node


def _is_square_of(node: Node, x: Node) -> bool:
    if node.op == "multiply":
        return node.inputs[0] is x and node.inputs[1] is x
    return (node.op == "square" and node.inputs[0] is x) or (
        node.op == "power" and node.inputs[0] is x and _const_scalar(node.inputs[1]) == 2.0
    )


def _affine(graph: Graph, node: Node) -> Node | None:
    """A constant factor or addend after a LayerNorm belongs to its gamma and beta."""
    for norm, c in (node.inputs, node.inputs[::-1]):
        if norm.op != "layer_norm" or not c.is_const or norm.only_user() is not node:
            continue
        n = norm.shape[-1]
        if c.size != n or c.shape[-1] != n or node.shape != norm.shape:
            continue
        vector = np.broadcast_to(c.array.reshape(-1), (n,)).astype("float64")
        x, gamma, beta = norm.inputs
        if node.op == "multiply":
            gamma = graph.const((gamma.array * vector).astype("float32"), gamma.name or c.name)
            beta = graph.const((beta.array * vector).astype("float32"), beta.name)
        else:
            beta = graph.const((beta.array + vector).astype("float32"), beta.name or c.name)
        return graph.like("layer_norm", norm, [x, gamma, beta], **norm.attrs)
    return None


RULES = (
    Rule("gelu-erf", ("multiply",), _gelu_erf, "older ONNX operator sets decompose GELU"),
    Rule("layer-norm", ("divide",), _layer_norm, "older ONNX operator sets decompose LayerNorm"),
    Rule("affine", ("multiply", "add"), _affine, "gamma and beta of a decomposed LayerNorm"),
)
