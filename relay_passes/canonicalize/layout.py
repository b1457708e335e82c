"""Rules for operators that move elements: one normal form for every chain of them.

A chain of reshapes and permutes is a permutation of *atoms*: the factors of the source's axes that
the chain never splits further. An atom is (stride in the flattened source, size). Two chains do
the same thing if and only if their atoms come in the same order, so the normal form is

    reshape(to the atoms in source order) -> permute -> reshape(to the result's shape)

without the steps that do nothing. That is what makes the three front ends' spellings of head
splitting, window partition and patch extraction one and the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .fold import fold
from .graph import Graph, Node, Rule

__all__ = ["RULES", "Chain", "normal_form", "trace_chain"]

Atom = tuple[int, int]
MAX_RUNS = 4


class Chain:
    """A permutation of atoms: the meaning of a chain of reshapes and permutes.

    Parameters
    ----------
    shape : sequence of int
        Shape of the source.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.source = tuple(shape)
        stride = math.prod(shape)
        self.dims: list[list[Atom]] = []
        for n in shape:
            stride //= n
            self.dims.append([(stride, n)] if n > 1 else [])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(math.prod(size for _, size in dim) for dim in self.dims)

    @property
    def atoms(self) -> list[Atom]:
        """Atoms in the order of the result."""
        return [atom for dim in self.dims for atom in dim]

    def permute(self, axes: Sequence[int]) -> bool:
        """Append a permutation of axes."""
        self.dims = [self.dims[a] for a in axes]
        return True

    def reshape(self, shape: Sequence[int]) -> bool:
        """Append a reshape; False if it would cut across atoms (then the chain is as before)."""
        rest = _merge(self.atoms)[::-1]
        dims: list[list[Atom]] = []
        for need in shape:
            dim: list[Atom] = []
            while need > 1:
                stride, size = rest.pop()
                if need % size == 0:
                    dim.append((stride, size))
                    need //= size
                elif size % need == 0:
                    inner = size // need
                    dim.append((stride * inner, need))
                    rest.append((stride, inner))
                    need = 1
                else:
                    return False
            dims.append(_merge(dim))
        self.dims = dims
        return True


def _merge(atoms: Sequence[Atom]) -> list[Atom]:
    merged: list[Atom] = []
    for stride, size in atoms:
        if merged and merged[-1][0] == stride * size:
            merged[-1] = (stride, merged[-1][1] * size)
        else:
            merged.append((stride, size))
    return merged


def trace_chain(node: Node, stop: Node | None = None) -> tuple[Node, Chain, list[Node]]:
    """Read the longest chain of reshapes and permutes that ends in ``node``.

    Returns
    -------
    source : Node
        Where the chain starts (``stop`` if given).
    chain : Chain
        What it does.
    steps : list of Node
        The chain's nodes, first to last.
    """
    path: list[Node] = []
    walk = node
    while walk.op in ("reshape", "permute") and walk is not stop:
        path.append(walk)
        walk = walk.inputs[0]
    path.reverse()
    for start in range(len(path) + 1):
        source = path[start].inputs[0] if start < len(path) else node
        chain = Chain(source.shape)
        if all(
            chain.permute(s.attrs["axes"]) if s.op == "permute" else chain.reshape(s.shape)
            for s in path[start:]
        ):
            return source, chain, path[start:]
    raise AssertionError("the empty chain always composes")


def normal_form(chain: Chain) -> list[tuple[str, tuple[int, ...]]]:
    """Return the steps ("reshape", shape) and ("permute", axes) of a chain's normal form."""
    target = chain.shape
    steps: list[tuple[str, tuple[int, ...]]] = []
    shape = chain.source
    atoms = chain.atoms
    if len(_merge(atoms)) > 1:
        order = sorted(range(len(atoms)), key=lambda i: -atoms[i][0])
        split = tuple(atoms[i][1] for i in order)
        axes = tuple(int(a) for a in np.argsort(order))
        if target[0] == 1:  # one image: keep its batch axis in front all the way
            split, axes = (1, *split), (0, *(a + 1 for a in axes))
        if split != shape:
            steps.append(("reshape", split))
        steps.append(("permute", axes))
        shape = tuple(split[a] for a in axes)
    if shape != target:
        steps.append(("reshape", target))
    return steps


def _normalise_chain(graph: Graph, node: Node) -> Node | None:
    source, chain, path = trace_chain(node)
    steps = normal_form(chain)
    current = [(s.op, s.attrs["axes"] if s.op == "permute" else s.shape) for s in path]
    if steps == current:
        return None
    out = source
    for op, arg in steps:
        out = graph.permute(out, arg) if op == "permute" else graph.reshape(out, arg)
    return out


def _take_to_slices(graph: Graph, node: Node) -> Node | None:
    x, index = node.inputs
    if x.is_const:
        return None
    axis = node.attrs["axis"]
    flat = index.array.reshape(-1)
    breaks = np.flatnonzero(np.diff(flat) != 1) + 1
    if len(breaks) >= MAX_RUNS:
        return None
    runs = [(int(r[0]), int(r[-1]) + 1) for r in np.split(flat, breaks)]
    parts = [graph.slice(x, axis, begin, end) for begin, end in runs]
    return graph.reshape(graph.concat(parts, axis), node.shape)


def _merge_slices(graph: Graph, node: Node) -> Node | None:
    inner = node.inputs[0]
    axis, begin = node.attrs["axis"], node.attrs["begin"]
    if inner.op == "slice" and inner.attrs["axis"] == axis:
        offset = inner.attrs["begin"]
        return graph.slice(inner.inputs[0], axis, begin + offset, node.attrs["end"] + offset)
    if inner.op == "slice" and inner.attrs["axis"] > axis:
        first = graph.slice(inner.inputs[0], axis, begin, node.attrs["end"])
        return graph.slice(first, inner.attrs["axis"], inner.attrs["begin"], inner.attrs["end"])
    return None


