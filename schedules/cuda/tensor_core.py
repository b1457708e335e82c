"""The multiplying kernel of packed weight matmuls: stages, fragments, tensor cores.

A block of warps computes a tile of results; rows and weights stream through shared memory in stages
(:mod:`.staging`), and each warp multiplies with ``mma.sync``, the fragments of the next 32 channels
being loaded while it multiplies these. There is one barrier in a step of ``bk`` channels: behind
it, a stage has come in for all threads, and the stage that the next copies go to has been read.

Activations of 16 bits are two planes of bytes, ``high * 256 + low``: the same weights' fragments
are multiplied by both, into two sets of sums, in one walk over K. Sums are modulo 2^32, of which
the final value is proved to be in range.

Where there are few results and K is long, ``warps_k`` groups of warps share a tile: each takes its
part of the channels of every stage; their sums meet in shared memory, where each group fetches what
it finishes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from tvm import tirx

from schedules.builder import const, load

from .epilogue import Finish, Result
from .intrinsics import GROUP
from .member import Member
from .staging import CHUNK, Packed, Rows, Weights, choose, swizzle
from .tile import REGISTERS, CudaTile
from .writer import CudaWriter, pointer

__all__ = ["TensorCoreLinears"]


class TensorCoreLinears:
    """One kernel of the members; the steps are methods, in the order in which they run."""

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
        self.ahead = tile.stages - 1  # steps that copies are ahead of products
        # Left to itself ptxas keeps to 128, say, and a few values in local memory.
        self.registers = min(tile.registers(self.size) + 16, REGISTERS // tile.threads)

    def build(self, params: Sequence[Any], attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        tile = self.tile
        grid = (sum(self.blocks), -(-self.rows // tile.bm))
        w = self.w = CudaWriter(grid, tile.threads, self.registers)
        self._place_block()
        source = self.members[0].source(w)
        self.results = [member.result(w) for member in self.members]
        self.x = Rows(w, source, tile, self.first_row)
        packed = [(Packed(w.flat(member.weights), int(member.weights.shape[0])), condition)
                  for member, condition in zip(self.members, self.conditions, strict=True)]
        self.weights = Weights(w, tile, packed, self.first_group, self.steps)
        self.columns = w.shared("columns", 3 * tile.bn, "int32")
        self._place_lane()
        self._prologue()
        self._walk()
        if tile.warps_k > 1:
            self._share_sums()
        for part in range(tile.warps_k):
            with w.when(self.part == part) if tile.warps_k > 1 else nullcontext():
                if tile.warps_k > 1:
                    self._add_others(part)
                self._finish_members(part)
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
        each = tile.warps_m * tile.warps_n
        self.part = w.bind("part", tirx.floordiv(w.warp, const(each, "int32")))
        inner = w.warp % each
        self.warp_row = w.bind("warp_row", tirx.floordiv(inner, const(tile.warps_n, "int32"))
                               * (16 * tile.mt))
        self.warp_group = w.bind("warp_group", inner % tile.warps_n * tile.groups)
        self.unit = CHUNK // self.size  # codes of a chunk
        line, half = w.lane % 16, tirx.floordiv(w.lane, const(16, "int32"))
        chunks = tile.bk // self.unit
        base = w.bind("line", (self.warp_row + line) * tile.bk)
        # For each pair of chunks of a row: 16 rows a matrix apart have the same permutation.
        own = chunks // tile.warps_k
        begin = self.part * own + half
        self.row_places = [
            w.bind("place", base + swizzle(line, begin + first, chunks) * self.unit)
            for first in range(0, own, 2)]
        # Four matrices: 16 channels, the next 16, of 8 columns and of the next 8.
        matrix = half * (8 * CHUNK) + line % 8 * CHUNK + tirx.floordiv(
            line, const(8, "int32")) * (GROUP * CHUNK)
        matrix = matrix + self.part * (GROUP * tile.bk // tile.warps_k)
        self.weight_place = w.bind(
            "weight_place", self.warp_group * (GROUP * tile.bk) + matrix)

    # Walk over K

    def _prologue(self) -> None:
        """Start the first stages, and the copies of the columns' parameters.

        Weights and parameters are constants: they need not wait for the launch that writes rows.
        """
        w, tile = self.w, self.tile
        count = -(-self.steps * 16 // tile.bk)
        places = [(const(stage, "int32"), const(stage * tile.bk, "int32"))
                  for stage in range(min(self.ahead, count))]
        for place in places:
            self.weights.issue(*place)
        self._issue_columns()
        w.wait_for_launches()
        for stage in range(self.ahead):
            if stage < count:
                self.x.issue(*places[stage])
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
        slices = tile.bk // 32 // tile.warps_k
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

    def _owned(self, part: int) -> list[tuple[int, int]]:
        """Return the (group, eighth of rows) of a warp's results that one part finishes."""
        units = [(group, index) for group in range(self.tile.groups)
                 for index in range(2 * self.tile.mt)]
        return units[part :: self.tile.warps_k]

    def _place(self, writer: int, owner: int, unit: tuple[int, int], i: int) -> Any:
        """Return where a part leaves sum ``i`` of a unit for the part that owns it."""
        tile = self.tile
        each, count = tile.threads // tile.warps_k, 2 * tile.mt * tile.groups
        rank = writer - (writer > owner)
        number = rank * count + unit[0] * 2 * tile.mt + unit[1]
        return (number * 8 + i) * each + self.w.thread % each

    def _share_sums(self) -> None:
        """Leave sums in shared memory for the parts that finish them."""
        w, tile = self.w, self.tile
        self.others = w.shared("others", (tile.warps_k - 1) * tile.bm * tile.bn, "int32")
        for part in range(tile.warps_k):
            with w.when(self.part == part):
                for owner in range(tile.warps_k):
                    for group, index in self._owned(owner) if owner != part else ():
                        for i, value in enumerate(self._row_sums(group, index)):
                            w.store(self.others, value,
                                    self._place(part, owner, (group, index), i))
        w.barrier()

    def _add_others(self, part: int) -> None:
        """Add the other parts' sums to what this part finishes."""
        w = self.w
        for group, index in self._owned(part):
            for i, value in enumerate(self._row_sums(group, index)):
                for writer in range(self.tile.warps_k):
                    if writer != part:
                        value = value + load(
                            self.others, self._place(writer, part, (group, index), i))
                w.store(self.sums, value, self._register(group, index, i))

    # Epilogue

    def _finish_members(self, part: int) -> None:
        """Write the epilogues; each is for what a part of the warps owns."""
        w = self.w
        for index, (result, condition) in enumerate(
                zip(self.results, self.conditions, strict=True)):
            if condition is None and index == 0:
                self._finish(result, part)
                continue
            before = self.conditions[index - 1] if index else None
            here = condition if before is None else tirx.Not(before) if condition is None else (
                tirx.all(tirx.Not(before), condition))
            with w.when(here):
                self._finish(result, part)

    def _finish(self, result: Result, part: int) -> None:
        """Write the epilogue of one member."""
        w, tile = self.w, self.tile
        finish = Finish(w, result, result.rows % tile.bm == 0, result.columns % tile.bn == 0)
        line = tirx.floordiv(w.lane, const(4, "int32"))
        start = w.bind("row", self.first_row + self.warp_row + line)
        for group in range(tile.groups):
            own = [index for found, index in self._owned(part) if found == group]
            if not own:
                continue
            self._settle(group)
            rows = [w.bind("row", start + self._offset(index)) for index in own]
            place = w.bind("place", (self.warp_group + group) * GROUP + w.lane % 4 * 8)
            finish.begin(w.bind("column", self.first_group * GROUP + place))
            held = finish.fetch(rows)
            finish.parameters([(self.columns, i * tile.bn + place) for i in range(3)])
            for number, (index, row) in enumerate(zip(own, rows, strict=True)):
                joined = tile.warps_k > 1
                finish.row(row, self._row_sums(group, index, joined), held, number)

    def _settle(self, group: int) -> None:
        """Have a group's sums ready."""

    def _offset(self, index: int) -> int:
        """Return how far an eighth of a warp's rows is from the first one."""
        return 8 * index

    def _register(self, group: int, index: int, i: int) -> int:
        """Return the register of sum ``i`` of eight neighbouring ones of a row."""
        mt, half = divmod(index, 2)
        return self._sum(0, mt, group, i // 2) + 2 * half + i % 2

    def _row_sums(self, group: int, index: int, joined: bool = False) -> list[Any]:
        """Return eight neighbouring sums of a row, of both planes unless they are joined."""
        found = []
        for i in range(8):
            at = self._register(group, index, i)
            value = load(self.sums, at)
            if self.size == 2 and not joined:
                low = load(self.sums, at + self._sum(1, 0, 0, 0))
                value = tirx.shift_left(value, const(8, "int32")) + low
            found.append(value)
        return found
