"""The multiplying kernel of packed weight matmuls on Hopper: four warps multiply together.

As :mod:`.tensor_core`, but for the products: ``wgmma`` reads rows and weights from shared memory
itself, 64 rows at a time and as many columns as a warp has, and runs beside the threads, which
meanwhile start the copies of a later stage. In step ``s``, behind its barrier, stage ``s`` has come
in for all, and the products of step ``s - 2`` are done for all: into their stage go the copies of
step ``s + stages - 2``. Those of step ``s - 1`` may run on, so tensor cores do not wait for the
barrier.

Rows lie in stages as :mod:`.staging` puts them, whose permutation of chunks is one that the
products know; weights as matrices of 8 columns of 16 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from schedules.builder import const, load

from .intrinsics import GROUP
from .member import Member
from .staging import CHUNK
from .tensor_core import TensorCoreLinears
from .tile import REGISTERS, CudaTile
from .writer import pointer

__all__ = ["WarpgroupLinears"]

_LOOSE, _PERMUTED = 0, {128: 1, 64: 2}
"""Forms of a descriptor: separate matrices; by the bytes of a row."""


class WarpgroupLinears(TensorCoreLinears):
    """One kernel of the members, whose activations have 8 bits."""

    def __init__(self, members: Sequence[Member], tile: CudaTile) -> None:
        super().__init__(members, tile)
        if self.size > 1:
            raise ValueError("products of four warps take activations of 8 bits")
        self.ahead = tile.stages - 2
        # Left to itself ptxas takes what one block may have, and a second one finds no room.
        self.registers = min(tile.registers(1), REGISTERS // tile.threads)

    def _place_lane(self) -> None:
        """Find the rows and columns of a warp, and of the four that it multiplies with."""
        w, tile = self.w, self.tile
        self.part = const(0, "int32")
        four = w.bind("four", tirx.floordiv(w.warp, const(4, "int32")))
        self.four_row = w.bind("four_row", tirx.floordiv(four, const(tile.warps_n, "int32"))
                               * (64 * tile.mt))
        self.warp_row = w.bind("warp_row", self.four_row + w.warp % 4 * 16)
        self.warp_group = w.bind("warp_group", four % tile.warps_n * tile.groups)

    def _offset(self, index: int) -> int:
        tile, half = divmod(index, 2)
        return 64 * tile + 8 * half

    def _walk(self) -> None:
        """Multiply along K."""
        w, tile = self.w, self.tile
        count = -(-self.steps * 16 // tile.bk)
        w.call("vitq_check_base", pointer(self.x.shared, 0))
        turns = w.registers("turns", 2)  # the stage that is read, and that is copied to
        w.store(turns, const(0, "int32"), 0)
        w.store(turns, const(self.ahead, "int32"), 1)
        with w.rolled("step", count) as step:
            w.call(f"vitq_copy_wait{self.ahead - 1}")
            w.call("vitq_fence_async")
            w.barrier()
            self._start(load(turns, 0))
            w.store(turns, self._next(load(turns, 0)), 0)
            later = step + self.ahead
            if count > self.ahead:
                with w.when(later < count):
                    self._issue(load(turns, 1), later * tile.bk)
            w.call("vitq_copy_commit")
            w.store(turns, self._next(load(turns, 1)), 1)
            w.call("vitq_wgmma_wait1")
        w.call("vitq_wgmma_wait0")

    def _settle(self, group: int) -> None:
        self.w.call("vitq_together")
        # Also keeps nvcc from loading all groups' parameters at once.
        for mt in range(self.tile.mt):
            for half in range(2):
                self.w.call("vitq_settle8", pointer(self.sums, self._sum(0, mt, group, 2 * half)))

    def _start(self, turn: Any) -> None:
        """Start the products of a stage."""
        w, tile = self.w, self.tile
        rows = w.bind("rows", w.value(
            "vitq_descriptor",
            pointer(self.x.shared, turn * self.x.stage + self.four_row * tile.bk),
            CHUNK, 8 * tile.bk, _PERMUTED[tile.bk]))
        weights = w.bind("weights", w.value(
            "vitq_descriptor",
            pointer(self.weights.shared,
                    turn * self.weights.stage + self.warp_group * (GROUP * CHUNK)),
            CHUNK * tile.bn, 8 * CHUNK, _LOOSE))
        w.call("vitq_wgmma_fence")
        for part in range(tile.bk // 32):
            for mt in range(tile.mt):
                # Addresses count in units of 16 bytes.
                row = rows + const(mt * 64 * tile.bk // CHUNK + 2 * part, "uint64")
                column = weights + const(2 * part * tile.bn, "uint64")
                w.call(f"vitq_wgmma_{self.planes[0]}_n{GROUP * tile.groups}",
                       pointer(self.sums, self._sum(0, mt, 0, 0)), row, column)
        w.call("vitq_wgmma_commit")
