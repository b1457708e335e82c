"""Attention on a GPU: the rows of a block, and the warps that share a row's keys.

The parameters are those of :class:`~schedules.cuda.attention_tile.AttentionTile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ..cuda.attention_tile import MOST_SHARED_BYTES, AttentionTile, default_tile
from ..isa import ISA
from ..space import Space
from ..task import Point, Task

__all__ = ["gpu_attention_space", "gpu_attention_task", "gpu_attention_tile"]

_MOST_WARPS = 16
"""A block of as many warps may have 128 registers a thread."""


def gpu_attention_task(
    shape: tuple[int, int, int, int], dtypes: Sequence[str], between: int
) -> Task:
    """Describe an attention.

    Parameters
    ----------
    shape
        Batch entries, rows, keys, channels of Q and K.
    dtypes
        Of Q, K and V.
    between
        How many elementwise operators the scores go through.
    """
    return Task.of("gpu_attention", op="attention", shape=shape, dtypes="*".join(dtypes),
                   between=between)


def gpu_attention_tile(task: Task) -> AttentionTile:
    """Return the tile of the default rule."""
    entries, rows, keys, _ = task.shape
    return default_tile(entries * -(-rows // 16), keys)


def gpu_attention_space(task: Task, _isa: ISA) -> Space:
    """Return the space of an attention; it is small enough to be tried whole."""
    _, rows, keys, _ = task.shape
    default = asdict(gpu_attention_tile(task))
    steps = -(-keys // 32)

    def allowed(point: Point) -> bool:
        tile = AttentionTile(**point)
        return (tile.rows * tile.split <= _MOST_WARPS and tile.split <= steps
                and (tile.rows == 1 or 16 * (tile.rows - 1) < rows)
                and tile.shared(keys) <= MOST_SHARED_BYTES)

    parameters = {"rows": [1, 2, 3, 4, 6, 8], "split": [1, 2, 4, 8]}
    return Space(parameters, default, lambda point: point == default or allowed(point))