def _slice_of_concat(graph: Graph, node: Node) -> Node | None:
    inner = node.inputs[0]
    axis, begin, end = node.attrs["axis"], node.attrs["begin"], node.attrs["end"]
    if inner.op != "concat" or inner.attrs["axis"] != axis:
        return None
    start = 0
    for part in inner.inputs:
        stop = start + part.shape[axis]
        if start <= begin and end <= stop:
            return graph.slice(part, axis, begin - start, end - start)
        start = stop
    return None


def _slice_of_permute(graph: Graph, node: Node) -> Node | None:
    """Slices go above permutes, so that slices of one tensor meet at their source."""
    inner = node.inputs[0]
    if inner.op != "permute":
        return None
    axes = inner.attrs["axes"]
    cut = graph.slice(
        inner.inputs[0], axes[node.attrs["axis"]], node.attrs["begin"], node.attrs["end"]
    )
    return graph.permute(cut, axes)


def _slice_of_reshape(graph: Graph, node: Node) -> Node | None:
    """Slices go above reshapes where one axis of the source is cut in one piece."""
    inner = node.inputs[0]
    if inner.op != "reshape":
        return None
    x = inner.inputs[0]
    axis, begin, end = node.attrs["axis"], node.attrs["begin"], node.attrs["end"]
    chain = Chain(x.shape)
    if not chain.reshape(inner.shape) or len(chain.dims[axis]) != 1:
        return None
    stride, size = chain.dims[axis][0]
    unit = x.size
    for source_axis, n in enumerate(x.shape):
        unit //= n
        if unit <= stride and stride * size == unit * n and stride % unit == 0:
            step = stride // unit
            cut = graph.slice(x, source_axis, begin * step, end * step)
            return graph.reshape(cut, node.shape)
    return None


def _flat_concat(graph: Graph, node: Node) -> Node | None:
    axis = node.attrs["axis"]
    if any(p.op == "concat" and p.attrs["axis"] == axis and len(p.users) == 1 for p in node.inputs):
        parts: list[Node] = []
        for part in node.inputs:
            nested = part.op == "concat" and part.attrs["axis"] == axis and len(part.users) == 1
            parts.extend(part.inputs if nested else [part])
        return graph.concat(parts, axis)
    return None


def _join_constants(graph: Graph, node: Node) -> Node | None:
    axis = node.attrs["axis"]
    parts: list[Node] = []
    for part in node.inputs:
        if part.is_const and parts and parts[-1].is_const:
            joined = np.concatenate([parts[-1].array, part.array], axis=axis)
            parts[-1] = graph.const(joined, parts[-1].name)
        else:
            parts.append(part)
    return graph.concat(parts, axis) if len(parts) < len(node.inputs) else None


def _adjacent_slices(graph: Graph, node: Node) -> Node | None:
    """Concat of neighbouring slices of one tensor, each reshaped alike, is one slice reshaped."""
    parts = [(p.inputs[0] if p.op == "reshape" else p) for p in node.inputs]
    first = parts[0]
    if any(p.op != "slice" for p in parts):
        return None
    axis, source = first.attrs["axis"], first.inputs[0]
    end = first.attrs["begin"]
    for part in parts:
        if part.inputs[0] is not source or part.attrs["axis"] != axis or part.attrs["begin"] != end:
            return None
        end = part.attrs["end"]
    whole = graph.slice(source, axis, first.attrs["begin"], end)
    check = fold(
        "concat",
        [
            np.arange(source.size).reshape(source.shape)[_index(p)].reshape(q.shape)
            for p, q in zip(parts, node.inputs, strict=True)
        ],
        node.attrs,
    )
    joined = (
        np.arange(source.size).reshape(source.shape)[_index(whole)] if whole is not source else None
    )
    joined = np.arange(source.size).reshape(source.shape) if joined is None else joined
    assert check is not None
    if np.array_equal(check.reshape(-1), joined.reshape(-1)):
        return graph.reshape(whole, node.shape)
    graph.drop(whole)
    return None


def _index(cut: Node) -> tuple[slice, ...]:
    index = [slice(None)] * len(cut.shape)
    index[cut.attrs["axis"]] = slice(cut.attrs["begin"], cut.attrs["end"])
    return tuple(index)


def _reshape_above_unary(graph: Graph, node: Node) -> Node | None:
    inner = node.inputs[0]
    if inner.op in ("gelu", "gelu_tanh") and inner.only_user() is node:
        return graph.like(inner.op, node, [graph.reshape(inner.inputs[0], node.shape)])
    return None


RULES = (
    Rule("chain", ("reshape", "permute"), _normalise_chain, "one spelling per element order"),
    Rule("take-to-slices", ("take",), _take_to_slices, "token choice and rolls are slices"),
    Rule("merge-slices", ("slice",), _merge_slices, "slice of slice is one slice; axes ascend"),
    Rule("slice-of-concat", ("slice",), _slice_of_concat, "a slice inside one part is that part's"),
    Rule("slice-of-permute", ("slice",), _slice_of_permute, "slices meet at their source"),
    Rule("slice-of-reshape", ("slice",), _slice_of_reshape, "slices meet at their source"),
    Rule("flat-concat", ("concat",), _flat_concat, "concat of concat is one concat"),
    Rule("join-constants", ("concat",), _join_constants, "neighbouring constants are one"),
    Rule("adjacent-slices", ("concat",), _adjacent_slices, "undo a split that nothing used"),
    Rule(
        "reshape-above-unary", ("reshape",), _reshape_above_unary, "elementwise ops see one shape"
    ),
)
