"""The pass: import, apply the rule tables, check the grammar, write Relax."""

from __future__ import annotations

from typing import Any

import tvm

from . import activation, attention, fold, layout, linear, quantized, tokens
from .check import check_graph, check_signature, check_weights
from .from_relax import from_relax
from .graph import Graph, Node, Rule, apply_rules
from .naming import digest
from .to_relax import to_relax

__all__ = ["RULES", "Canonicalize", "canonicalize", "simplify"]

RULES: tuple[Rule, ...] = (
    *fold.RULES,
    *activation.RULES,
    *attention.RULES,
    *linear.RULES,
    *tokens.RULES,
    *layout.RULES,
)


def _key(node: Node, number: dict[int, int]) -> tuple[Any, ...]:
    if node.is_const:
        return ("const", digest(node.array), node.quant is None)
    attrs = tuple(sorted((k, repr(v)) for k, v in node.attrs.items()))
    return (node.op, node.shape, attrs, tuple(number[id(i)] for i in node.inputs))


def merge_equal(graph: Graph) -> None:
    """Let equal computations be one node (the layouts above q, k and v, for example)."""
    number: dict[int, int] = {}
    first: dict[tuple[Any, ...], Node] = {}
    for i, node in enumerate(graph.nodes()):
        key = _key(node, number)
        kept = first.setdefault(key, node)
        if kept is node:
            number[id(node)] = i
        else:
            number[id(node)] = number[id(kept)]
            if not node.is_const:
                graph.replace(node, kept)


def order_operands(graph: Graph) -> None:
    """Write additions as (residual stream, branch) or (activation, constant), scales likewise."""
    depth: dict[int, int] = {}
    for node in graph.nodes():
        depth[id(node)] = 1 + max((depth[id(i)] for i in node.inputs), default=0)
        if node.op in ("add", "multiply"):
            node.inputs.sort(key=lambda i: (i.is_const, i.op == "linear", depth[id(i)]))


def simplify(graph: Graph) -> None:
    """Rewrite a graph into the canonical form (without checking that it got there)."""
    quantized.lift(graph)
    apply_rules(graph, RULES)
    merge_equal(graph)
    apply_rules(graph, RULES)
    apply_rules(graph, (*RULES, *attention.FINAL_RULES))
    order_operands(graph)
    quantized.place_pairs(graph)


def canonicalize(
    mod: tvm.IRModule,
    names: dict[str, str] | None = None,
    constants: dict[bytes, str] | None = None,
) -> tvm.IRModule:
    """Bring an imported module into the canonical float form.

    Parameters
    ----------
    mod : tvm.IRModule
        Importer output: float32 image tensor [B, C, H, W] in, float32 logits [B, classes] out.
    names : dict, optional
        Function argument -> parameter name of the model, for names of bindings and errors.
    constants : dict, optional
        :func:`~.naming.digest` of an inline constant -> parameter name.

    Returns
    -------
    tvm.IRModule
        One function ``main(x)`` with inline constants; module attributes are kept.

    Raises
    ------
    VitqError
        For an unsupported operator (with its place), bad weights or dynamic shapes.
    """
    graph = from_relax(mod, names, constants)
    check_signature(graph)
    check_weights(graph)
    simplify(graph)
    check_graph(graph)
    out = to_relax(graph)
    for key, value in (mod.attrs or {}).items():
        out = out.with_attr(key, value)
    return out


@tvm.transform.module_pass(opt_level=0, name="vitq.Canonicalize")
class Canonicalize:
    """Module pass form of :func:`canonicalize`."""

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Apply the pass."""
        return canonicalize(mod)
