"""Schedule of operators that need statistics of a row: softmax, LayerNorm.

Such a PrimFunc has stages over rows (maxima, sums, a factor) and stages over elements, the last of
which writes the result. All stages of a row run inside one parallel loop over rows, so that
intermediates are one row long and stay in the first-level cache; what is computed once a row (the
division of a softmax, the root of a LayerNorm) stays outside the loop over elements.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.s_tir.schedule import Schedule

from .vectorize import vectorize_overlapped

__all__ = ["is_rowwise", "schedule_rowwise"]


def _extents(schedule: Schedule, block: Any, kind: int) -> list[int]:
    """Extents of a block's spatial (0) or reduction (2) axes."""
    return [int(v.dom.extent) for v in schedule.get(block).iter_vars if int(v.iter_type) == kind]


def is_rowwise(func: tirx.PrimFunc) -> bool:
    """Whether some stage reduces the last axis of the result, for each of its rows."""
    schedule = Schedule(func)
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    rows = _extents(schedule, blocks[-1], 0)[:-1]
    return len(blocks) > 2 and any(
        _extents(schedule, block, 2) and _extents(schedule, block, 0) == rows
        for block in blocks[:-1]
    )


def schedule_rowwise(func: tirx.PrimFunc, width: int) -> tirx.PrimFunc:
    """Put every stage of a row into one parallel loop over rows.

    Stages over elements are vectorised by ``width``; reductions are left to LLVM, which vectorises
    integer sums and maxima, with their start value stored apart (else LLVM peels the first
    element off, and the loads of the rest straddle what was stored just before).
    """
    schedule = Schedule(func)
    *stages, last = schedule.get_child_blocks(schedule.get_sblock("root"))
    *outer, _ = schedule.get_loops(last)
    row = schedule.fuse(*outer) if outer else schedule.add_unit_loop(last)
    schedule.parallel(row)
    for stage in reversed(stages):
        schedule.compute_at(stage, row, preserve_unit_loops=True)
        if _extents(schedule, stage, 2):
            schedule.decompose_reduction(stage, schedule.get_loops(stage)[1])
    return vectorize_overlapped(schedule.mod["main"], width)
