"""The small data-flow graph that canonicalisation rewrites.

Relax bindings are turned into :class:`Node` objects, rewritten by the rule tables of this folder
until nothing changes, and turned back. A graph of plain objects is used instead of expression
mutators because most rules need use counts and the numpy value of a constant, and because one
rule's output is often the next one's input.

The vocabulary of nodes is smaller than Relax's:

========== ============================== =====================================================
op         inputs                         attributes
========== ============================== =====================================================
input      --                             --
const      --                             ``value`` holds the array; exact: before quantization
reshape    x                              (the shape is the node's own)
permute    x                              axes
slice      x                              axis, begin, end (step 1, one axis)
concat     x...                           axis
take       x, indices                     axis
linear     x [..., K], W [K, N], b [N]    -- (b is optional)
matmul     a [..., M, K], b               transpose_b (b is then [..., N, K])
layer_norm x, gamma, beta                 epsilon (last axis)
softmax    x                              -- (last axis)
mean       x                              axis (one, not kept)
qdq        x                              scale, zero_point, dtype: quantize, then dequantize
========== ============================== =====================================================

Everything else keeps its Relax name without the ``relax.`` prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Graph", "Node", "Rule", "apply_rules", "layout_source"]

Shape = tuple[int, ...]


class Node:
    """One value of the graph: an operator applied to other nodes.

    Parameters
    ----------
    op : str
        Operator, see the module's table.
    inputs : sequence of Node
        Operands.
    shape : tuple of int
        Static shape of the result.
    dtype : str
        Element type of the result.
    attrs : dict
        Attributes of the operator.
    value : numpy.ndarray, optional
        The array, for ``const``.
    name : str
        Where in the model the node comes from (a parameter or module path), or "".
    """

    __slots__ = (
        "attrs",
        "dtype",
        "inputs",
        "label",
        "name",
        "op",
        "quant",
        "shape",
        "site",
        "users",
        "value",
    )

    def __init__(
        self,
        op: str,
        inputs: Sequence[Node],
        shape: Sequence[int],
        dtype: str = "float32",
        attrs: dict[str, Any] | None = None,
        value: np.ndarray | None = None,
        name: str = "",
    ) -> None:
        self.op = op
        self.inputs = list(inputs)
        self.shape: Shape = tuple(int(d) for d in shape)
        self.dtype = dtype
        self.attrs = attrs or {}
        self.value = value
        self.name = name
        self.label = ""
        """Name of the binding in the Relax function that was read, where it has a telling one."""
        self.quant: tuple[np.ndarray, np.ndarray] | None = None
        """Integer codes and scales (same shape) of a constant that arrived quantized."""
        self.site: dict[str, Any] | None = None
        """Quantizer (scale, zero_point, dtype) that the model brought for this value."""
        self.users: list[Node] = []
        for operand in self.inputs:
            operand.users.append(self)

    @property
    def is_const(self) -> bool:
        """Whether the node is a constant."""
        return self.op == "const"

    @property
    def array(self) -> np.ndarray:
        """Value of a constant node."""
        assert self.value is not None
        return self.value

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def only_user(self) -> Node | None:
        """Return the one user of this node, or None if there are several or none."""
        return self.users[0] if len(self.users) == 1 else None

    def __repr__(self) -> str:
        return f"{self.op}{list(self.shape)}({self.name})"


class Graph:
    """A model's data flow from ``input`` to ``output``, with constructors that infer shapes."""

    def __init__(self) -> None:
        self.input: Node | None = None
        self._sink = Node("output", [], ())

    @property
    def output(self) -> Node:
        """The node that the function returns."""
        return self._sink.inputs[0]

    @output.setter
    def output(self, node: Node) -> None:
        for old in self._sink.inputs:
            old.users.remove(self._sink)
        self._sink.inputs = [node]
        node.users.append(self._sink)

    # ------------------------------------------------------------------ constructors
    def const(self, value: np.ndarray | np.generic | float, name: str = "") -> Node:
        """Make a constant node."""
        array = np.asarray(value)
        return Node("const", [], array.shape, str(array.dtype), value=array, name=name)

    def like(self, op: str, x: Node, inputs: Sequence[Node], **attrs: Any) -> Node:
        """Make a node of ``op`` with the shape, dtype and name of ``x``."""
        return Node(op, inputs, x.shape, x.dtype, attrs, name=x.name)

    @staticmethod
    def _layout(op: str, x: Node, shape: Sequence[int], attrs: dict[str, Any]) -> Node:
        node = Node(op, [x], shape, x.dtype, attrs, name=x.name)
        node.site = x.site  # a quantizer per tensor holds for every layout of the tensor
        return node

    def reshape(self, x: Node, shape: Sequence[int]) -> Node:
        """Reshape ``x``; returns ``x`` itself when the shape is the same."""
        shape = tuple(int(d) for d in shape)
        if shape == x.shape:
            return x
        assert math.prod(shape) == x.size, (x.shape, shape)
        return self._layout("reshape", x, shape, {})

    def permute(self, x: Node, axes: Sequence[int]) -> Node:
        """Permute the axes of ``x``; returns ``x`` itself for the identity."""
        axes = tuple(int(a) % len(x.shape) for a in axes)
        if axes == tuple(range(len(axes))):
            return x
        return self._layout("permute", x, [x.shape[a] for a in axes], {"axes": axes})

    def slice(self, x: Node, axis: int, begin: int, end: int) -> Node:
        """Take ``[begin, end)`` of one axis; returns ``x`` itself for the whole axis."""
        if begin == 0 and end == x.shape[axis]:
            return x
        assert 0 <= begin < end <= x.shape[axis], (x.shape, axis, begin, end)
        shape = list(x.shape)
        shape[axis] = end - begin
        return self._layout("slice", x, shape, {"axis": axis, "begin": begin, "end": end})

    def concat(self, parts: Sequence[Node], axis: int) -> Node:
        """Concatenate along one axis; a single part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        axis %= len(shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        name = next((p.name for p in parts if p.name), "")
        return Node("concat", parts, shape, parts[0].dtype, {"axis": axis}, name=name)

    def linear(self, x: Node, weight: Node, bias: Node | None = None, name: str = "") -> Node:
        """``x @ weight + bias`` with constants ``weight`` [K, N] and ``bias`` [N]."""
        assert x.shape[-1] == weight.shape[0], (x.shape, weight.shape)
        inputs = [x, weight] + ([bias] if bias is not None else [])
        shape = (*x.shape[:-1], weight.shape[1])
        return Node("linear", inputs, shape, "float32", name=name or weight.name)

    def matmul(self, a: Node, b: Node, transpose_b: bool = False, name: str = "") -> Node:
        """Batched product of two activations."""
        n = b.shape[-2] if transpose_b else b.shape[-1]
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        attrs = {"transpose_b": transpose_b}
        return Node(
            "matmul", [a, b], (*batch, a.shape[-2], n), "float32", attrs, name=name or a.name
        )

    def binary(self, op: str, a: Node, b: Node, name: str = "") -> Node:
        """Elementwise ``op`` with NumPy broadcasting."""
        shape = np.broadcast_shapes(a.shape, b.shape)
        dtype = b.dtype if a.is_const else a.dtype
        return Node(op, [a, b], shape, dtype, name=name or a.name or b.name)

    # ------------------------------------------------------------------ traversal and change
    def nodes(self) -> list[Node]:
        """All live nodes, operands before users, in the order of a depth-first walk."""
        order: list[Node] = []
        seen: set[int] = set()
        stack: list[tuple[Node, int]] = [(self.output, 0)]
        seen.add(id(self.output))
        while stack:
            node, i = stack.pop()
            if i < len(node.inputs):
                stack.append((node, i + 1))
                operand = node.inputs[i]
                if id(operand) not in seen:
                    seen.add(id(operand))
                    stack.append((operand, 0))
            else:
                order.append(node)
        return order

    def prune(self) -> None:
        """Forget users that don't reach the output."""
        order = self.nodes()
        for node in order:
            node.users = []
        for node in [*order, self._sink]:
            for operand in node.inputs:
                operand.users.append(node)

    def replace(self, old: Node, new: Node) -> None:
        """Let every user of ``old`` use ``new`` and drop what that leaves without users."""
        if not new.name:
            new.name = old.name
        if new.site is None:
            new.site = old.site
        new.label = new.label or old.label
        for user in set(old.users):
            user.inputs = [new if operand is old else operand for operand in user.inputs]
        new.users.extend(old.users)
        old.users = []
        self.drop(old)

    def drop(self, node: Node) -> None:
        """Remove a node without users, and its operands that had no other user."""
        stack = [node]
        while stack:
            dead = stack.pop()
            if dead.users or dead.op == "input":
                continue
            operands, dead.inputs = dead.inputs, []
            dead.op = "dead"
            for operand in operands:
                operand.users.remove(dead)
                stack.append(operand)


