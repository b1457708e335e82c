"""Packed weight matmuls on the tensor cores of a GPU, one kernel for one or for several.

``out[i, n] = epilogue(sum_k x[i, k] * w[k, n] + bias[n])``, see :mod:`schedules.packed_linear`. A
block of warps computes a tile of results; rows and weights stream through shared memory in stages
(:mod:`.staging`), and each warp multiplies with ``mma.sync``, the fragments of the next 32 channels
being loaded while it multiplies these. There is one barrier in a step of ``bk`` channels: behind
it, a stage has come in for all threads, and the stage that the next copies go to has been read.

Activations of 16 bits are two planes of bytes, ``high * 256 + low``: the same weights' fragments
are multiplied by both, into two sets of sums, in one walk over K. Sums are modulo 2^32, of which
the final value is proved to be in range.

Members (q, k and v, say) take the same rows and stand side by side: each block of columns is of
one member, which decides, for all threads alike, from where weights come and what epilogue follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from schedules.apply import gemm_spec
from schedules.builder import const, load
from schedules.gemm import GemmSpec

from .epilogue import Finish, Result
from .few_rows import few_rows, takes_few_rows
from .intrinsics import GROUP
from .member import Member
from .staging import CHUNK, Packed, Rows, Weights, choose, swizzle
from .tail import Tail
from .tile import SHARED, SPARE, CudaTile, default_tile
from .writer import CudaWriter, pointer

__all__ = ["linears", "packed_linear"]


class _Linears:
    """The steps are methods, in the order in which they run."""

    def __init__(self, members: Sequence[Member], tile: CudaTile) -> None:
        self.members, self.tile = members, tile
        first = members[0]
        self.dtype = str(first.x.dtype)
        self.planes = ("s8", "u8") if self.dtype == "int16" else (
            "u8" if self.dtype == "uint8" else "s8",)
        self.size = len(self.planes)
        self.rows = first.rows
        self.blocks = [-(-member.columns // tile.bn) for member in members]
        self.steps = int(first.weights.shape[1])

    def build(self, params: Sequence[Any], attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        tile = self.tile
        grid = (sum(self.blocks), -(-self.rows // tile.bm))
        w = self.w = CudaWriter(grid, tile.threads)
        self._place_block()
        source = self.members[0].source(w)
        self.results = [member.result(w, source.table) for member in self.members]
        self.x = Rows(w, source, tile, self.first_row)
        packed = [(Packed(w.flat(member.weights), int(member.weights.shape[0])), condition)
                  for member, condition in zip(self.members, self.conditions, strict=True)]
        self.weights = Weights(w, tile, packed, self.first_group, self.steps)
        self.columns = w.shared("columns", 3 * tile.bn, "int32")
        self._place_lane()
        self._prologue()
        self._walk()
        self._finish_members()
        return w.prim_func(params, attrs)

    def _place_block(self) -> None:
        """Find the block's rows, member and columns."""
        w, tile = self.w, self.tile
        column_block, row_block = w.block
        self.first_row = w.bind("first_row", row_block * tile.bm)
        ends = [sum(self.blocks[: i + 1]) for i in range(len(self.blocks))]
        self.conditions: list[Any] = [
            w.bind("member", column_block < end) for end in ends[:-1]] + [None]
        begins = [(const(end - count, "int32"), condition)
                  for end, count, condition in zip(ends, self.blocks, self.conditions, strict=True)]
        inner = column_block - choose(w, begins, lambda begin: begin)
        self.first_group = w.bind("first_group", inner * (tile.bn // GROUP))

    def _place_lane(self) -> None:
        """Find what is the same in every step: where in a stage a lane's matrices are."""
        w, tile = self.w, self.tile
        self.warp_row = w.bind("warp_row", tirx.floordiv(w.warp, const(tile.warps_n, "int32"))
                               * (16 * tile.mt))
        self.warp_group = w.bind("warp_group", w.warp % tile.warps_n * tile.groups)
        self.unit = CHUNK // self.size  # codes of a chunk
        line, half = w.lane % 16, tirx.floordiv(w.lane, const(16, "int32"))
        chunks = tile.bk // self.unit
        base = w.bind("line", (self.warp_row + line) * tile.bk)
        # For each pair of chunks of a row: 16 rows a matrix apart have the same permutation.
        self.row_places = [
            w.bind("place", base + swizzle(line, half + first, chunks) * self.unit)
            for first in range(0, chunks, 2)]
        # Four matrices: 16 channels, the next 16, of 8 columns and of the next 8.
        matrix = half * (8 * CHUNK) + line % 8 * CHUNK + tirx.floordiv(
            line, const(8, "int32")) * (GROUP * CHUNK)
        self.weight_place = w.bind(
            "weight_place", self.warp_group * (GROUP * tile.bk) + matrix)

    # Walk over K

    def _prologue(self) -> None:
        """Start the first stages, and the copies of the columns' parameters."""
        w, tile = self.w, self.tile
        count = -(-self.steps * 16 // tile.bk)
        for stage in range(tile.stages - 1):
            if stage < count:
                self._issue(const(stage, "int32"), const(stage * tile.bk, "int32"))
            if stage == 0:
                self._issue_columns()
            w.call("vitq_copy_commit")
        size = 4 * tile.mt * 4 * tile.groups * self.size
        self.sums = w.registers("sums", size)
        with w.loop("i", size, "unrolled") as i:
            w.store(self.sums, const(0, "int32"), i)

    def _issue(self, stage: Any, begin: Any) -> None:
        self.x.issue(stage, begin)
        self.weights.issue(stage, begin)

    def _issue_columns(self) -> None:
        """Start copying bias, multipliers and shifts of the block's columns."""
        w, tile = self.w, self.tile
        for index in range(max(len(result.parameters) for result in self.results)):
            holders = [(result, condition)
                       for result, condition in zip(self.results, self.conditions, strict=True)]
            each = min(tile.threads, tile.bn // 4)
            for begin in range(0, tile.bn // 4, each):
                place = (begin + w.thread) * 4
                source = choose(w, holders, partial(self._parameter, index, place))
                target = pointer(self.columns, index * tile.bn + place)
                left = min(each, tile.bn // 4 - begin)
                if left == tile.threads:
                    w.call("vitq_copy16", target, source, const(True, "bool"))
                else:
                    with w.when(w.thread < left):
                        w.call("vitq_copy16", target, source, const(True, "bool"))

    def _parameter(self, index: int, place: Any, result: Result) -> Any:
        """Return the address of a parameter of the column at a place of the block.

        Columns past the end repeat the last ones.
        """
        column = self.first_group * GROUP + place
        held = int(result.bias.shape[0])
        if held % self.tile.bn:
            column = tirx.min(column, const(held - 4, "int32"))
        return pointer(result.parameters[index], column)

    def _walk(self) -> None:
        """Multiply along K."""
        w, tile = self.w, self.tile
        count = -(-self.steps * 16 // tile.bk)
        slices = tile.bk // 32
        self.raw = [w.registers("raw", 4 * tile.mt * self.size) for _ in range(2)]
        self.factors = [w.registers("factors", 8 * tile.groups) for _ in range(2)]
        w.call(f"vitq_copy_wait{tile.stages - 2}")
        w.barrier()
        self._fetch(const(0, "int32"), 0, 0)
        turns = w.registers("turns", 2)  # the stage that is read, and that is copied to
        w.store(turns, const(0, "int32"), 0)
        w.store(turns, const(tile.stages - 1, "int32"), 1)
        with w.loop("step", count) as step:
            for part in range(slices):
                if part == slices - 1:
                    w.call(f"vitq_copy_wait{tile.stages - 2}")
                    w.barrier()
                    w.store(turns, self._next(load(turns, 0)), 0)
                self._fetch(load(turns, 0), (part + 1) % slices, (part + 1) % 2)
                if part == 0:
                    ahead = step + (tile.stages - 1)
                    if count >= tile.stages:
                        with w.when(ahead < count):
                            self._issue(load(turns, 1), ahead * tile.bk)
                    w.call("vitq_copy_commit")
                    w.store(turns, self._next(load(turns, 1)), 1)
                self._multiply(part % 2)

    def _next(self, turn: Any) -> Any:
        last = const(self.tile.stages - 1, "int32")
        return tirx.Select(turn == last, const(0, "int32"), turn + 1)

    def _fetch(self, turn: Any, part: int, into: int) -> None:
        """Load the fragments of 32 channels."""
        w, tile = self.w, self.tile
        stage = w.bind("stage", turn * self.x.stage)
        for mt in range(tile.mt):
            for half in range(self.size):
                place = self.row_places[part * self.size + half] + 16 * mt * tile.bk
                w.call("vitq_ldmatrix4", pointer(self.raw[into], 4 * (mt * self.size + half)),
                       pointer(self.x.shared, stage + place))
        stage = w.bind("stage", turn * self.weights.stage)
        for group in range(tile.groups):
            self._fetch_weights(stage, group, part, self.factors[into])

    def _fetch_weights(self, stage: Any, group: int, part: int, into: Any) -> None:
        """Load the weights of 32 columns and 32 channels: two words for each tile of 8 columns."""
        w, tile = self.w, self.tile
        for pair in range(2):
            place = group * GROUP * tile.bk + 2 * part * GROUP * CHUNK + 2 * pair * 8 * CHUNK
            w.call("vitq_ldmatrix4", pointer(into, 8 * group + 4 * pair),
                   pointer(self.weights.shared, stage + self.weight_place + place))

    def _multiply(self, turn: int) -> None:
        """Add the products of 32 channels."""
        w, tile = self.w, self.tile
        for mt in range(tile.mt):
            planes = self._planes(turn, mt)
            for group in range(tile.groups):
                for j in range(4):
                    for plane, (kind, codes, first) in enumerate(planes):
                        w.call(f"vitq_mma_{kind}_s8", pointer(self.sums, self._sum(
                            plane, mt, group, j)), pointer(codes, first),
                            pointer(self.factors[turn], 8 * group + 2 * j))

    def _planes(self, turn: int, mt: int) -> list[tuple[str, Any, int]]:
        """Return the fragments of 16 rows: of each plane its kind, registers, the first of them."""
        w, raw = self.w, self.raw[turn]
        if self.size == 1:
            return [(self.planes[0], raw, 4 * mt)]
        parts = []
        for kind, selector in zip(self.planes, (0x7531, 0x6420), strict=True):
            codes = w.registers("codes", 4)
            for half in range(2):
                at = 8 * mt + 4 * half
                for row in range(2):  # matrices: rows 0-7, 8-15 of channels 0-7, then of 8-15
                    value = w.value("vitq_bytes", load(raw, at + row), load(raw, at + row + 2),
                                    selector)
                    w.store(codes, value, 2 * half + row)
            parts.append((kind, codes, 0))
        return parts

    def _sum(self, plane: int, mt: int, group: int, j: int) -> int:
        """Return the first register of a tile of 16 x 8 sums."""
        return 4 * (((plane * self.tile.mt + mt) * self.tile.groups + group) * 4 + j)

    # Epilogue

    def _finish_members(self) -> None:
        w = self.w
        for index, (result, condition) in enumerate(
                zip(self.results, self.conditions, strict=True)):
            if condition is None and index == 0:
                self._finish(result)
                continue
            before = self.conditions[index - 1] if index else None
            here = condition if before is None else tirx.Not(before) if condition is None else (
                tirx.all(tirx.Not(before), condition))
            with w.when(here):
                self._finish(result)

    def _finish(self, result: Result) -> None:
        """Write the epilogue of one member."""
        w, tile = self.w, self.tile
        finish = Finish(w, result, result.rows % tile.bm == 0, result.columns % tile.bn == 0)
        line = tirx.floordiv(w.lane, const(4, "int32"))
        start = w.bind("row", self.first_row + self.warp_row + line)
        rows = [w.bind("row", start + 16 * mt + 8 * half)
                for mt in range(tile.mt) for half in range(2)]
        for group in range(tile.groups):
            place = w.bind("place", (self.warp_group + group) * GROUP + w.lane % 4 * 8)
            finish.begin(w.bind("column", self.first_group * GROUP + place))
            held = finish.fetch(rows)
            finish.parameters([(self.columns, i * tile.bn + place) for i in range(3)])
            for index, row in enumerate(rows):
                mt, half = divmod(index, 2)
                finish.row(row, self._row_sums(mt, group, half), held, index)

    def _row_sums(self, mt: int, group: int, half: int) -> list[Any]:
        """Return eight neighbouring sums of a row."""
        found = []
        for i in range(8):
            at = 2 * half + i % 2
            value = load(self.sums, self._sum(0, mt, group, i // 2) + at)
            if self.size == 2:
                low = load(self.sums, self._sum(1, mt, group, i // 2) + at)
                value = tirx.shift_left(value, const(8, "int32")) + low
            found.append(value)
        return found


def packed_linear(
    params: Sequence[Any], spec: GemmSpec, attrs: Mapping[str, Any], tile: CudaTile | None = None
) -> tirx.PrimFunc:
    """Build the kernel of a packed weight matmul.

    Parameters
    ----------
    params
        The PrimFunc's buffers: x, weights, bias, [mult, shift], [residual], [table of rows], out;
        weights for ``mma8`` or ``mma16``, bias, mult and shift padded to groups of 32 columns.
    spec
        What to compute.
    attrs
        Attributes of the new PrimFunc.
    tile
        How it is cut; None: by the default rule, by which a matmul of up to four rows takes no
        tensor cores, and which looks at the shared memory of the current target, if there is one.
    """
    return _build([Member(params, spec)], params, attrs, tile)


def linears(
    funcs: Sequence[tirx.PrimFunc], tails: Sequence[tirx.PrimFunc | None],
    tile: CudaTile | None = None,
) -> tirx.PrimFunc:
    """Build one kernel of several weight matmuls of the same rows.

    Parameters
    ----------
    funcs
        Unscheduled PrimFuncs of packed weight matmuls without residual; the first parameter and,
        if there is one, the table of rows are the same tensors.
    tails
        For each of them an unscheduled elementwise PrimFunc, whose first parameter is its result
        and the others small tensors, or None.
    tile
        How the kernel is cut; None: by the default rule.

    Returns
    -------
    tirx.PrimFunc
        Parameters: the first member's and its tail's, then the other members' without x and table
        and their tails', then the results in order.
    """
    inputs: list[Any] = []
    outputs: list[Any] = []
    members: list[Member] = []

    def fresh(buffer: Any, name: str) -> Any:
        shape = [int(extent) for extent in buffer.shape]
        return tirx.decl_buffer(shape, str(buffer.dtype), name)

    for index, (func, tail) in enumerate(zip(funcs, tails, strict=True)):
        spec = gemm_spec(func)
        if spec is None or spec.epilogue.kind == "requant_add":
            raise ValueError("a member is a packed weight matmul without a residual")
        own = [fresh(buffer, f"{buffer.name}_{index}") for buffer in func.params]
        if members:
            own[0] = members[0].params[0]
            if spec.gather:
                own[-2] = members[0].params[-2]
        inputs += own[:-1] if not members else own[1 : -2 if spec.gather else -1]
        if tail is None:
            members.append(Member(own, spec))
            outputs.append(own[-1])
            continue
        buffers = {buffer: fresh(buffer, f"{buffer.name}_{index}_tail")
                   for buffer in tail.params[1:]}
        inputs += list(buffers.values())[:-1]
        outputs.append(buffers[tail.params[-1]])
        interval = spec.epilogue.qmin, spec.epilogue.qmax
        members.append(Member(own, spec, Tail(tail, buffers, interval), outputs[-1]))
    return _build(members, [*inputs, *outputs], {"tirx.noalias": True}, tile)


def _build(
    members: Sequence[Member], params: Sequence[Any], attrs: Mapping[str, Any],
    tile: CudaTile | None,
) -> tirx.PrimFunc:
    first = members[0]
    if tile is None and takes_few_rows(members):
        return few_rows(members, params, attrs)
    size = int(np.dtype(str(first.x.dtype)).itemsize)
    target = tvm.target.Target.current(allow_none=True)
    room = target.attrs.get("max_shared_memory_per_block", None) if target is not None else None
    tile = tile or default_tile(first.rows, [member.columns for member in members],
                                int(first.weights.shape[1]) * 16, size,
                                any(member.tail is not None for member in members),
                                max(SHARED, int(room or 0) - SPARE))
    return _Linears(members, tile).build(params, attrs)
