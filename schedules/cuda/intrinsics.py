"""Dot sequences of NVIDIA GPUs: ``mma.sync`` m16n8k32 of int8, and the packed layout that it wants.

Weights are ``[N/32, K/16, 32, 16]``: 8 columns x 16 channels are 128 contiguous bytes, one matrix
of ``ldmatrix``. Two orders inside make fragments what they should be:

* column ``8*t + 2*j + i`` of 32 is in slot ``8*j + 2*t + i``: the results of a thread, columns
  ``2*t + i`` of four tiles ``j``, are eight neighbouring columns;
* for 16-bit activations, channel ``8*h + 2*t + i`` of 16 is in slot ``4*t + 2*h + i``:
  ``ldmatrix`` of rows of int16 gives thread ``t`` channels ``8*h + 2*t + i``, and their high and
  low bytes, taken apart by one byte permutation each, are fragments of two operands of bytes.
"""

from __future__ import annotations

from typing import Any

from schedules.dot import Dot

__all__ = ["DOTS", "GROUP", "CudaDot"]

GROUP = 32
"""Columns of a block of the packed layout."""


class CudaDot(Dot):
    """``mma.sync`` on codes of 8 or, as two planes of bytes, of 16 bits."""

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """One layout; :mod:`schedules.cuda.tile` cuts the work."""
        return ((GROUP // self.lanes, 16),)

    def offset(self, dtype: str) -> int:
        """Nothing is added: there are signed and unsigned forms."""
        return 0

    @property
    def least_shift(self) -> int:
        """The rounding constant is added to the high word of the product."""
        return 33

    def column_slot(self, column: Any) -> Any:
        """Return where a column stands in its block."""
        return column % 8 // 2 * 8 + column // 8 * 2 + column % 2

    def channel_slot(self, channel: Any) -> Any:
        """Return where a channel stands in its group."""
        if self.operand == "int8":
            return channel
        return channel % 8 // 2 * 4 + channel // 8 * 2 + channel % 2


DOTS = {
    dot.name: dot
    for dot in (
        CudaDot("mma8", 8, 16, "int8", "int8", "mma.sync.m16n8k32", "IMMA"),
        CudaDot("mma16", 8, 16, "int16", "int8", "mma.sync.m16n8k32", "IMMA"),
    )
}
"""The sequences by name."""
