"""Models that arrive quantized: their scales are kept where the integer form has a place for them.

Exporters put quantize/dequantize pairs everywhere, also inside a decomposed GELU or between a
product and its bias, where they would hide every pattern. So the pairs are first *lifted*: a value
remembers its quantizer (:attr:`Node.site`) and the pair goes away; the rules then see the float
model, and a replacement inherits the quantizer of the value it replaces. At the end the pairs are
*placed* again, but only on the sites of the quantize/dequantize form.
"""

from __future__ import annotations

from typing import Any

from .graph import Graph, Node

__all__ = ["is_site", "lift", "place_pairs"]

_LAYOUT = ("reshape", "permute", "slice")
_ALWAYS = ("input", "pixels", "layer_norm", "softmax", "gelu", "gelu_tanh", "mean")


def lift(graph: Graph) -> None:
    """Turn quantize/dequantize pairs into the attribute ``site`` of the value they apply to."""
    for node in graph.nodes():
        if node.op == "qdq":
            source = node.inputs[0]
            if source.site is None and not source.is_const:
                source.site = dict(node.attrs)
            graph.replace(node, source)
    for node in graph.nodes():  # a quantizer per tensor holds for every layout of the tensor
        if node.op in _LAYOUT and node.site is None:
            node.site = node.inputs[0].site


def _consumers(node: Node) -> list[Node]:
    """Users of a value, seen through layouts."""
    found: list[Node] = []
    for user in node.users:
        found.extend(_consumers(user) if user.op in _LAYOUT else [user])
    return found


def is_site(node: Node) -> bool:
    """Whether the quantize/dequantize form quantizes this node's result."""
    if node.op in _ALWAYS:
        return True
    consumers = [c.op for c in _consumers(node)]
    if node.op == "linear":
        return "add" not in consumers
    if node.op == "matmul":
        return "multiply" not in consumers
    if node.op in ("multiply", "add"):
        logits_follow = any(
            c.op == "add" and any(i.is_const for i in c.inputs) for c in _consumers(node)
        )
        return not logits_follow
    return False


def place_pairs(graph: Graph) -> None:
    """Insert the lifted pairs at the sites, right after the operator that computes the value."""
    order = graph.nodes()
    for node in reversed(order):
        if node.site is None:
            continue
        if node.op == "concat" or node.op in _LAYOUT:
            for operand in node.inputs:
                if operand.site is None and not operand.is_const:
                    operand.site = node.site
    for node in order:
        if node.site is None or node.op in ("pixels", "const") or not is_site(node):
            continue
        users = list(node.users)
        pair = _pair(node, node.site)
        for user in set(users):
            user.inputs = [pair if i is node else i for i in user.inputs]
        node.users = [pair]
        pair.users = users
    for node in order:  # constant tokens take the scale of what they are joined with
        if node.op == "concat":
            scales = [s for s in map(_scale_of, node.inputs) if s is not None]
            for i, operand in enumerate(node.inputs):
                if operand.is_const and scales:
                    exact = graph.const(operand.attrs.get("exact", operand.array), operand.name)
                    node.inputs[i] = _pair(exact, scales[0])
    graph.prune()


def _pair(node: Node, site: dict[str, Any]) -> Node:
    return Node("qdq", [node], node.shape, node.dtype, dict(site), name=node.name)


def _scale_of(node: Node) -> dict[str, Any] | None:
    while node.op in (*_LAYOUT, "concat"):
        node = next((i for i in node.inputs if not i.is_const), node.inputs[0])
    return node.attrs if node.op == "qdq" else None
