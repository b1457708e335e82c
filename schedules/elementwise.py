"""The generic schedule: fuse the outer loops and run them in parallel, vectorise the inner one."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.s_tir.schedule import Schedule

__all__ = ["is_lookup", "schedule_generic"]

SPATIAL, REDUCTION = 0, 2


def _kinds(schedule: Schedule, block: Any) -> list[int]:
    return [int(v.iter_type) for v in schedule.get(block).iter_vars]


def _extents(schedule: Schedule, block: Any) -> list[int]:
    return [int(v.dom.extent) for v in schedule.get(block).iter_vars]


def schedule_generic(func: tirx.PrimFunc, lanes: int) -> tirx.PrimFunc:
    """Schedule every block of ``func`` by itself, stages used once being inlined first.

    Parameters
    ----------
    func
        A PrimFunc made of TE stages.
    lanes
        Elements to vectorise over (32-bit lanes of the target).
    """
    schedule = Schedule(func)
    root = schedule.get_sblock("root")
    for block in schedule.get_child_blocks(root)[:-1]:
        if REDUCTION in _kinds(schedule, block):
            continue
        consumers = schedule.get_consumers(block)
        # A stage that several elements read (a row's factor, say) must not be computed for each.
        if len(consumers) == 1 and _extents(schedule, consumers[0]) == _extents(schedule, block):
            schedule.compute_inline(block)
    for block in schedule.get_child_blocks(root):
        _schedule_block(schedule, block, lanes)
    return schedule.mod["main"]


def is_lookup(block: Any) -> bool:
    """Whether a block only looks its result up in a table, at an index that it loads."""
    value = getattr(block.body, "value", None)

    def holds_load(expr: Any) -> bool:
        if type(expr).__name__ == "TensorLoad":
            return True
        parts = [getattr(expr, name) for name in ("a", "b", "value") if hasattr(expr, name)]
        return any(holds_load(part) for part in parts)

    if value is None or type(value).__name__ != "TensorLoad":
        return False
    return any(holds_load(i) for i in value.indices)


def _schedule_block(schedule: Schedule, block: Any, lanes: int) -> None:
    kinds = _kinds(schedule, block)
    loops = schedule.get_loops(block)
    if not loops or len(loops) != len(kinds):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == SPATIAL]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == REDUCTION]
    if not spatial:
        return
    *outer, inner = spatial
    extent = int(schedule.get(inner).extent)
    if is_lookup(schedule.get(block)):
        # One byte load and one store an element: vectors would only take the index apart.
        schedule.parallel(schedule.fuse(*outer) if outer else inner)
        return
    width = lanes if reduction else 2 * lanes
    while width > 1 and extent % width:
        width //= 2
    if width > 1:
        whole, vector = schedule.split(inner, [None, width])
        schedule.reorder(*outer, whole, *reduction, vector)
        schedule.vectorize(vector)
        inner = whole
    elif reduction:
        schedule.reorder(*outer, inner, *reduction)
    schedule.parallel(schedule.fuse(*outer, inner) if outer else inner)
