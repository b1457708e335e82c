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
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx

from .builder import Writer, const, load, ramp, vector_type
from .elementwise import is_lookup
from .isa import ISA
from .lanes import Lanes, Unsupported, Value, limits

__all__ = ["lower_rows"]

MULHRS = {16: "llvm.x86.avx2.pmul.hr.sw", 32: "llvm.x86.avx512.pmul.hr.sw.512"}
CACHE_BYTES = 12 * 1024


@dataclass
class _Stage:
    """One block: what it stores, over which axes."""

    name: str
    rows: list[Any]
    column: Any
    buffer: Any
    value: Any
    kind: str


def _stage(block: Any) -> _Stage | None:
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
        return _Stage(block.name_hint, names, None, store.buffer, store.value, "map")
    kind = type(store.value).__name__
    if kind not in ("Add", "Max"):
        return None
    value = store.value.b
    return _Stage(block.name_hint, names, reduced[0].var, store.buffer, value, kind)


def _stages(func: tirx.PrimFunc, blocks: Sequence[Any]) -> list[_Stage] | None:
    """Return the stages with element stages' last axis split off, None if they do not qualify."""
    stages = [_stage(block) for block in blocks]
    if not stages or any(stage is None for stage in stages):
        return None
    last = stages[-1]
    assert last is not None
    shape = [int(extent) for extent in last.buffer.shape]
    if last.kind != "map" or not last.rows or not last.buffer.same_as(func.params[-1]):
        return None
    found: list[_Stage] = []
    for stage in stages:
        assert stage is not None
        extents = [int(extent) for extent in stage.buffer.shape]
        if stage.kind == "map" and extents == shape:
            *rows, column = stage.rows
            found.append(_Stage(stage.name, rows, column, stage.buffer, stage.value, "element"))
        elif stage.kind == "map" and extents == shape[:-1]:
            found.append(_Stage(stage.name, stage.rows, None, stage.buffer, stage.value, "row"))
        elif stage.kind in ("Add", "Max") and extents == shape[:-1]:
            found.append(stage)
        else:
            return None
    return found