RuleFn = Callable[[Graph, Node], "Node | None"]


@dataclass(frozen=True)
class Rule:
    """One rewrite: for nodes of the operators ``ops``, ``apply`` returns a replacement or None."""

    name: str
    ops: tuple[str, ...]
    apply: RuleFn
    reason: str


def apply_rules(graph: Graph, rules: Iterable[Rule], max_sweeps: int = 200) -> None:
    """Apply rules to every node until none changes anything.

    Raises
    ------
    RuntimeError
        If ``max_sweeps`` sweeps don't settle, which means two rules undo each other.
    """
    by_op: dict[str, list[Rule]] = {}
    for rule in rules:
        for op in rule.ops:
            by_op.setdefault(op, []).append(rule)
    last = ""
    for _ in range(max_sweeps):
        changed = False
        graph.prune()
        for node in graph.nodes():
            for rule in by_op.get(node.op, ()):
                new = rule.apply(graph, node)
                if new is not None and new is not node:
                    graph.replace(node, new)
                    changed, last = True, rule.name
                    break
        if not changed:
            return
    raise RuntimeError(f"canonicalisation does not settle; the last rule applied was {last!r}")


def layout_source(node: Node, through: tuple[str, ...] = ("reshape", "permute")) -> Node:
    """Walk up from ``node`` through layout operators to the node that computes the elements."""
    while node.op in through:
        node = node.inputs[0]
    return node
