"""How operators over rows are laid over the threads of a GPU, and the rule that chooses."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MOST_HELD", "RowTile", "default_row_tile"]

MOST_HELD = 64
"""Elements of a row that one thread keeps; longer rows are read again in every pass."""
_SCHEDULERS = 132 * 4
_ELEMENT, _CHUNK, _SHUFFLE = 12, 10, 12
"""Instructions for an element, a chunk and one step of a reduction, roughly."""


@dataclass(frozen=True)
class RowTile:
    """How rows are laid over threads.

    Parameters
    ----------
    lanes
        Threads of a row, a power of two up to 32.
    width
        Neighbouring elements of a chunk.
    warps
        Warps of a block.
    """

    lanes: int
    width: int
    warps: int


def default_row_tile(
    rows: int, length: int, itemsize: int, reductions: int, aligned: int | None = None
) -> RowTile:
    """Return the tile that takes the fewest instructions of the busiest scheduler.

    Parameters
    ----------
    rows, length
        Of the result.
    itemsize
        Bytes of an element of the widest operand along rows.
    reductions
        How many reductions a row has.
    aligned
        What the rows of all operands are as long as a multiple of; None: ``length``.
    """
    def cost(lanes: int, width: int) -> tuple[int, int]:
        chunks = -(-length // (lanes * width))
        one = chunks * (width * _ELEMENT + _CHUNK)
        one += reductions * _SHUFFLE * (lanes.bit_length() - 1)
        warps = -(-rows // (32 // lanes))
        return -(-warps // _SCHEDULERS) * one, chunks

    widths = [w for w in (1, 2, 4, 8, 16) if (aligned or length) % w == 0 and w * itemsize <= 16]
    choices = [(lanes, width) for lanes in (32, 16, 8, 4, 2, 1) for width in widths
               if length <= MOST_HELD * lanes or lanes == 32]
    lanes, width = min(choices, key=lambda choice: cost(*choice))
    warps = -(-rows // (32 // lanes))
    return RowTile(lanes, width, next(w for w in (4, 2, 1) if warps >= w * 132 or w == 1))
