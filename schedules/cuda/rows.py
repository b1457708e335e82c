"""Operators over rows on a GPU: LayerNorm, softmax, GELU, requantisation, sums of tensors.

A PrimFunc qualifies as in :mod:`schedules.rows`: its stages are over elements ``[..., C]``, over
rows, or reductions of the last axis. A row belongs to ``lanes`` neighbouring threads of a warp;
each of them holds chunks of ``width`` neighbouring elements in registers; reductions go through
registers and shuffles, and what is computed once a row is computed by all of its lanes. So a row is
read once and written once, and there is neither shared memory nor a barrier.

What the elements are is the PrimFunc's own expressions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx

from schedules.builder import const, load
from schedules.rows import Stage, row_passes, row_stages

from .elementwise import cast, index_of
from .expression import Expressions, loads_of
from .row_tile import MOST_HELD, RowTile, default_row_tile
from .writer import CudaWriter, pointer

__all__ = ["lower_rows"]


class _Rows:
    """Writes the kernel; the methods stand in the order in which they run."""

    def __init__(self, func: tirx.PrimFunc, stages: list[Stage], tile: RowTile | None) -> None:
        self.params = list(func.params)
        self.stages = stages
        self.out = stages[-1].buffer
        *self.outer, self.length = (int(extent) for extent in self.out.shape)
        self.rows = int(np.prod(self.outer, dtype=np.int64))
        self.sums = [stage for stage in stages if stage.kind in ("Add", "Max")]
        along = [b for b in self.params if b.shape and int(b.shape[-1]) == self.length]
        itemsize = max(np.dtype(str(b.dtype)).itemsize for b in along if len(b.shape) > 1 or b is
                       self.out)
        # Rows of another operand may be longer (a part of them is taken); chunks are aligned there.
        aligned = math.gcd(self.length, *(
            int(node.source.shape[-1]) for stage in stages for node in loads_of(stage.value)
            if node.indices and node.indices[-1].same_as(stage.column)))
        tile = tile or default_row_tile(self.rows, self.length, itemsize, len(self.sums), aligned)
        self.tile = tile
        self.chunks = -(-self.length // (tile.lanes * tile.width))
        self.held = self.chunks * tile.width <= MOST_HELD
        self.full = self.chunks * tile.lanes * tile.width == self.length

    def build(self, attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        tile, block = self.tile, self.tile.warps * (32 // self.tile.lanes)
        w = self.w = CudaWriter((-(-self.rows // block),), 32 * tile.warps)
        self.flat = {buffer: w.flat(buffer) for buffer in self.params}
        index = w.block[0] * block + tirx.floordiv(w.thread, const(tile.lanes, "int32"))
        self.row = w.bind("row", index)
        self.inside = None
        if self.rows % block:
            # The last block's spare threads repeat the last row and store nothing.
            self.inside = w.bind("inside", self.row < self.rows)
            self.row = w.bind("row", tirx.min(self.row, const(self.rows - 1, "int32")))
        self.lane = w.bind("place", tirx.floormod(w.thread, const(tile.lanes, "int32")))
        self.places = [w.bind("index", i) if i is not self.row else i
                       for i in self._split(self.row)]
        self.scalars: dict[Any, Any] = {}     # row stages and results of reductions
        self.kept: dict[Any, Any] = {}        # element stages held in registers
        self.words: dict[Any, Any] = {}       # operands along rows held in registers
        self.again = self._read_again() if self.held else set()
        for stages in row_passes(self.stages):
            if stages[0].kind == "row":
                for stage in stages:
                    self._row_stage(stage)
            else:
                self._pass(stages)
        return w.prim_func(self.params, attrs)

    def _split(self, row: Any) -> list[Any]:
        """Return the outer indices of a flat row number."""
        indices: list[Any] = []
        for extent in reversed(self.outer[1:]):
            indices.insert(0, tirx.floormod(row, const(extent, "int32")))
            row = tirx.floordiv(row, const(extent, "int32"))
        return [row, *indices] if self.outer else []

    # Passes

    def _row_stage(self, stage: Stage) -> None:
        self._keep(stage, self._expressions(stage, None, {}).code(stage.value))

    def _keep(self, stage: Stage, value: Any) -> None:
        """Keep a row's number in a register array.

        TVM would write out a bound value anew wherever it is used, and a LayerNorm's chain of them
        would grow to a thousand times.
        """
        held = self.w.registers(stage.name, 1, str(stage.buffer.dtype))
        self.w.store(held, value, 0)
        self.scalars[stage.buffer] = load(held, 0)

    def _pass(self, stages: list[Stage]) -> None:
        """Write one walk over the row's chunks."""
        w, tile = self.w, self.tile
        sums = [stage for stage in stages if stage in self.sums]
        totals = {stage.buffer: w.registers(stage.name, 1, str(stage.buffer.dtype))
                  for stage in sums}
        for stage in sums:
            w.store(totals[stage.buffer], _start(stage), 0)
        for stage in stages:
            if stage.kind == "element" and stage is not self.stages[-1] and self.held:
                size = self.chunks * tile.width
                self.kept[stage.buffer] = w.registers(stage.name, size, str(stage.buffer.dtype))
        operands = self._operands(stages)
        fresh = {key: self._hold(key) for key in operands
                 if key in self.again and key not in self.words}
        self.words |= fresh
        loop = w.unrolled if self.held else w.loop
        with loop("chunk", self.chunks) as chunk:
            column = w.bind("column", (chunk * tile.lanes + self.lane) * tile.width)
            guard = nullcontext() if self.full else w.when(column < self.length)
            with guard:
                words = {}
                for key, index in operands.items():
                    if key in self.again:
                        words[key] = self.words[key], chunk * self._count(key)
                        if key in fresh:
                            self._load(key, index, column, *words[key])
                    else:
                        words[key] = self._hold(key, 1), const(0, "int32")
                        self._load(key, index, column, *words[key])
                self._chunk(stages, chunk, column, words, totals)
        for stage in sums:
            self._join(stage, totals[stage.buffer])

    def _chunk(self, stages: list[Stage], chunk: Any, column: Any, words: Mapping[Any, Any],
               totals: Mapping[Any, Any]) -> None:
        w, tile = self.w, self.tile
        last = stages[-1] if stages[-1] is self.stages[-1] else None
        results = w.registers("result", tile.width, str(self.out.dtype)) if last else None
        with w.unrolled("i", tile.width) as i:
            place = (chunk * tile.width + i, column + i)
            for stage in stages:
                value = self._expressions(stage, place, words, i).code(stage.value)
                if stage.buffer in totals:
                    total = load(totals[stage.buffer], 0)
                    joined = total + value if stage.kind == "Add" else tirx.max(total, value)
                    w.store(totals[stage.buffer], joined, 0)
                elif stage is last:
                    w.store(results, value, i)
                elif self.held:
                    w.store(self.kept[stage.buffer], value, place[0])
        if last is not None:
            with self._valid_row():
                self._store(results, column)

    @contextmanager
    def _valid_row(self) -> Iterator[None]:
        with nullcontext() if self.inside is None else self.w.when(self.inside):
            yield

    def _join(self, stage: Stage, total: Any) -> None:
        """Reduce the partial results of a row's lanes; all of them get the result."""
        w, by = self.w, self.tile.lanes // 2
        value = load(total, 0)
        dtype = str(stage.buffer.dtype)
        while by:
            w.store(total, value, 0)
            value = load(total, 0)
            other = self._shuffle(value, dtype, by)
            value = value + other if stage.kind == "Add" else tirx.max(value, other)
            by //= 2
        self.scalars[stage.buffer] = w.bind(stage.name, value)

    def _shuffle(self, value: Any, dtype: str, by: int) -> Any:
        if dtype != "int64":
            other = self.w.value("vitq_shuffle_xor", cast(value, "int32"), by)
            return cast(other, dtype)
        # Two halves, put together again without a sign in the low one.
        half = const(32, "int64")
        low = self.w.value("vitq_shuffle_xor", cast(value, "int32"), by)
        high = self.w.value("vitq_shuffle_xor", cast(value >> half, "int32"), by)
        wide = cast(low, "int64") & const(2**32 - 1, "int64")
        return (cast(high, "int64") << half) | wide

    # Operands along rows

    def _operands(self, stages: Sequence[Stage]) -> dict[Any, list[Any]]:
        """Return the operands that are read along the row: key -> outer indices, in place."""
        found: dict[Any, list[Any]] = {}
        for stage in self._with_inlined(stages):
            def visit(node: Any, stage: Stage = stage) -> None:
                if type(node).__name__ != "TensorLoad" or node.source not in self.flat:
                    return
                *outer, last = node.indices
                if stage.column is not None and last.same_as(stage.column):
                    key = self._key(stage, node)
                    if key not in found:
                        found[key] = [self._outer(stage, i) for i in outer]

            tvm_ffi.structural_walk(stage.value, (object, visit))
        return found

    def _with_inlined(self, stages: Sequence[Stage]) -> list[Stage]:
        """Return the stages and, where elements are not held, those that they are made of."""
        if self.held:
            return list(stages)
        return [stage for stage in self.stages if stage.kind == "element" or stage in stages]

    def _read_again(self) -> set[Any]:
        """Return the operands that more than one pass reads."""
        counts: dict[Any, int] = {}
        for stages in row_passes(self.stages):
            for key in self._operands(stages) if stages[0].kind != "row" else ():
                counts[key] = counts.get(key, 0) + 1
        return {key for key, count in counts.items() if count > 1}

    def _key(self, stage: Stage, node: Any) -> Any:
        names = {v: f"#{i}" for i, v in enumerate(stage.rows)}
        return (node.source, *(names.get(i, str(i)) for i in list(node.indices)[:-1]))

    def _outer(self, stage: Stage, index: Any) -> Any:
        """Return an outer index of an operand in the kernel."""
        if isinstance(index, tirx.IntImm):
            return const(int(index), "int32")
        if index in stage.rows:
            return self.places[stage.rows.index(index)]
        return index_of(self._expressions(stage, None, {}).code(index))

    def _count(self, key: Any) -> int:
        """Return the registers that a chunk of an operand takes."""
        size = self.tile.width * _bytes(key[0])
        return size // 4 if size % 4 == 0 else self.tile.width

    def _hold(self, key: Any, chunks: int | None = None) -> Any:
        count = (self.chunks if chunks is None else chunks) * self._count(key)
        packed = self.tile.width * _bytes(key[0]) % 4 == 0
        return self.w.registers("words", count, "int32" if packed else str(key[0].dtype))

    def _at(self, buffer: Any, outer: Sequence[Any], column: Any) -> Any:
        """Return the place of an element in a flat buffer."""
        place: Any = const(0, "int32")
        for index, extent in zip(outer, buffer.shape, strict=False):
            if not self._within(index, int(extent)):
                top = const(int(extent) - 1, "int32")
                index = tirx.max(tirx.min(index, top), const(0, "int32"))
            place = place * int(extent) + index
        return place * int(buffer.shape[-1]) + column

    def _within(self, index: Any, extent: int) -> bool:
        """Whether an outer index is surely one of an axis; what a condition guards need not be."""
        if isinstance(index, tirx.IntImm):
            return True
        return any(index is place and size <= extent
                   for place, size in zip(self.places, self.outer, strict=True))

    def _load(self, key: Any, outer: Sequence[Any], column: Any, words: Any, first: Any) -> None:
        """Load one chunk of an operand into registers."""
        w, buffer = self.w, key[0]
        flat, size = self.flat[buffer], self.tile.width * _bytes(buffer)
        at = w.bind("at", self._at(buffer, outer, column))
        if size % 4:
            for i in range(self.tile.width):
                w.store(words, load(flat, at + i), first + i)
            return
        step = next(s for s in (16, 8, 4) if size % s == 0)
        for part in range(size // step):
            start = pointer(flat, at + part * step // _bytes(buffer))
            w.call(f"vitq_load{step}", pointer(words, first + part * step // 4), start)

    def _code(self, buffer: Any, words: Any, first: Any, i: Any) -> Any:
        """Return element ``i`` of a chunk."""
        dtype, size = str(buffer.dtype), _bytes(buffer)
        if self.tile.width * size % 4:
            return load(words, first + i)
        if size == 8:
            low = cast(load(words, first + 2 * i), "int64") & const(2**32 - 1, "int64")
            return low | (cast(load(words, first + 2 * i + 1), "int64") << const(32, "int64"))
        per = 4 // size
        word = load(words, first + tirx.floordiv(i, const(per, "int32")))
        if size == 4:
            return tirx.reinterpret(dtype, word) if dtype != "int32" else word
        up = (per - 1 - tirx.floormod(i, const(per, "int32"))) * (8 * size)
        if dtype.startswith("u"):
            word = cast(word, "uint32")
            return cast((word << cast(up, "uint32")) >> const(32 - 8 * size, "uint32"), dtype)
        return cast((word << up) >> const(32 - 8 * size, "int32"), dtype)

    def _store(self, results: Any, column: Any) -> None:
        """Store a chunk of the result."""
        w, width, size = self.w, self.tile.width, _bytes(self.out)
        at = w.bind("at", self.row * self.length + column)
        flat = self.flat[self.out]
        if width * size % 4 or str(self.out.dtype) not in ("int8", "uint8", "int16"):
            for i in range(width):
                w.store(flat, load(results, i), at + i)
            return
        words = w.registers("packed", width * size // 4)
        for word in range(width * size // 4):
            codes = [cast(load(results, word * (4 // size) + i), "int32")
                     for i in range(4 // size)]
            w.store(words, self._pack(codes), word)
        step = next(s for s in (16, 8, 4) if width * size % s == 0)
        for part in range(width * size // step):
            target = pointer(flat, at + part * step // size)
            w.call(f"vitq_store{step}", target, pointer(words, part * step // 4))

    def _pack(self, codes: list[Any]) -> Any:
        """Return the low bytes (of four) or halves (of two) of codes in one word."""
        if len(codes) == 2:
            return self.w.value("vitq_bytes", *codes, 0x5410)
        pairs = [self.w.value("vitq_bytes", *codes[i : i + 2], 0x0040) for i in (0, 2)]
        return self.w.value("vitq_bytes", *pairs, 0x5410)

    # Expressions

    def _expressions(self, stage: Stage, place: tuple[Any, Any] | None, words: Mapping[Any, Any],
                     i: Any = None) -> Expressions:
        """Return a translator of a stage's expressions at ``place``: (in registers, column)."""
        axes = {var: cast(at, str(var.ty.dtype))
                for var, at in zip(stage.rows, self.places, strict=True)}
        if stage.column is not None and place is not None:
            axes[stage.column] = cast(place[1], str(stage.column.ty.dtype))

        def read(node: Any, code: Any) -> Any:
            buffer, indices = node.source, list(node.indices)
            if buffer in self.scalars:
                return self.scalars[buffer]
            along = stage.column is not None and indices[-1].same_as(stage.column)
            if buffer in self.flat:
                key = self._key(stage, node)
                if along and key in words:
                    held, first = words[key]
                    return self._code(buffer, held, first, i)
                place_of = [index_of(code(index)) for index in indices]
                return load(self.flat[buffer], self._at(buffer, place_of[:-1], place_of[-1]))
            if buffer in self.kept:
                assert place is not None
                return load(self.kept[buffer], place[0])
            source = next(s for s in self.stages if s.buffer.same_as(buffer))
            return self._expressions(source, place, words, i).code(source.value)

        return Expressions(self.w, axes, read)


def _bytes(buffer: Any) -> int:
    return int(np.dtype(str(buffer.dtype)).itemsize)


def _start(stage: Stage) -> Any:
    """Return what a reduction starts from."""
    dtype = str(stage.buffer.dtype)
    return const(0 if stage.kind == "Add" else int(np.iinfo(dtype).min), dtype)


def lower_rows(
    func: tirx.PrimFunc, blocks: Sequence[Any], attrs: Mapping[str, Any],
    tile: RowTile | None = None,
) -> tirx.PrimFunc | None:
    """Return ``func`` as a kernel over rows, None if it does not qualify.

    Parameters
    ----------
    func
        An unscheduled PrimFunc made of TE stages.
    blocks
        Its blocks in order, without the root.
    attrs
        Attributes of the new PrimFunc.
    tile
        How rows are laid over threads; None: :func:`default_row_tile`'s.
    """
    stages = row_stages(func, blocks)
    if stages is None:
        return None
    return _Rows(func, stages, tile).build(attrs)
