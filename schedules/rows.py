"""Hand-made loops for operators over rows: softmax, LayerNorm, GELU and other elementwise ones.

A PrimFunc qualifies if its last stage runs over ``[..., C]`` and every other stage is of the same
rows: over elements ``[..., C]``, over rows ``[...]``, or a reduction of the last axis. All stages
of a few rows run one after the other inside one parallel loop, so intermediates stay in the
first-level cache; several rows at once let the processor overlap the short dependency chains of one
row (a sum, a division, a root) with work on the next. Element stages are vector code of
``schedules.lanes``; a row whose length is no multiple of the vector ends with a vector that
overlaps the one before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm_ffi
from tvm import s_tir, tirx

from .builder import Writer, load, ramp
from .elementwise import is_lookup
from .isa import ISA
from .lanes import Lanes, Unsupported, Value
from .reductions import reduction
from .spaces.rows import default_rows, rows_task
from .task import Point, Task
from .words import words_for

__all__ = ["Stage", "lower_rows", "row_passes", "row_stages", "stage_of", "task_of_rows"]


@dataclass
class Stage:
    """One block: what it stores, over which axes.

    ``kind`` is "element" (``column`` is its last axis), "row", a reduction over ``column`` ("Add"
    or "Max"), or "map" of a block that is not sorted into rows and elements yet.
    """

    name: str
    rows: list[Any]
    column: Any
    buffer: Any
    value: Any
    kind: str


def stage_of(block: Any) -> Stage | None:
    """Return what a block stores, None if it is no plain stage."""
    store = block.body
    if not isinstance(store, tirx.BufferStore):
        return None
    spatial = [v for v in block.iter_vars if int(v.iter_type) == 0]
    reduced = [v for v in block.iter_vars if int(v.iter_type) == 2]
    if len(reduced) > 1 or len(spatial) != len(store.indices):
        return None
    if not all(i.same_as(v.var) for i, v in zip(store.indices, spatial, strict=True)):
        return None
    names = [v.var for v in spatial]
    if not reduced:
        return Stage(block.name_hint, names, None, store.buffer, store.value, "map")
    kind = type(store.value).__name__
    if kind not in ("Add", "Max"):
        return None
    value = store.value.b
    return Stage(block.name_hint, names, reduced[0].var, store.buffer, value, kind)


def row_stages(func: tirx.PrimFunc, blocks: Sequence[Any]) -> list[Stage] | None:
    """Return the stages with element stages' last axis split off, None if they do not qualify."""
    stages = [stage_of(block) for block in blocks]
    if not stages or any(stage is None for stage in stages):
        return None
    last = stages[-1]
    assert last is not None
    shape = [int(extent) for extent in last.buffer.shape]
    if last.kind != "map" or not last.rows or not last.buffer.same_as(func.params[-1]):
        return None
    found: list[Stage] = []
    for stage in stages:
        assert stage is not None
        extents = [int(extent) for extent in stage.buffer.shape]
        if stage.kind == "map" and extents == shape:
            *rows, column = stage.rows
            found.append(Stage(stage.name, rows, column, stage.buffer, stage.value, "element"))
        elif stage.kind == "map" and extents == shape[:-1]:
            found.append(Stage(stage.name, stage.rows, None, stage.buffer, stage.value, "row"))
        elif stage.kind in ("Add", "Max") and extents == shape[:-1]:
            found.append(stage)
        else:
            return None
    return found


def _bytes(buffer: Any) -> int:
    return int(np.dtype(str(buffer.dtype)).itemsize)


def _local_bytes(stages: Sequence[Stage]) -> int:
    """Return the bytes that a row's element stages take, 0 if there are no others."""
    if all(stage.kind == "element" for stage in stages):
        return 0
    return sum(int(s.buffer.shape[-1]) * _bytes(s.buffer) for s in stages if s.kind == "element")


def task_of_rows(func: tirx.PrimFunc, blocks: Sequence[s_tir.SBlock]) -> Task | None:
    """Return the task of a PrimFunc that :func:`lower_rows` may take, else None."""
    stages = row_stages(func, blocks)
    if stages is None or is_lookup(blocks[-1]):
        return None
    return rows_task(func, _local_bytes(stages))


