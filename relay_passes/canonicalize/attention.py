"""Rules for attention: one scale, after the product; operands in the shape of the softmax."""

from __future__ import annotations

import math

import numpy as np

from .graph import Graph, Node, Rule, layout_source
from .layout import trace_chain

__all__ = ["FINAL_RULES", "RULES"]

_LAYOUT = ("reshape", "permute")


def scalar_of(node: Node) -> tuple[Node, float] | None:
    """Split ``x * scalar constant`` into (x, scalar)."""
    if node.op == "multiply":
        for x, c in (node.inputs, node.inputs[::-1]):
            if c.is_const and c.size == 1 and not x.is_const:
                return x, float(c.array.reshape(()))
    return None


def _times(graph: Graph, x: Node, factor: float) -> Node:
    return graph.like("multiply", x, [x, graph.const(np.float64(factor))])


def _divide(graph: Graph, node: Node) -> Node | None:
    x, c = node.inputs
    if c.is_const and not x.is_const and c.dtype.startswith("float"):
        return graph.binary(
            "multiply", x, graph.const(1.0 / c.array.astype("float64"), c.name), node.name
        )
    return None


def _subtract(graph: Graph, node: Node) -> Node | None:
    x, c = node.inputs
    if c.is_const and not x.is_const:
        return graph.binary("add", x, graph.const(-c.array, c.name), node.name)
    return None


def _scale_below_layout(graph: Graph, node: Node) -> Node | None:
    found = scalar_of(node.inputs[0])
    if found is None:
        return None
    x, factor = found
    if node.op == "reshape":
        moved = graph.reshape(x, node.shape)
    elif node.op == "permute":
        moved = graph.permute(x, node.attrs["axes"])
    else:
        moved = graph.slice(x, node.attrs["axis"], node.attrs["begin"], node.attrs["end"])
    return _times(graph, moved, factor)


def _scale_below_product(graph: Graph, node: Node) -> Node | None:
    for i, operand in enumerate(node.inputs):
        found = scalar_of(operand)
        if found is not None:
            a, b = (found[0] if j == i else operand for j, operand in enumerate(node.inputs))
            product = graph.matmul(a, b, transpose_b=node.attrs["transpose_b"], name=node.name)
            return _times(graph, product, found[1])
    return None


def _merge_scales(graph: Graph, node: Node) -> Node | None:
    outer = scalar_of(node)
    if outer is None:
        return None
    x, factor = outer
    inner = scalar_of(x)
    if inner is not None:
        return _times(graph, inner[0], factor * inner[1])
    if factor == 1.0 and layout_source(x).op != "matmul":
        return x
    if x.op == "add" and layout_source(x.inputs[0]).op in ("matmul", "multiply"):
        scaled = [i for i in x.inputs if i.is_const]
        if len(scaled) == 1 and layout_source(x.inputs[0], ("multiply", *_LAYOUT)).op == "matmul":
            bias = graph.const((scaled[0].array.astype("float64") * factor).astype("float32"))
            return graph.binary("add", _times(graph, x.inputs[0], factor), bias, x.name)
    return None


def _guard(graph: Graph, node: Node) -> Node | None:
    """Torch guards softmax rows that are all -inf; canonical masks are finite."""
    condition, other, probabilities = node.inputs
    if probabilities.op != "softmax" or not other.is_const or np.any(other.array):
        return None
    walk = condition
    while walk.op in ("logical_not", "astype", "max", "any", "broadcast_to", "reshape"):
        walk = walk.inputs[0]
    if walk.op == "equal" and any(i.is_const and np.all(np.isneginf(i.array)) for i in walk.inputs):
        return probabilities
    return None


def _finite_mask(graph: Graph, node: Node) -> Node | None:
    for x, c in (node.inputs, node.inputs[::-1]):
        if c.is_const and not x.is_const and c.dtype == "float32" and np.isneginf(c.array).any():
            return graph.binary(
                "add", x, graph.const(np.maximum(c.array, np.float32(-100)), c.name), node.name
            )
    return None


