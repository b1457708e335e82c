"""Fold what only moves elements into the kernels beside it, so that nothing is copied.

Every variable that layout operators (reshape, permute_dims, strided_slice, concat of slices, ...)
make of one kernel's result is an index map: which element of that result each of its elements is.
The maps are computed here, as arrays; what a chain of operators was called does not matter. A
kernel's operand whose map is

* the identity, is a reshape, which costs nothing;
* a permutation of axes, the last one staying, is read by an activation matmul with strides
  (``a_axes``, ``b_axes``);
* a choice of rows, is read by a weight matmul (as x or as residual) or a layer_norm through a
  table of rows,
* of rows made of equal pieces, as patches are, is read by a weight matmul through a table of those.

A kernel may also make what its only reader wants: an activation matmul stores heads side by side
(``out_axes``), a weight matmul or layer_norm makes its rows in another order, taking the rows of
its own operands (and of its residual) through the table.

=================================  ===========================================================
Swin's                             becomes
=================================  ===========================================================
roll, window partition             the table of rows of the layer_norm before it
split of the heads of q, k, v      strides of the operands of Q K^T and P V
merge of heads                     strides of P V's result
window reverse, roll back          the table of rows of the projection's x
patch merging                      the table of rows of the last linear before it
patches of the image               the table of pieces of the patch embedding
=================================  ===========================================================

A layout operator that fits none of these stays. Tables are int32 constants; no bit changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from schedules.isa import ISA

from .dialect.registry import is_vitq_call
from .values import shape_of

__all__ = ["FoldLayout"]

LAYOUT = ("relax.reshape", "relax.permute_dims", "relax.strided_slice", "relax.concat")
LINEAR = ("packed_linear", "packed_linear_requant", "packed_linear_requant_add")
MATMUL = ("matmul", "matmul_requant", "matmul_requant_add")


def _named(expr: relax.Expr, names: tuple[str, ...]) -> bool:
    return any(is_vitq_call(expr, name) for name in names)


@dataclass(frozen=True)
class Moved:
    """A variable whose elements are elements ``index`` (of its shape) of a flat ``source``."""

    source: relax.Var
    index: np.ndarray

    @property
    def identity(self) -> bool:
        """Whether elements lie as in the source, all of them."""
        flat, size = self.index.reshape(-1), int(np.prod(shape_of(self.source)))
        return flat.size == size and bool((flat == np.arange(size)).all())

    def rows(self, width: int) -> np.ndarray | None:
        """Return the source's rows of ``width`` elements that these are; None if not whole ones."""
        flat = self.index.reshape(-1)
        if flat.size % width or int(np.prod(shape_of(self.source))) % width:
            return None
        lines = flat.reshape(-1, width)
        first = lines[:, 0]
        if (first % width).any() or (lines != first[:, None] + np.arange(width)).any():
            return None
        return (first // width).astype(np.int32)

    def pieces(self, width: int) -> np.ndarray | None:
        """Return, for rows of ``width`` elements, the source's pieces that each is made of.

        The source is cut in the longest equal pieces that will do; None if they are single
        elements.
        """
        size = int(np.prod(shape_of(self.source)))
        if self.index.size % width:
            return None
        lines = self.index.reshape(-1, width)
        breaks = np.flatnonzero((np.diff(lines, axis=1) != 1).any(axis=0)) + 1
        starts = lines[:, np.concatenate([[0], breaks])]
        length = int(np.gcd.reduce(np.concatenate([breaks, starts.reshape(-1), [width, size]])))
        if length < 2:
            return None
        return (lines[:, ::length] // length).astype(np.int32)

    def permutation(self) -> tuple[list[int], list[int]] | None:
        """Return a shape of the source and the axes whose permutation this is, the last staying."""
        shape = self.index.shape
        origin = self.index.reshape(-1)[0]
        strides = []
        for axis, extent in enumerate(shape):
            place = [0] * len(shape)
            place[axis] = 1
            strides.append(int(self.index[tuple(place)] - origin) if extent > 1 else 0)
        # Axes of one element go in front: where they stand does not matter.
        order = sorted(range(len(shape)), key=lambda axis: (shape[axis] > 1, -strides[axis]))
        if order[-1] != len(shape) - 1:
            return None
        extents = [shape[axis] for axis in order]
        whole = np.arange(int(np.prod(shape_of(self.source)))).reshape(-1)
        axes = [order.index(axis) for axis in range(len(shape))]
        if whole.size != self.index.size:
            return None
        if (whole.reshape(extents).transpose(axes) != self.index).any():
            return None
        return extents, axes


def _layout(call: relax.Call, parts: list[Moved]) -> Moved | None:
    """Return the index map of a layout operator's result, None if it has several sources."""
    if any(part.source is not parts[0].source for part in parts):
        return None
    name, index = call.op.name, parts[0].index
    if name == "relax.reshape":
        index = index.reshape(shape_of(call))
    elif name == "relax.permute_dims":
        index = index.transpose([int(axis) for axis in call.attrs.axes])
    elif name == "relax.concat":
        index = np.concatenate([part.index for part in parts], int(call.attrs.axis))
    else:
        axes, begins, ends, *steps = ([int(v.value) for v in arg.fields] for arg in call.args[1:])
        if any(step < 1 for step in (steps[0] if steps else [])):
            return None
        place = [slice(None)] * index.ndim
        strides = steps[0] if steps else [1] * len(axes)
        for axis, begin, end, step in zip(axes, begins, ends, strides, strict=True):
            place[axis] = slice(begin, end, step)
        index = index[tuple(place)]
    return Moved(parts[0].source, index)


def _tensors(call: relax.Call) -> list[relax.Expr]:
    """Return the tensors that a layout operator moves."""
    first = call.args[0]
    return list(first.fields) if isinstance(first, relax.Tuple) else [first]


class _Fold:
    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.bindings = [b for block in func.body.blocks for b in block.bindings]
        self.made = {b.var: b.value for b in self.bindings}
        self.moved: dict[relax.Var, Moved] = {}
        self.reads: dict[relax.Var, list[tuple[relax.Call | None, int, Moved]]] = {}
        self._follow()
        self.stored: dict[relax.Var, list[int]] = {}  # matmuls: their out_axes
        self.order: dict[relax.Var, np.ndarray] = {}  # linears, layer_norms: their rows
        self._choose()

    # What is read, and how

    def _follow(self) -> None:
        """Find the index maps, and every kernel's readers."""
        for param in self.func.params:
            self._source(param)
        for binding in self.bindings:
            value = binding.value
            name = getattr(getattr(value, "op", None), "name", "")
            if name in LAYOUT and all(arg in self.moved for arg in _tensors(value)):
                moved = _layout(value, [self.moved[arg] for arg in _tensors(value)])
                if moved is not None:
                    self.moved[binding.var] = moved
                    continue
            self._source(binding.var)
            call = value if isinstance(value, relax.Call) else None
            for i, arg in enumerate(call.args if call is not None else [value]):
                self._read(call, i, arg)
        self._read(None, 0, self.func.body.body)

    def _source(self, var: relax.Var) -> None:
        if isinstance(var.ty, relax.TensorType):
            shape = shape_of(var)
            index = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
            self.moved[var] = Moved(var, index)
            self.reads[var] = []

    def _read(self, call: relax.Call | None, position: int, arg: relax.Expr) -> None:
        for expr in arg.fields if isinstance(arg, relax.Tuple) else [arg]:
            if isinstance(expr, relax.Var) and expr in self.moved:
                self.reads[self.moved[expr].source].append((call, position, self.moved[expr]))

    # What the kernels make

    def _choose(self) -> None:
        for var, reads in self.reads.items():
            value = self.made.get(var)
            if value is None or all(moved.identity for _, _, moved in reads):
                continue
            if _named(value, MATMUL):
                self._store_heads(var, reads)
            elif _named(value, LINEAR) or is_vitq_call(value, "layer_norm"):
                self._order_rows(var, value, reads)

    def _store_heads(
        self, var: relax.Var, reads: list[tuple[relax.Call | None, int, Moved]]
    ) -> None:
        """Let a matmul store heads side by side if then a weight matmul can read it by rows."""
        rank = len(shape_of(var))
        if len(reads) != 1 or rank < 3:
            return
        ((call, position, moved),) = reads
        if not (_named(call, LINEAR) and position == 0):
            return
        axes = [*range(rank - 3), rank - 2, rank - 3, rank - 1]
        if self._as_stored(moved, axes).rows(moved.index.shape[-1]) is not None:
            self.stored[var] = axes

    @staticmethod
    def _as_stored(moved: Moved, axes: list[int]) -> Moved:
        """Return the map into the source as it is stored, permuted by ``axes``."""
        shape = shape_of(moved.source)
        order = np.arange(moved.index.size if not shape else int(np.prod(shape)), dtype=np.int32)
        places = np.empty_like(order)
        places[order.reshape(shape).transpose(axes).reshape(-1)] = order
        return Moved(moved.source, places[moved.index])

    def _order_rows(
        self, var: relax.Var, value: relax.Call,
        reads: list[tuple[relax.Call | None, int, Moved]],
    ) -> None:
        """Let a kernel make its rows in the order in which all its readers want them."""
        table = reads[0][2].rows(shape_of(var)[-1])
        if table is None or len(table) != int(np.prod(shape_of(var)[:-1])):
            return
        if any(not np.array_equal(moved.index.reshape(-1), reads[0][2].index.reshape(-1))
               for _, _, moved in reads):
            return
        operands = [0, 5] if is_vitq_call(value, "packed_linear_requant_add") else [0]
        inputs = [self.moved.get(value.args[i]) for i in operands]
        if all(moved is not None and self._held(moved).identity for moved in inputs):
            self.order[var] = table

    # The new function

    def run(self) -> relax.Function:
        """Return the function with layout folded."""
        self.bb = relax.BlockBuilder()
        params = [relax.Var(p.name, p.ty) for p in self.func.params]
        self.values: dict[relax.Var, relax.Expr] = dict(
            zip(self.func.params, params, strict=True))
        self.plain: dict[relax.Var, relax.Expr] = {}
        self.tables: dict[tuple[tuple[int, ...], bytes], relax.Expr] = {}
        name = str(self.func.attrs["global_symbol"])
        with self.bb.function(name, params, attrs={"global_symbol": name}):
            with self.bb.dataflow():
                for binding in self.bindings:
                    if binding.var in self.reads or binding.var not in self.moved:
                        value = self._kernel(binding.var, binding.value)
                        self.values[binding.var] = self.bb.emit(value, binding.var.name)
                out = self.bb.emit_output(self._plain_value(self.func.body.body))
            self.bb.emit_func_output(out)
        return self.bb.get()[name]

    def _kernel(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        if not isinstance(value, relax.Call):
            return self._plain_value(value)
        extra: dict[str, object] = {}
        args = list(value.args)
        folded: set[int] = set()
        rows: np.ndarray | None = None
        if _named(value, MATMUL):
            for i, key in enumerate(("a_axes", "b_axes")):
                found = self._permuted(args[i])
                if found is not None:
                    args[i], extra[key] = found
                    folded.add(i)
            if var in self.stored:
                extra["out_axes"] = self.stored[var]
        elif _named(value, LINEAR) or is_vitq_call(value, "layer_norm"):
            linear = _named(value, LINEAR)
            operands = {0: "x", 5: "residual"} if linear and len(args) == 6 else {0: "x"}
            rows, gather = self.order.get(var), "both" if len(operands) == 2 else "x"
            for i, name in operands.items():
                taken = self._rows(args[i], i > 0 or not linear) if rows is None else None
                if taken is not None:
                    args[i], rows = taken
                    gather = name
                    folded.add(i)
            if rows is not None:
                if linear:
                    extra["gather"] = gather
                for i in operands:
                    if i not in folded:
                        args[i] = self._matrix(self._plain_value(args[i]))
                folded |= operands.keys()
        args = [args[i] if i in folded else self._plain_value(arg)
                for i, arg in enumerate(args)]
        if rows is not None:
            args.append(self._table(rows))
        if not extra:
            return relax.Call(value.op, args, value.attrs)
        attrs = {key: value.attrs[key] for key in value.attrs.keys()}  # noqa: SIM118
        node = tvm.ir.make_node("ir.DictAttrs", **attrs, **extra)
        return relax.Call(value.op, args, node)

    def _table(self, rows: np.ndarray) -> relax.Expr:
        return self.tables.setdefault((rows.shape, rows.tobytes()), relax.const(rows))

    def _matrix(self, expr: relax.Expr) -> relax.Expr:
        shape = shape_of(expr)
        return self._reshape(expr, (int(np.prod(shape[:-1])), shape[-1]))

    def _reshape(self, expr: relax.Expr, shape: tuple[int, ...]) -> relax.Expr:
        if shape_of(expr) == tuple(shape):
            return expr
        return self.bb.emit(relax.op.reshape(expr, shape))

    def _held(self, moved: Moved) -> Moved:
        """Return the map into what the source's kernel really stores."""
        if moved.source in self.stored:
            return self._as_stored(moved, self.stored[moved.source])
        if moved.source in self.order:
            # Its rows are made in the order in which all readers take them.
            whole = np.arange(moved.index.size, dtype=np.int32)
            return Moved(moved.source, whole.reshape(moved.index.shape))
        return moved

    def _permuted(self, expr: relax.Expr) -> tuple[relax.Expr, list[int]] | None:
        """Return tensor and axes that make an operand of a matmul, if it is permuted."""
        moved = self.moved.get(expr) if isinstance(expr, relax.Var) else None
        if moved is None:
            return None
        held = self._held(moved)
        found = None if held.identity else held.permutation()
        if found is None:
            return None
        shape, axes = found
        return self._reshape(self.values[held.source], tuple(shape)), axes

    def _rows(self, expr: relax.Expr, whole: bool) -> tuple[relax.Expr, np.ndarray] | None:
        """Return matrix and table of its rows (only ``whole`` ones?) that make an x, if moved."""
        moved = self.moved.get(expr) if isinstance(expr, relax.Var) else None
        if moved is None:
            return None
        held, width = self._held(moved), moved.index.shape[-1]
        if held.identity:
            return None
        rows = held.rows(width)
        if rows is None and not whole:
            rows = held.pieces(width)
        if rows is None:
            return None
        width //= rows[0].size
        size = int(np.prod(shape_of(held.source)))
        return self._reshape(self.values[held.source], (size // width, width)), rows

    def _plain_value(self, expr: relax.Expr) -> relax.Expr:
        """Return a value in its own layout: a reshape if that will do, else the operators."""
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._plain_value(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._plain_value(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            return relax.Call(expr.op, [self._plain_value(arg) for arg in expr.args], expr.attrs)
        if not isinstance(expr, relax.Var):
            return expr
        moved = self.moved.get(expr)
        if moved is None:
            return self.values[expr]
        if expr not in self.plain:
            if self._held(moved).identity:
                value = self._reshape(self.values[moved.source], moved.index.shape)
            else:
                value = self.bb.emit(self._plain_value(self.made[expr]), expr.name)
            self.plain[expr] = value
        return self.plain[expr]


@tvm.transform.module_pass(opt_level=0, name="vitq.FoldLayout")
class FoldLayout:
    """Fold layout operators into kernels, where the instruction set has kernels."""

    def __init__(self, isa: ISA) -> None:
        self.isa = isa

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite every Relax function of the module."""
        if not self.isa.has_kernels:
            return mod
        result = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                result.update_func(gvar, _Fold(func).run())
        return relax.transform.DeadCodeElimination()(result)
