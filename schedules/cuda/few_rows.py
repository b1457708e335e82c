"""Weight matmuls of up to four rows (a classifier's head) with dp4a, from the same packed weights.

Tensor cores would multiply 16 rows; here loading the weights is all that takes time. A block has
32 columns, a warp eight of them; the quarters of a warp take every fourth group of 16 channels, so
a warp loads 512 bytes in one go. Partial sums meet by shuffles, and each quarter finishes a row.

16-bit activations are planes of bytes, as in :mod:`.linear`; a byte without a sign is taken as its
value less 128, which the sum of the weights gives back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from schedules.builder import const, load

from .epilogue import Finish
from .intrinsics import GROUP
from .member import Member
from .staging import CHUNK, choose
from .writer import CudaWriter, pointer

__all__ = ["few_rows", "takes_few_rows"]

MOST = 4
FLIP, ONES = -(2**31) + 0x808080, 0x01010101


def takes_few_rows(members: Sequence[Member]) -> bool:
    """Whether there are few enough rows, aligned to 16 bytes and not made of pieces."""
    first = members[0]
    width = int(first.x.shape[-1])
    size = int(np.dtype(str(first.x.dtype)).itemsize)
    whole = first.table is None or len(first.table.shape) == 1 or int(first.table.shape[1]) == 1
    return first.rows <= MOST and whole and width % CHUNK == 0 and size <= 2


class _FewRows:
    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        first = members[0]
        self.dtype = str(first.x.dtype)
        self.signed = {"int8": (True,), "uint8": (False,), "int16": (True, False)}[self.dtype]
        self.size = len(self.signed)
        self.rows = first.rows
        self.steps = int(first.weights.shape[1])
        self.groups = [int(member.weights.shape[0]) for member in members]

    def build(self, params: Sequence[Any], attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        w = self.w = CudaWriter((sum(self.groups),), 4 * 32)
        ends = [sum(self.groups[: i + 1]) for i in range(len(self.groups))]
        conditions: list[Any] = [w.bind("member", w.block[0] < end) for end in ends[:-1]] + [None]
        self.slot = w.lane % 8
        self.part = w.bind("part", tirx.floordiv(w.lane, const(8, "int32")))
        self.source = self.members[0].source(w)
        self.packed = [(w.flat(member.weights), condition)
                       for member, condition in zip(self.members, conditions, strict=True)]
        begins = [(const(end - count, "int32"), condition)
                  for end, count, condition in zip(ends, self.groups, conditions, strict=True)]
        self.group = w.bind("group", w.block[0] - choose(w, begins, lambda begin: begin))
        places = [const(row, "int32") if self.source.table is None
                  else w.bind("place", load(self.source.table, row)) for row in range(self.rows)]
        self.places = [place * self.source.stride for place in places]
        self.sums = w.registers("sums", self.size * self.rows)
        self.total = w.registers("total", 1)
        for i in range(self.size * self.rows):
            w.store(self.sums, const(0, "int32"), i)
        w.store(self.total, const(0, "int32"), 0)
        self._walk()
        sums = self._joined()
        taken: Any = None
        for member, condition in zip(self.members, conditions, strict=True):
            here = self.part < self.rows
            here = here if condition is None else tirx.all(here, condition)
            here = here if taken is None else tirx.all(here, tirx.Not(taken))
            with w.when(here):
                self._finish(member, sums)
            taken = condition
        return w.prim_func(params, attrs)

    def _walk(self) -> None:
        """Add up this quarter's groups of channels, four at a time."""
        w, steps = self.w, self.steps
        for begin, count in ((0, steps // 16), (steps // 16 * 16, 1)):
            if begin == steps or not count:
                continue
            inner = 4 if begin == 0 and steps >= 16 else -(-(steps - begin) // 4)
            with w.loop("step", count) as step, w.loop("i", inner, "unrolled") as i:
                at = begin + (step * inner + i) * 4 + self.part
                if begin + inner * 4 * count <= steps:
                    self._step(at)
                else:
                    with w.when(at < steps):
                        self._step(at)

    def _step(self, at: Any) -> None:
        """Add the products of a group of 16 channels."""
        w = self.w
        slot = (self.group * self.steps + at) * GROUP + w.warp * 8 + self.slot
        codes = w.registers("weights", 4)
        w.call("vitq_load16", pointer(codes, 0),
               choose(w, self.packed, lambda packed: pointer(packed, slot * CHUNK)))
        weights = [load(codes, i) for i in range(4)]
        if not all(self.signed):
            for word in weights:
                self._add(self.total, 0, ONES, word)
        for row in range(self.rows):
            x = w.registers("x", 4 * self.size)
            for part in range(self.size):
                w.call("vitq_load16", pointer(x, 4 * part), pointer(
                    self.source.buffer, self.places[row] + at * 16 + 8 * part))
            for plane, (signed, words) in enumerate(zip(self.signed, self._planes(x), strict=True)):
                for code, word in zip(words, weights, strict=True):
                    code = code if signed else tirx.bitwise_xor(code, const(FLIP, "int32"))
                    self._add(self.sums, row * self.size + plane, code, word)

    def _planes(self, x: Any) -> list[list[Any]]:
        if self.size == 1:
            return [[load(x, i) for i in range(4)]]
        return [[self.w.value("vitq_bytes", load(x, i), load(x, 4 + i), selector)
                 for i in range(4)] for selector in (0x7531, 0x6420)]

    def _add(self, sums: Any, at: int, code: Any, word: Any) -> None:
        w = self.w
        w.store(sums, w.value("vitq_dot4", code, word, load(sums, at)), at)

    def _joined(self) -> list[Any]:
        """Return every row's sum over the quarters."""
        w = self.w
        found = []
        for row in range(self.rows):
            value: Any = const(0, "int32")
            for plane, signed in enumerate(self.signed):
                part = load(self.sums, row * self.size + plane)
                if not signed:
                    part = part + tirx.shift_left(load(self.total, 0), const(7, "int32"))
                value = tirx.shift_left(value, const(8, "int32")) + part if plane else part
            for by in (8, 16):
                value = w.bind("partial", value)
                value = value + w.value("vitq_shuffle_xor", value, by)
            found.append(w.bind("sum", value))
        return found

    def _finish(self, member: Member, sums: list[Any]) -> None:
        """Let quarter i of the warp finish row i."""
        w = self.w
        result = member.result(w)
        value = sums[0]
        for row in range(1, self.rows):
            value = tirx.Select(self.part == row, sums[row], value)
        inner = tirx.floordiv(self.slot, const(2, "int32")) * 8 + w.warp * 2 + self.slot % 2
        column = w.bind("column", self.group * GROUP + inner)
        finish = Finish(w, result, True, member.columns % GROUP == 0, 1)
        finish.begin(column)
        held = finish.fetch([self.part])
        finish.parameters([(buffer, column) for buffer in result.parameters])
        finish.row(self.part, [value], held, 0)


def few_rows(
    members: Sequence[Member], params: Sequence[Any], attrs: Mapping[str, Any]
) -> tirx.PrimFunc:
    """Build the kernel of weight matmuls of few rows; see :func:`takes_few_rows`."""
    return _FewRows(members).build(params, attrs)