class _Rows:
    def __init__(self, func: tirx.PrimFunc, stages: list[_Stage], isa: ISA) -> None:
        self.params = list(func.params)
        self.stages = stages
        self.w = Writer()
        self.out = stages[-1].buffer
        *outer, self.length = (int(extent) for extent in self.out.shape)
        self.outer = outer
        self.rows = 1
        for extent in outer:
            self.rows *= extent
        self.width = isa.vector_bits // 16
        while self.width > 1 and (
            self.width > self.length
            or (-(-self.length // self.width) * self.width > 1.1 * self.length
            and self.width > 16)
        ):
            self.width //= 2
        self.mulhrs = MULHRS.get(self.width, "") if isa.has_kernels else ""
        local = sum(self.length * 4 for s in stages if s.column is not None)
        self.block = max(1, min(8, CACHE_BYTES // max(local, 1), self.rows))
        if all(stage.kind == "element" for stage in stages):
            self.block = 1

    def build(self, attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        w = self.w
        count = -(-self.rows // self.block)
        with w.loop("rows", count, "parallel") as group:
            self.local: dict[Any, Any] = {}
            for stage in self.stages[:-1]:
                row_length = self.length if stage.kind == "element" else 1
                dtype = str(stage.buffer.dtype)
                size = self.block * row_length
                self.local[stage.buffer] = w.alloc(stage.name, (size,), dtype)
            for stage in self.stages:
                with w.loop("row", self.block) as slot:
                    row = group * self.block + slot
                    if self.rows % self.block:
                        row = tirx.min(row, tirx.const(self.rows - 1, "int32"))
                    self._stage(stage, w.bind("index", row), slot)
        return w.prim_func(self.params, attrs)

    def _stage(self, stage: _Stage, row: Any, slot: Any) -> None:
        self.slot = slot
        self.axes = dict(zip(stage.rows, self._split(row), strict=True))
        if stage.kind == "row":
            value = self._lanes(stage, None).translate(stage.value)
            code = value.code if value.dtype == str(stage.buffer.dtype) else tirx.Cast(
                str(stage.buffer.dtype), value.code)
            self.w.store(self.local[stage.buffer], code, slot)
        elif stage.kind == "element":
            self._over_columns(lambda column: self._element(stage, column))
        else:
            self._reduce(stage)

    def _split(self, row: Any) -> list[Any]:
        """Return the outer indices of a flat row number."""
        indices: list[Any] = []
        for extent in reversed(self.outer[1:]):
            indices.insert(0, tirx.floormod(row, extent))
            row = tirx.floordiv(row, extent)
        return [row, *indices] if self.outer else []

    def _over_columns(self, body: Any) -> None:
        with self.w.loop("j", -(-self.length // self.width)) as j:
            column = j * self.width
            if self.length % self.width:
                column = tirx.min(column, tirx.const(self.length - self.width, "int32"))
            body(self.w.bind("column", column))

    def _element(self, stage: _Stage, column: Any) -> None:
        lanes = self._lanes(stage, column)
        value = lanes.to(lanes.translate(stage.value), str(stage.buffer.dtype), True)
        if stage.buffer in self.local:
            self.w.store(self.local[stage.buffer], value.code, self.slot * self.length + column,
                         lanes=self.width)
        else:
            at = [self.axes[v] for v in stage.rows]
            self.w.store(self.out, value.code, *at, column, lanes=self.width)

    def _reduce(self, stage: _Stage) -> None:
        """Reduce the last axis: vector accumulator, then halves folded onto each other."""
        w, width = self.w, self.width
        dtype = str(stage.buffer.dtype)
        full = vector_type(dtype, width)
        identity = limits(dtype)[0] if stage.kind == "Max" else 0
        acc = w.alloc("acc", (width,), dtype)
        w.store(acc, const(identity, full), 0, lanes=width)
        fold = tirx.max if stage.kind == "Max" else (lambda a, b: a + b)

        def step(column: Any, fresh: int) -> None:
            lanes = self._lanes(stage, column)
            code = lanes.to(lanes.translate(stage.value), dtype, True).code
            if fresh < width and stage.kind == "Add":
                mask = [tirx.const(-(i >= width - fresh), dtype) for i in range(width)]
                keep = tirx.Shuffle(mask, [tirx.const(i, "int32") for i in range(width)])
                code = tirx.bitwise_and(code, keep)
            w.store(acc, fold(load(acc, 0, lanes=width), code), 0, lanes=width)

        whole, rest = divmod(self.length, width)
        with w.loop("j", whole) as j:
            step(w.bind("column", j * width), width)
        if rest:
            step(tirx.const(self.length - width, "int32"), rest)
        value, n = load(acc, 0, lanes=width), width
        while n > 1:
            n //= 2
            value = w.bind("whole", value)
            low, high = (tirx.Shuffle([value], [tirx.const(i + at, "int32") for i in range(n)])
                         for at in (0, n))
            value = fold(low, high)
        w.store(self.local[stage.buffer], value, self.slot)

    def _lanes(self, stage: _Stage, column: Any) -> Lanes:
        """Return a translator for one vector of columns (or for a row's scalars)."""
        lanes: Lanes

        def read(expr: Any) -> Value:
            return self._read(lanes, stage, column, expr)

        lanes = Lanes(self.w, self.width, read, self.mulhrs)
        return lanes

    def _read(self, lanes: Lanes, stage: _Stage, column: Any, expr: Any) -> Value:
        buffer, indices = expr.source, list(expr.indices)
        dtype = str(buffer.dtype)
        along = [i for i in indices if stage.column is not None and i.same_as(stage.column)]
        key = (buffer.name, *(str(i) for i in indices))
        if buffer in self.local:
            if not along:
                return lanes.leaf(key, load(self.local[buffer], self.slot), dtype, False)
            at = self.slot * self.length + column
            return lanes.leaf(key, load(self.local[buffer], at, lanes=self.width), dtype, True)
        places = []
        for index in indices[:-1]:
            places.append(self._scalar_index(index))
        last = indices[-1]
        if along and last.same_as(stage.column):
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
        raise Unsupported("index")


def lower_rows(
    func: tirx.PrimFunc, blocks: Sequence[s_tir.SBlock], isa: ISA, attrs: Mapping[str, Any]
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
    """
    stages = _stages(func, blocks)
    if stages is None or is_lookup(blocks[-1]):
        return None
    try:
        return _Rows(func, stages, isa).build(attrs)
    except Unsupported:
        return None
