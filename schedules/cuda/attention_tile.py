"""How attention is cut for a GPU, and the rule that chooses."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MOST_SHARED_BYTES", "AttentionTile", "default_tile"]

STEP_BYTES = 1024
"""Scratch of one step of 32 keys of a warp: 16 rows of 16-bit codes."""
EXCHANGE_BYTES = 2048 + 2 * 64
"""What a warp gives the others of its rows: 16 x 32 sums, 16 maxima, 16 sums of a row."""
SHARED_BYTES = 48 * 1024
MOST_SHARED_BYTES = 64 * 1024
"""Shared memory of a block: as much as any launch has, and what sm_75 gives if asked."""


@dataclass(frozen=True)
class AttentionTile:
    """How the kernel is cut: a point of the tuning space.

    Parameters
    ----------
    rows
        Groups of 16 query rows of a block.
    split
        Warps that share such a group, each with its part of the keys.
    """

    rows: int
    split: int

    def shared(self, keys: int) -> int:
        """Return the bytes of shared memory of a block."""
        steps = -(-keys // (32 * self.split))
        exchange = EXCHANGE_BYTES if self.split > 1 else 0
        return self.rows * self.split * (steps * STEP_BYTES + exchange)


def default_tile(groups: int, keys: int, sms: int = 132) -> AttentionTile:
    """Return the tile that is used where nothing says better.

    Parameters
    ----------
    groups
        Groups of 16 query rows of the whole problem.
    keys
        Length of a row of scores.
    sms
        Multiprocessors of the device, each with four schedulers.

    Warps share rows until every scheduler has one; blocks have four warps if there are then as many
    blocks as multiprocessors.
    """
    steps, split = -(-keys // 32), 1
    while split < 8 and groups * split < 4 * sms and 2 * split <= steps:
        split *= 2
    rows = max(1, min(4 // split, groups // sms))
    tile = AttentionTile(rows, split)
    while tile.rows > 1 and tile.shared(keys) > SHARED_BYTES:
        tile = AttentionTile(tile.rows - 1, split)
    while tile.split > 1 and tile.shared(keys) > MOST_SHARED_BYTES:
        tile = AttentionTile(tile.rows, tile.split // 2)
    return tile
