"""From device memory to shared memory: the rows and the packed weights of a weight matmul.

Rows are staged as they are, ``bk`` codes each, their 16-byte chunks permuted by an exclusive or
with bits of the row's number, so that neither the copies nor ``ldmatrix`` (8 rows, one chunk) meet
in a bank. A row may come through a table; one that is put together from pieces takes a look at the
table for each copy. A copy is as wide as rows are aligned, 16, 8 or 4 bytes; rows that are not even
aligned to 4 bytes are loaded code by code.

Packed weights of ``bk`` channels are ``32 * bk`` contiguous bytes for each group of 32 columns; for
products of four warps, 16 channels of all columns are together instead, so that from 8 columns to
the next it is as far everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from schedules.builder import const, load
from schedules.operands import Operand

from .intrinsics import GROUP
from .tile import CudaTile
from .writer import CudaWriter, pointer

__all__ = ["CHUNK", "Packed", "Rows", "Weights", "choose", "swizzle"]

CHUNK = 16
"""Bytes that keep together."""


def swizzle(row: Any, chunk: Any, chunks: int) -> Any:
    """Return where a chunk of a row of ``chunks`` chunks (a power of two) is put."""
    if chunks >= 8:
        return chunk ^ (row % 8)
    return chunk ^ (tirx.floordiv(row, const(8 // chunks, "int32")) % chunks)


class Rows:
    """The rows of a block.

    Parameters
    ----------
    w, source, tile
        The writer; the rows; how the kernel is cut.
    first
        The block's first row; rows past the last one repeat it.
    """

    def __init__(self, w: CudaWriter, source: Operand, tile: CudaTile, first: Any) -> None:
        self.w, self.source, self.tile = w, source, tile
        self.size = int(np.dtype(source.dtype).itemsize)
        self.width = source.depth // source.pieces
        self.stage = tile.bm * tile.bk
        self.shared = w.shared("rows", tile.stages * self.stage, source.dtype)
        self.chunks = tile.bk * self.size // CHUNK
        unit = math.gcd(self.width * self.size, CHUNK)
        self.copies = unit >= 4
        self.codes = max(unit, 4) // self.size
        each = tile.bk // self.codes
        self.column = w.bind("column", w.thread % each * self.codes)
        by = tile.threads // each
        self.lines = [w.bind("line", tirx.floordiv(w.thread, const(each, "int32")) + i * by)
                      for i in range(-(-tile.bm // by))]
        self.partial = tile.bm % by != 0
        self.places = [self._place(first + line) for line in self.lines]

    def _place(self, row: Any) -> Any:
        """Return where a row starts; of one made of pieces, where its pieces are in the table."""
        w, source = self.w, self.source
        row = tirx.min(row, const(source.rows - 1, "int32"))
        if source.pieces > 1:
            return w.bind("place", row * source.pieces)
        if source.table is not None:
            row = load(source.table, row)
        return w.bind("place", row * source.stride + source.base)

    def issue(self, stage: Any, begin: Any) -> None:
        """Start copying channels from ``begin`` to the stage at offset ``stage``."""
        w, source = self.w, self.source
        column = w.bind("at", begin + self.column)
        chunk = tirx.floordiv(self.column, const(CHUNK // self.size, "int32"))
        inside = self.column % (CHUNK // self.size)
        for line, place in zip(self.lines, self.places, strict=True):
            put = swizzle(line, chunk, self.chunks) * (CHUNK // self.size) + inside
            target = stage * self.stage + line * self.tile.bk + put

            def copy(target: Any = target, place: Any = place) -> None:
                if not self.copies:
                    for i in range(self.codes):
                        w.store(self.shared, self._code(place, column + i), target + i)
                    return
                valid = const(True, "bool") if source.depth % self.tile.bk == 0 else (
                    column < source.depth)
                origin = self._origin(place, column)
                w.call(f"vitq_copy{self.codes * self.size}", pointer(self.shared, target),
                       pointer(source.buffer, origin), valid)

            if self.partial:
                with w.when(line < self.tile.bm):
                    copy()
            else:
                copy()

    def _origin(self, place: Any, column: Any) -> Any:
        """Return where a row's channel is in the matrix."""
        source = self.source
        if source.pieces == 1:
            return place + column
        last = const(source.pieces - 1, "int32")
        piece = tirx.min(tirx.floordiv(column, const(self.width, "int32")), last)
        return load(source.table, place + piece) * source.stride + column % self.width

    def _code(self, place: Any, column: Any) -> Any:
        code = load(self.source.buffer, self._origin(place, column))
        if self.source.depth % self.tile.bk == 0:
            return code
        return tirx.if_then_else(column < self.source.depth, code, const(0, self.source.dtype))