def row_passes(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Group neighbouring stages that one loop over rows can hold.

    Row stages go together, element stages and reductions too, except that nothing may read a
    reduction of its own pass, and an element stage is read where it is stored only.
    """
    groups: list[list[Stage]] = []
    for stage in stages:
        last = groups[-1] if groups else []
        same = bool(last) and (stage.kind == "row") == (last[0].kind == "row")
        blocked = {s.buffer for s in last if s.kind in ("Add", "Max")}
        elements = [s for s in last if s.kind == "element"]
        if same and not (blocked & _reads(stage.value)) and not (
                elements and stage.kind == "element"):
            last.append(stage)
        else:
            groups.append([stage])
    return groups


def _reads(value: Any) -> set[Any]:
    """Return the buffers that an expression loads from."""
    found: set[Any] = set()

    def visit(node: Any) -> None:
        if type(node).__name__ == "TensorLoad":
            found.add(node.source)

    tvm_ffi.structural_walk(value, (object, visit))
    return found


class _Rows:
    def __init__(
        self, func: tirx.PrimFunc, stages: list[Stage], isa: ISA, point: Point | None
    ) -> None:
        self.params = list(func.params)
        self.stages = stages
        self.w = Writer()
        self.out = stages[-1].buffer
        *outer, self.length = (int(extent) for extent in self.out.shape)
        self.outer = outer
        self.rows = 1
        for extent in outer:
            self.rows *= extent
        if point is None:
            point = default_rows(isa, self.rows, self.length, _local_bytes(stages))
        self.width, self.block = int(point["width"]), int(point["block"])
        self.words = words_for(isa, self.width)

    def build(self, attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        w = self.w
        self.column_axis: Any = None
        self.stored: dict[Any, Value] = {}
        count = -(-self.rows // self.block)
        with w.loop("rows", count, "parallel") as group:
            self.local: dict[Any, Any] = {}
            self.intervals: dict[Any, tuple[int, int]] = {}
            for stage in self.stages[:-1]:
                row_length = self.length if stage.kind == "element" else 1
                dtype = str(stage.buffer.dtype)
                size = self.block * row_length
                self.local[stage.buffer] = w.alloc(stage.name, (size,), dtype)
            for stages in row_passes(self.stages):
                with w.loop("row", self.block) as slot:
                    row = group * self.block + slot
                    if self.rows % self.block:
                        row = tirx.min(row, tirx.const(self.rows - 1, "int32"))
                    self._pass(stages, w.bind("index", row), slot)
        return w.prim_func(self.params, attrs)

    def _pass(self, stages: list[Stage], row: Any, slot: Any) -> None:
        """Write one pass over a row: row stages, or element stages and reductions."""
        self.slot = slot
        self.axes = dict(zip(stages[0].rows, self._split(row), strict=True))
        for stage in stages:
            self.axes.update(zip(stage.rows, self._split(row), strict=True))
        if stages[0].kind == "row":
            for stage in stages:
                value = self._lanes(None).translate(stage.value)
                dtype = str(stage.buffer.dtype)
                code = value.code if value.dtype == dtype else tirx.Cast(dtype, value.code)
                self.w.store(self.local[stage.buffer], code, slot)
            return
        sums = {s.buffer: reduction(self.w, s.kind, s.value, str(s.buffer.dtype), self.words,
                                    self.length)
                for s in stages if s.kind in ("Add", "Max")}
        if not sums:
            with self.w.loop("j", -(-self.length // self.width)) as j:
                column = j * self.width
                if self.length % self.width:
                    column = tirx.min(column, tirx.const(self.length - self.width, "int32"))
                self._columns(stages, self.w.bind("column", column), sums, self.width)
            return
        whole, rest = divmod(self.length, self.width)
        with self.w.loop("j", whole) as j:
            self._columns(stages, self.w.bind("column", j * self.width), sums, self.width)
        if rest:
            self._columns(stages, tirx.const(self.length - self.width, "int32"), sums, rest)
        for buffer, total in sums.items():
            self.w.store(self.local[buffer], total.result(), slot)

    def _columns(self, stages: list[Stage], column: Any, sums: Mapping[Any, Any],
                 fresh: int) -> None:
        """Write one vector of columns, the last ``fresh`` of which were not seen before."""
        lanes = self._lanes(column)
        for stage in stages:
            self.column_axis = stage.column
            if stage.kind == "element":
                self._element(stage, lanes, lanes.translate(stage.value), column)
            else:
                sums[stage.buffer].step(lanes, fresh)

    def _split(self, row: Any) -> list[Any]:
        """Return the outer indices of a flat row number."""
        indices: list[Any] = []
        for extent in reversed(self.outer[1:]):
            indices.insert(0, tirx.floormod(row, extent))
            row = tirx.floordiv(row, extent)
        return [row, *indices] if self.outer else []

    def _element(self, stage: Stage, lanes: Lanes, value: Value, column: Any) -> None:
        dtype = str(stage.buffer.dtype)
        code = lanes.to(value, dtype, True).code
        if stage.buffer in self.local:
            self.intervals[stage.buffer] = value.lo, value.hi
            self.w.store(self.local[stage.buffer], code, self.slot * self.length + column,
                         lanes=self.width)
            self.stored = {stage.buffer: replace(value, code=code, dtype=dtype, vector=True)}
        else:
            at = [self.axes[v] for v in stage.rows]
            self.w.store(self.out, code, *at, column, lanes=self.width)

    def _lanes(self, column: Any) -> Lanes:
        """Return a translator for one vector of columns (or for a row's scalars)."""
        lanes: Lanes
        self.stored = {}
        self.column_axis = None

        def read(expr: Any) -> Value:
            return self._read(lanes, column, expr)

        lanes = Lanes(self.w, self.words, read)
        return lanes

    def _read(self, lanes: Lanes, column: Any, expr: Any) -> Value:
        buffer, indices = expr.source, list(expr.indices)
        dtype = str(buffer.dtype)
        axis = self.column_axis
        along = [i for i in indices if axis is not None and i.same_as(axis)]
        # Stages of one pass have axes of their own for the same row and column.
        key = (buffer.name, *("column" if axis is not None and i.same_as(axis)
                              else str(self.axes.get(i, i)) for i in indices))
        if along and buffer in self.stored:
            return self.stored[buffer]
        if buffer in self.local:
            if not along:
                return lanes.leaf(key, load(self.local[buffer], self.slot), dtype, False)
            at = self.slot * self.length + column
            return lanes.leaf(key, load(self.local[buffer], at, lanes=self.width), dtype, True,
                              self.intervals[buffer])
        places = []
        for index in indices[:-1]:
            places.append(self._scalar_index(index))
        last = indices[-1]
        if along and last.same_as(axis):
            code = tirx.BufferLoad(buffer, [*places, ramp(column, self.width)])
            return lanes.leaf(key, code, dtype, True)
        if not along and (isinstance(last, tirx.IntImm) or last in self.axes):
            code = tirx.BufferLoad(buffer, [*places, self._scalar_index(last)])
            return lanes.leaf(key, code, dtype, False)
        position = lanes.translate(last) if not along else None
        if position is None or places:
            raise Unsupported("index")
        index = lanes.to(position, "int32", position.vector)
        code = tirx.BufferLoad(buffer, [index.code])
        return lanes.leaf((buffer.name, index.number), code, dtype, position.vector)

    def _scalar_index(self, index: Any) -> Any:
        if isinstance(index, tirx.IntImm):
            return tirx.const(int(index), "int32")
        if index in self.axes:
            return self.axes[index]
        if type(index).__name__ == "TensorLoad" and str(index.source.dtype) == "int32":
            # A table of rows: one number a row.
            places = [self._scalar_index(i) for i in index.indices]
            return self.w.bind("place", tirx.BufferLoad(index.source, places))
        raise Unsupported("index")


def lower_rows(
    func: tirx.PrimFunc, blocks: Sequence[s_tir.SBlock], isa: ISA, attrs: Mapping[str, Any],
    point: Point | None = None,
) -> tirx.PrimFunc | None:
    """Return ``func`` as vector loops over rows, None if it does not qualify.

    Parameters
    ----------
    func
        An unscheduled PrimFunc made of TE stages.
    blocks
        Its blocks in order, without the root.
    isa
        Instruction set of the target.
    attrs
        Attributes of the new PrimFunc.
    point
        Of :mod:`schedules.spaces.rows`; None for the default.
    """
    stages = row_stages(func, blocks)
    if stages is None or is_lookup(blocks[-1]):
        return None
    try:
        return _Rows(func, stages, isa, point).build(attrs)
    except Unsupported:
        return None
