"""The grammar of the canonical form, and the error for what does not fit it."""

from __future__ import annotations

import numpy as np
import tvm

from ..errors import VitqError
from .from_relax import from_relax
from .graph import Graph, Node, layout_source
from .naming import SUPPORTED, place

__all__ = ["check_canonical", "check_graph", "check_signature", "check_weights"]

_LAYOUT = {"reshape", "permute", "slice", "concat"}
_FREE = {"linear", "layer_norm", "gelu", "gelu_tanh", "qdq", "pixels", "input", "const"}


def _problem(node: Node) -> str | None:
    """Return what is wrong with a node, or None if it is canonical."""
    op = node.op
    constants = [i for i in node.inputs if i.is_const]
    if op in _FREE or op in _LAYOUT:
        if op == "layer_norm" and len(constants) != 2:
            return "its gamma and beta must be constant"
        return None
    if op == "take":
        return None if node.inputs[1].is_const else "its indices depend on the input"
    if op == "mean":
        return (
            None
            if isinstance(node.attrs["axis"], int)
            else f"axes {node.attrs['axis']} are not adjacent"
        )
    if op == "matmul":
        linear = not constants or (node.inputs[1].is_const and len(node.inputs[1].shape) == 2)
        return None if linear else "a constant operand must be the right-hand one, [K, N]"
    if op == "softmax":
        logits = layout_source(node.inputs[0], ("reshape", "permute", "qdq", "add", "multiply"))
        attention = logits.op == "matmul" and not any(i.is_const for i in logits.inputs)
        return None if attention else "only the softmax of attention; export logits"
    if op == "multiply":
        other = next((i for i in node.inputs if not i.is_const), node)
        if len(constants) == 1 and constants[0].size == 1 and other.op == "matmul":
            return None
        return (
            "only a constant scale next to a linear, a LayerNorm or attention logits can be folded"
        )
    if op == "add":
        shapes = [i.shape for i in node.inputs]
        if constants or shapes[0] == shapes[1]:
            return None if node.shape in shapes else "its operands broadcast against each other"
        return f"operands of shapes {list(shapes[0])} and {list(shapes[1])} broadcast"
    return ""


def check_graph(graph: Graph) -> None:
    """Raise for the first node that is not canonical.

    Raises
    ------
    VitqError
        Names the operator, the nearest parameter, and what is supported.
    """
    for node in graph.nodes():
        problem = _problem(node)
        if problem is None:
            continue
        op = {"permute": "permute_dims"}.get(node.op, node.op)
        reason = f" ({problem})" if problem else ""
        raise VitqError(
            f"operator {op}{reason} near {place(node)} with result {list(node.shape)} is not "
            f"supported; supported are {SUPPORTED}"
        )


def check_signature(graph: Graph) -> None:
    """Raise unless the function maps float32 images [B, C, H, W] to logits [B, classes].

    Raises
    ------
    VitqError
        Says what the function takes and returns instead.
    """
    image, logits = graph.input, graph.output
    assert image is not None
    if image.dtype != "float32" or len(image.shape) != 4:
        raise VitqError(
            f"the model takes {image.dtype} {list(image.shape)}; export it with one float32 image "
            "tensor [B, C, H, W] as input"
        )
    if len(logits.shape) != 2 or logits.shape[0] != image.shape[0]:
        raise VitqError(
            f"the model returns {list(logits.shape)}; logits [{image.shape[0]}, classes] are "
            "supported (export the classifier, not the features)"
        )


def check_weights(graph: Graph) -> None:
    """Raise if a constant holds NaN, or Inf outside an additive mask.

    Raises
    ------
    VitqError
        Names the parameter and counts the bad values.
    """
    for node in graph.nodes():
        if not node.is_const or not node.dtype.startswith("float"):
            continue
        array = node.array
        finite = np.isfinite(array)
        mask = not node.name and (finite | np.isneginf(array)).all()
        if finite.all() or mask:
            continue
        where = node.name or f"near {place(node.users[0])}"
        bad = int(array.size - finite.sum())
        raise VitqError(
            f"weights {where} hold {bad} NaN or Inf of {array.size} values; repair the checkpoint"
        )


def check_canonical(mod: tvm.IRModule) -> None:
    """Verify that ``main`` of a module is in the canonical float form.

    Raises
    ------
    VitqError
        Names the first operator outside the grammar and where it is.
    """
    check_graph(from_relax(mod))