@dataclass(frozen=True)
class Packed:
    """Packed weights: a flat buffer of ``groups`` groups of 32 columns."""

    buffer: Any
    groups: int


class Weights:
    """The weights of a block, whichever member's they are.

    Parameters
    ----------
    w, tile
        The writer; how the kernel is cut.
    members
        Packed weights of each member, and the condition that it is this block's (None: always).
    first
        The block's first group of columns, counted in its member.
    steps
        Groups of 16 channels.
    """

    def __init__(self, w: CudaWriter, tile: CudaTile, members: list[tuple[Packed, Any]],
                 first: Any, steps: int) -> None:
        self.w, self.tile, self.members, self.steps = w, tile, members, steps
        self.stage = tile.bn * tile.bk
        self.shared = w.shared("weights", tile.stages * self.stage, "int8")
        self.first = first
        units = 2 * tile.bk
        self.units = units
        total = tile.bn // GROUP * units
        self.slots = [w.bind("slot", w.thread + i * tile.threads)
                      for i in range(-(-total // tile.threads))]
        self.total = total

    def issue(self, stage: Any, begin: Any) -> None:
        """Start copying channels from ``begin`` to the stage at offset ``stage``."""
        w, tile, units = self.w, self.tile, self.units
        step = tirx.floordiv(begin, const(16, "int32"))
        whole = self.steps % (tile.bk // 16) == 0
        for slot in self.slots:
            group = tirx.floordiv(slot, const(units, "int32"))
            unit = slot % units
            valid = const(True, "bool") if whole else (
                step + tirx.floordiv(unit, const(GROUP, "int32")) < self.steps)
            source = choose(w, self.members, partial(self._origin, group, step, unit))
            put = slot * CHUNK
            if tile.wgmma:
                part = tirx.floordiv(unit, const(GROUP, "int32")) * (tile.bn // GROUP) + group
                put = (part * GROUP + unit % GROUP) * CHUNK
            target = pointer(self.shared, stage * self.stage + put)
            if self.total % tile.threads:
                with w.when(slot < self.total):
                    w.call("vitq_copy16", target, source, valid)
            else:
                w.call("vitq_copy16", target, source, valid)

    def _origin(self, group: Any, step: Any, unit: Any, packed: Packed) -> Any:
        """Return the address of a unit; groups past the last one repeat it."""
        at = self.first + group
        if packed.groups % (self.tile.bn // GROUP):
            at = tirx.min(at, const(packed.groups - 1, "int32"))
        return pointer(packed.buffer,
                       (at * self.steps + step) * (GROUP * CHUNK) + unit * CHUNK)


def choose(w: CudaWriter, members: list[tuple[Any, Any]], value: Callable[[Any], Any]) -> Any:
    """Return ``value`` of the member whose condition holds; the last one's needs none."""
    *others, (last, _) = members
    result = value(last)
    for member, condition in reversed(others):
        other = value(member)
        # There is no choice of addresses in TIR.
        result = (tirx.Select(condition, other, result) if isinstance(other.ty, tvm.ir.PrimType)
                  else w.value("vitq_either", condition, other, result))
    return result
