"""Matmuls of two activations: the register tile, and the parts that a head's rows are cut into.

The parameters are those of :mod:`schedules.spaces.linear` of the same names; ``vectors`` is the
layout that the column operand is packed to at run time.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..dot import dot_named
from ..gemm import GemmSpec, Tile, default_tile, row_chunks, row_tiles
from ..isa import ISA
from ..operands import product
from ..space import Space
from ..task import Point, Task
from .linear import inner_cost, registers_of, row_choices

__all__ = ["matmul_space", "matmul_task"]

_NAMES = ("rows", "vectors", "unroll", "chunks")


def matmul_task(func: tirx.PrimFunc, spec: GemmSpec) -> Task:
    """Describe an activation matmul by its PrimFunc; the shape is batch, M, N, K."""
    a, b, *added, out = func.params
    shape = [int(extent) for extent in a.shape]
    *batch, rows, depth = [shape[i] for i in spec.a_axes] or shape
    residual = added[0].dtype if spec.epilogue.kind == "requant_add" else ""
    dtypes = f"{a.dtype}*{b.dtype}{'+' if residual else ''}{residual}→{out.dtype}"
    return Task.of("matmul", op="matmul_nt" if spec.transpose_b else "matmul", dtypes=dtypes,
                   shape=[product(batch), rows, int(out.shape[-1]), depth],
                   strides=[bool(spec.a_axes), bool(spec.b_axes), bool(spec.out_axes)])


def matmul_space(task: Task, isa: ISA) -> Space | None:
    """Return the space of an activation matmul."""
    _, total, columns, _ = task.shape
    left, _, right = str(task.fields["dtypes"]).partition("→")[0].partition("+")[0].partition("*")
    name = isa.dot(left, right)
    if not name:
        return None
    dot = dot_named(name)
    tile = default_tile(isa, total, columns, dot)
    default: Point = {key: getattr(tile, key) for key in _NAMES}
    sizes = dict(dot.tiles)

    def allowed(point: Point) -> bool:
        cut = Tile.of(point)
        if sizes and cut.rows > sizes[cut.vectors]:
            return False
        if not sizes and registers_of(dot, cut.rows, cut.vectors, 0) > isa.registers + 6:
            return False
        count, rows = row_chunks(total, cut)
        return count == cut.chunks and (count == 1 or rows >= 2 * cut.rows)

    def cost(point: Point) -> float:
        cut = Tile.of(point)
        count, rows = row_chunks(total, cut)
        block = cut.vectors * dot.lanes
        padded = -(-columns // dot.lanes) * dot.lanes / columns + 0.02 * (columns < block)
        repeated = count * sum(n * height for _, n, height in row_tiles(rows, cut.rows)) / total
        inner = inner_cost(isa, dot, cut.rows, cut.vectors, 0, True)
        return padded * repeated * inner + 0.05 * (count - 1)

    parameters: dict[str, Any] = {
        "rows": sorted({*row_choices(isa, dot, total), default["rows"]}),
        "vectors": list(sizes) if sizes else [1, 2, 4],
        "unroll": [1, 2] if not sizes else [1],
        "chunks": [c for c in (1, 2, 4) if c == 1 or total >= 8 * c],
    }
    return Space(parameters, default, lambda point: point == default or allowed(point), cost)