def _split_mask(graph: Graph, node: Node) -> Node | None:
    """Take a relative position bias and a window mask apart that were added beforehand.

    The sum C [B * nW, H, M, M] repeats with period nW and its first window has no mask, so the
    bias is C[0] and the mask the rest, if that gives C again bit for bit.
    """
    for x, c in (node.inputs, node.inputs[::-1]):
        if not c.is_const or len(c.shape) != 4 or c.shape[0] == 1 or c.shape != x.shape:
            continue
        if layout_source(x, ("multiply", *_LAYOUT)).op != "matmul" or c.shape[-1] != c.shape[-2]:
            continue
        bias = c.array[:1]
        mask = np.round((c.array - bias).mean(axis=1, keepdims=True)).astype("float32")
        if not np.array_equal(bias + mask, c.array):
            return None
        windows = _period(mask)
        _, heads, m, _ = x.shape
        biased = graph.binary("add", x, graph.const(bias, c.name), node.name)
        if windows == 1:
            return biased
        split = graph.reshape(biased, [x.shape[0] // windows, windows, heads, m, m])
        masked = graph.binary("add", split, graph.const(mask[:windows][None]), node.name)
        return graph.reshape(masked, node.shape)
    return None


def _period(mask: np.ndarray) -> int:
    n = len(mask)
    for period in range(1, n + 1):
        if (
            n % period == 0
            and (mask.reshape(n // period, -1) == mask[:period].reshape(1, -1)).all()
        ):
            return period
    return n


def _transpose_operand(graph: Graph, node: Node) -> Node | None:
    """Read k as [..., M, D] and transpose it in the product itself."""
    if node.attrs["transpose_b"]:
        return None
    a, b = node.inputs
    source, chain, _ = trace_chain(b)
    if source is b or not chain.dims[-2] or 1 not in [stride for stride, _ in chain.dims[-2]]:
        return None
    rank = len(b.shape)
    swapped = graph.permute(b, [*range(rank - 2), rank - 1, rank - 2])
    return graph.matmul(a, swapped, transpose_b=True, name=node.name)


def _regroups_batch(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return before[-2:] == after[-2:] and before != after


def _batch_above_logits(graph: Graph, node: Node) -> Node | None:
    """Logits take the batch axes that the softmax sees."""
    product = node.inputs[0]
    if product.op != "matmul" or product.only_user() is not node:
        return None
    if layout_source(product.inputs[0], _LAYOUT).op == "softmax":
        return None
    if not _regroups_batch(product.shape, node.shape):
        return None
    a, b = (graph.reshape(i, [*node.shape[:-2], *i.shape[-2:]]) for i in product.inputs)
    return graph.matmul(a, b, transpose_b=product.attrs["transpose_b"], name=product.name)


def _batch_below_softmax(graph: Graph, node: Node) -> Node | None:
    """The product with v keeps the batch axes of the softmax."""
    p, v = node.inputs
    if p.op != "reshape":
        return None
    probabilities = p.inputs[0]
    if probabilities.op != "softmax":
        return None
    if not _regroups_batch(probabilities.shape, p.shape):
        return None
    v = graph.reshape(v, [*probabilities.shape[:-2], *v.shape[-2:]])
    product = graph.matmul(probabilities, v, transpose_b=node.attrs["transpose_b"], name=node.name)
    return graph.reshape(product, node.shape)


RULES = (
    Rule("divide", ("divide",), _divide, "division by a constant is a multiplication"),
    Rule("subtract", ("subtract",), _subtract, "subtraction of a constant is an addition"),
    Rule("guard", ("where",), _guard, "no row is all -inf"),
    Rule("finite-mask", ("add",), _finite_mask, "integers have no -inf; e^-100 is 0 to float32"),
    Rule("split-mask", ("add",), _split_mask, "bias and window mask are separate"),
    Rule("merge-scales", ("multiply",), _merge_scales, "scalars multiply into one"),
    Rule(
        "scale-below-layout", ("reshape", "permute", "slice"), _scale_below_layout, "to the product"
    ),
    Rule("scale-below-product", ("matmul",), _scale_below_product, "one scale, on the logits"),
    Rule("transpose-operand", ("matmul",), _transpose_operand, "k is read as [..., M, D]"),
    Rule("batch-above-logits", ("reshape",), _batch_above_logits, "logits in the softmax's shape"),
    Rule("batch-below-softmax", ("matmul",), _batch_below_softmax, "p @ v in the softmax's shape"),
)


def _is_logits(product: Node) -> bool:
    """Whether a product of activations reaches a softmax through scale, bias, mask and layouts."""
    users = list(product.users)
    while users:
        user = users.pop()
        if user.op == "softmax":
            return True
        if user.op in ("multiply", "add", *_LAYOUT) and user.size == product.size:
            users.extend(user.users)
    return False


def _exact_scale(graph: Graph, node: Node) -> Node | None:
    found = scalar_of(node)
    if found is None or found[0].op != "matmul":
        return None
    x, factor = found
    exact = np.float32(1.0 / math.sqrt(x.inputs[0].shape[-1]))
    near = abs(factor / float(exact) - 1.0) <= 1e-5
    value = exact if near else np.float32(factor)
    constant = next(i for i in node.inputs if i.is_const)
    if constant.dtype == "float32" and constant.shape == () and constant.array == value:
        return None
    return graph.like("multiply", x, [x, graph.const(value)])


def _always_scaled(graph: Graph, node: Node) -> Node | None:
    if not _is_logits(node) or any(u.op == "multiply" for u in node.users):
        return None
    a, b = node.inputs
    copy = graph.matmul(a, b, transpose_b=node.attrs["transpose_b"], name=node.name)
    return graph.like("multiply", copy, [copy, graph.const(np.float32(1.0))])


FINAL_RULES = (
    Rule("always-scaled", ("matmul",), _always_scaled, "logits always have their scale"),
    Rule("exact-scale", ("multiply",), _exact_scale, "d^-1/4 twice is meant as d^-1/2"),
)
