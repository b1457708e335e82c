"""The generic schedule: fuse the outer loops and run them in parallel, vectorise the inner one."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.s_tir.schedule import Schedule

__all__ = ["schedule_generic"]


def _is_reduction(schedule: Schedule, block: Any) -> bool:
    return any(int(v.iter_type) == 2 for v in schedule.get(block).iter_vars)


def schedule_generic(func: tirx.PrimFunc, lanes: int) -> tirx.PrimFunc:
    """Schedule every block of ``func`` by itself, after inlining what only renames or maps.

    Parameters
    ----------
    func
        A PrimFunc made of TE stages.
    lanes
        Elements to vectorise over (32-bit lanes of the target).
    """
    schedule = Schedule(func)
    (root,) = [b for b in [schedule.get_sblock("root")] if b is not None]
    for block in schedule.get_child_blocks(root):
        if _is_reduction(schedule, block):
            continue
        try:
            schedule.compute_inline(block)
        except Exception:  # the last stage, or one that cannot be inlined
            continue
    for block in schedule.get_child_blocks(root):
        _schedule_block(schedule, block, lanes)
    return schedule.mod["main"]


def _schedule_block(schedule: Schedule, block: Any, lanes: int) -> None:
    kinds = [int(v.iter_type) for v in schedule.get(block).iter_vars]
    loops = schedule.get_loops(block)
    if not loops or len(loops) != len(kinds):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 0]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 2]
    if not spatial:
        return
    *outer, inner = spatial
    extent = int(schedule.get(inner).extent)
    if reduction:
        schedule.reorder(*outer, inner, *reduction)
        if extent >= lanes:
            whole, vector = schedule.split(inner, [None, lanes])
            schedule.reorder(whole, *reduction, vector)
            schedule.vectorize(vector)
            inner = whole
        schedule.parallel(schedule.fuse(*outer, inner) if outer else inner)
        return
    if extent >= 4:
        whole, vector = schedule.split(inner, [None, min(extent, 2 * lanes)])
        schedule.vectorize(vector)
        inner = whole
    schedule.parallel(schedule.fuse(*outer, inner) if outer else inner)
