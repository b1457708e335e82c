"""Weight matmuls on a GPU: the tile of a block, its warps, the pipeline.

The parameters are those of :class:`~schedules.cuda.tile.CudaTile`. A task is one kernel: several
matmuls of the same rows, and what follows them, count as one. All points take the same packed
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..cuda.target import ARCHITECTURES, is_hopper
from ..cuda.tile import (
    MOST_OUTPUTS,
    MOST_REGISTERS,
    REGISTERS,
    SHARED,
    SPARE,
    CudaTile,
    default_tile,
    predicted,
)
from ..isa import ISA
from ..space import Space
from ..task import Point, Task

__all__ = ["gpu_linear_space", "gpu_linear_task", "gpu_linear_tile"]

_MOST_WARPS, _MOST_WARPS_TOGETHER = 8, 16


def gpu_linear_task(
    op: str, rows: int, columns: Sequence[int], depth: int, dtype: str, out_dtype: str,
    unit: int = 16, gather: str = "",
) -> Task:  # fmt: skip
    """Describe a kernel of weight matmuls.

    Parameters
    ----------
    op
        ``linear``, ``linear_requant`` or ``linear_requant_add``; ``+`` and its name for an
        elementwise operator that follows.
    rows, columns, depth
        M, the N of each member, K as it is packed.
    dtype, out_dtype
        Of the activations, of the last result.
    unit
        Bytes that are copied at once: how the rows, or the pieces that they are made of, lie.
    gather
        What is taken by a table of rows, as in ``GemmSpec``.
    """
    return Task.of("gpu_linear", op=op, shape=[rows, sum(columns), depth], columns=list(columns),
                   dtypes=f"{dtype}→{out_dtype}", unit=unit, gather=gather)


def _problem(task: Task) -> tuple[int, list[int], int, int, bool, int]:
    rows, _, depth = task.shape
    op = str(task.fields["op"])
    size, out = (int(np.dtype(name).itemsize)
                 for name in str(task.fields["dtypes"]).split("→"))
    result = out * (2 if op.startswith("linear_requant_add") else 1)
    return rows, list(task.fields["columns"]), depth, size, "+" in op, result


def gpu_linear_tile(task: Task, arch: str) -> CudaTile:
    """Return the tile of the default rule.

    Parameters
    ----------
    task
        The kernel.
    arch
        One of :data:`~schedules.cuda.target.ARCHITECTURES`; "" for what all of them have.
    """
    return default_tile(*_problem(task), _room(arch), is_hopper(arch))


def _room(arch: str) -> int:
    return max(SHARED, ARCHITECTURES.get(arch, 0) - SPARE)


def gpu_linear_space(task: Task, isa: ISA) -> Space:
    """Return the space of a kernel of weight matmuls."""
    rows, columns, depth, size, tail, result = _problem(task)
    shared = _room(isa.name)
    unit = int(task.fields["unit"])
    default = asdict(gpu_linear_tile(task, isa.name))
    if not is_hopper(isa.name):
        del default["wgmma"]  # points are as they were before there was a choice

    def allowed(point: Point) -> bool:
        try:
            tile = CudaTile(**point)
        except ValueError:
            return False
        warps = tile.threads // 32
        outputs = tile.bm * tile.bn * tile.warps_k // tile.threads
        if tile.wgmma and (size > 1 or tile.registers(1) * tile.threads > REGISTERS):
            return False
        return (warps <= (_MOST_WARPS_TOGETHER if tile.wgmma else _MOST_WARPS)
                and tile.registers(size) <= MOST_REGISTERS
                and tile.shared_bytes(size) <= shared
                and not (tail and outputs > MOST_OUTPUTS)
                and tile.threads >= tile.bk * size // max(unit, 4)
                and (tile.stages - 1) * tile.bk < depth + tile.bk
                and (tile.bm == 16 or tile.bm < 2 * rows))

    def cost(point: Point) -> float:
        tile = CudaTile(**point)
        late = 0.1 * (tile.stages == 2 and depth > 2 * tile.bk) + 0.02 * abs(tile.stages - 4)
        return (1 + late) * predicted(tile, rows, columns, depth, size, tail, result, shared)

    parameters: dict[str, Any] = {
        "bm": [16, 32, 64, 96, 128, 192, 256],
        "bn": [32, 64, 96, 128, 256],
        "bk": [64, 128, 256],
        "warps_m": [1, 2, 4],
        "warps_n": [1, 2, 4],
        "stages": [2, 3, 4, 5],
        "warps_k": [1, 2, 4],
    }
    if is_hopper(isa.name):
        parameters |= {"wgmma": [False, True],
                       "bn": [32, 64, 96, 128, 192, 256], "warps_m": [1, 2, 4, 8, 12, 16],
                       "stages": [2, 3, 4, 5, 6]}
    return Space(parameters, default, lambda point: point == default or allowed(point), cost)
