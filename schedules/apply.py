"""The pass that gives every PrimFunc its schedule.

A PrimFunc whose last block carries a :class:`~schedules.gemm.GemmSpec` gets the matmul kernel of
the instruction set; everything else gets the rule for its shape of loops. Functions that are
scheduled already (attribute ``tirx.is_scheduled``) are left alone. How a kernel is cut is looked up
in the records of tuning; the default rules hold where these say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import tirx

from .arm.table import byte_lookup
from .dot import dot_named
from .elementwise import schedule_generic
from .gemm import ANNOTATION, GemmSpec, Tile, default_tile, linear_tile
from .isa import ISA
from .records import Schedules
from .rows import lower_rows, task_of_rows
from .rowwise import is_rowwise, schedule_rowwise
from .spaces.matmul import matmul_task
from .task import Task

__all__ = ["SCHEDULED", "ApplySchedules", "gemm_spec", "schedule_function", "task_of"]

SCHEDULED = "tirx.is_scheduled"


def gemm_spec(func: tirx.PrimFunc) -> GemmSpec | None:
    """Return the matmul annotation of a PrimFunc, None if it has none."""
    found = [
        str(block.annotations[ANNOTATION])
        for block in blocks_of(func.body)
        if ANNOTATION in block.annotations
    ]
    return GemmSpec.from_json(found[0]) if len(found) == 1 else None


def blocks_of(statement: Any) -> Iterator[Any]:
    """Yield the blocks below a statement, outer ones first."""
    if isinstance(statement, tvm.s_tir.SBlockRealize):
        yield statement.block
        yield from blocks_of(statement.block.body)
    elif isinstance(statement, tirx.SeqStmt):
        for part in statement.seq:
            yield from blocks_of(part)
    elif isinstance(statement, tirx.For | tirx.AttrStmt):
        yield from blocks_of(statement.body)
    elif isinstance(statement, tirx.IfThenElse):
        yield from blocks_of(statement.then_case)
        if statement.else_case is not None:
            yield from blocks_of(statement.else_case)


def _attrs(func: tirx.PrimFunc) -> dict[str, Any]:
    return {str(key): func.attrs[key] for key in list(func.attrs.keys())}


def task_of(func: tirx.PrimFunc) -> Task | None:
    """Return the task of an unscheduled PrimFunc that is looked up here, None if it has none.

    Weight matmuls are looked up when they are packed (``relay_passes.pack``).
    """
    spec = gemm_spec(func)
    if spec is None:
        integer = all("float" not in str(buffer.dtype) for buffer in func.params)
        if "vitq.op" not in func.attrs or not integer:  # moves elements, or is the float boundary
            return None
        return task_of_rows(func, [block for block in blocks_of(func.body) if block.iter_vars])
    return matmul_task(func, spec) if spec.kind == "matmul" else None


def schedule_function(
    func: tirx.PrimFunc, isa: ISA, tile: Tile | None = None, schedules: Schedules | None = None
) -> tirx.PrimFunc:
    """Return ``func`` scheduled for ``isa``.

    Parameters
    ----------
    func
        Made of TE stages.
    isa
        Instruction set.
    tile
        Of a matmul; None takes what the records say, or the default rules.
    schedules
        The records; None for the default rules alone.
    """
    spec = gemm_spec(func) if isa.has_kernels else None
    if isa.gpu:
        from .cuda.apply import schedule_cuda

        blocks = [block for block in blocks_of(func.body) if block.iter_vars]
        return schedule_cuda(func, spec, blocks, _attrs(func), schedules)
    task = task_of(func) if isa.has_kernels and schedules is not None else None
    point = schedules.point(task) if schedules is not None and task is not None else None
    if spec is not None and spec.kind == "packed_linear":
        from .packed_linear import packed_linear

        tile = tile or spec.tile
        if tile is None:
            shape = [int(extent) for extent in func.params[-1].shape]
            rows = 1
            for extent in shape[:-1]:
                rows *= extent
            tile = linear_tile(isa, spec, rows, shape[-1])
        return packed_linear(list(func.params), spec, tile, _attrs(func))
    if spec is not None and spec.kind == "matmul":
        kernel = _matmul_kernel(func, spec, isa, tile or (Tile.of(point) if point else None))
        if kernel is not None:
            return kernel
    if isa.has_kernels:
        blocks = [block for block in blocks_of(func.body) if block.iter_vars]
        lowered = None
        if "neon" in isa.features and len(blocks) == 1:
            lowered = byte_lookup(func, blocks[0], _attrs(func))
        lowered = lowered or lower_rows(func, blocks, isa, _attrs(func), point)
        if lowered is not None:
            return lowered
    if is_rowwise(func):
        return schedule_rowwise(func, 16).with_attrs(_attrs(func))
    return schedule_generic(func, isa.lanes).with_attrs(_attrs(func))


def _matmul_kernel(
    func: tirx.PrimFunc, spec: GemmSpec, isa: ISA, tile: Tile | None
) -> tirx.PrimFunc | None:
    """Return the kernel of an activation matmul, None if no sequence takes its dtypes."""
    from .activation_matmul import activation_matmul

    a, b, *_, out = func.params
    name = isa.dot(str(a.dtype), str(b.dtype))
    if not name:
        return None
    dot = dot_named(name)
    if tile is None:
        rows = a.shape[spec.a_axes[-2] if spec.a_axes else -2]
        tile = default_tile(isa, int(rows), int(out.shape[-1]), dot)
    return activation_matmul(list(func.params), spec, dot, tile, _attrs(func))


@tvm.transform.module_pass(opt_level=0, name="vitq.ApplySchedules")
class ApplySchedules:
    """Schedule every PrimFunc of a module for one instruction set."""

    def __init__(self, isa: ISA, schedules: Schedules | None = None) -> None:
        self.isa = isa
        self.schedules = schedules or Schedules.shipped(isa)

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Replace each PrimFunc by its scheduled form."""
        updates = {}
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and not func.attrs.get(SCHEDULED, False):
                done = schedule_function(func, self.isa, schedules=self.schedules)
                updates[gvar] = done.with_attr(SCHEDULED, True)
        result = mod.clone()
        for gvar, func in updates.items():
            result.update_func(gvar, func)
        return result
