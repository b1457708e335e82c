"""Weight matmuls: the dot sequence, the packed layout, the register tile, the order of the work.

=========  =======================================================================================
dot        sequence: the one for any weights, or where the weights allow it the one that adds in
           int16
chain      groups of K added in int16, at most; 0: as many as are proved
vectors    vectors of columns in a block: the packed layout
rows       of the register tile
unroll     steps of K in a round of the inner loop
expand     whether weights are sign-extended once a block (sequences of 16-bit operands)
chunks     parts of the rows
by_rows    whether the blocks of one part follow each other, or the parts of one block
=========  =======================================================================================
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..dot import Dot, dot_named
from ..gemm import Epilogue, GemmSpec, Tile, default_tile, linear_tile, row_chunks, row_tiles
from ..isa import ISA
from ..space import Space
from ..task import Point, Task

__all__ = ["inner_cost", "linear_space", "linear_task", "registers_of",
           "row_choices"]

CHUNKS = (1, 2, 4, 8, 16)


def linear_task(
    op: str, shape: tuple[int, int, int], dtype: str, out_dtype: str, residual: str, chain: int
) -> Task:
    """Describe a weight matmul.

    Parameters
    ----------
    op
        ``linear``, ``linear_requant`` or ``linear_requant_add``.
    shape
        M, N, K.
    dtype, out_dtype, residual
        Of the activations, the result and, "" if there is none, what is added.
    chain
        Groups of K that most column blocks may add in int16, 0 if none.
    """
    dtypes = f"{dtype}{'+' if residual else ''}{residual}→{out_dtype}"
    return Task.of("linear", op=op, shape=shape, dtypes=dtypes, chain=chain)


def _sequences(task: Task, isa: ISA) -> list[Dot]:
    """Return the sequences that the task may take, the default one first."""
    plain = dot_named(isa.dot(str(task.fields["dtypes"]).partition("→")[0].partition("+")[0]))
    if task.fields["chain"] and isa.proved8 and plain.name == isa.dot8:
        return [dot_named(isa.proved8), plain]
    return [plain]


def _default(task: Task, isa: ISA, dot: Dot) -> Point:
    rows, columns, _ = task.shape
    plain = _sequences(task, isa)[-1]
    vectors = default_tile(isa, rows, columns, plain).vectors
    chains = (int(task.fields["chain"]),) if dot is not plain else ()
    spec = GemmSpec("packed_linear", Epilogue(), dot=dot.name, vectors=vectors, chains=chains)
    tile = linear_tile(isa, spec, rows, columns)
    return {"dot": dot.name, "chain": 0, **asdict(tile)}


def registers_of(dot: Dot, rows: int, vectors: int, chain: int) -> int:
    """Return how many vector registers the inner loop wants: sums, weights, codes, scratch."""
    groups = max(chain, 1)
    return rows * vectors + vectors * groups + groups + 1 + (groups > 1) + (chain > 0)


def inner_cost(isa: ISA, dot: Dot, rows: int, vectors: int, chain: int, expand: bool) -> float:
    """Predict the time of the inner loop for a vector of sums and one channel, in instructions.

    A step multiplies, loads the rows' codes and the columns' weights; registers that are not there
    cost a load and a store.
    """
    groups = max(chain, 1)
    multiply = (2 * groups + 1) / groups if chain else 2.0
    loads = (rows + vectors * (1 if expand or dot.weight == "int8" else 2)) / (rows * vectors)
    missing = max(0, registers_of(dot, rows, vectors, chain) - isa.registers)
    return (multiply + loads + 1.5 * missing / (rows * vectors * groups)) / dot.kv


def row_choices(isa: ISA, dot: Dot, most: int) -> list[int]:
    """Return heights of register tiles for at most ``most`` rows."""
    heights: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 24)
    if dot.rows == 2:
        heights = tuple(height for height in heights if height % 2 == 0)
    return [height for height in heights if height <= max(most, dot.rows)]


def linear_space(task: Task, isa: ISA) -> Space:
    """Return the space of a weight matmul."""
    total, columns, _ = task.shape
    dots = _sequences(task, isa)
    default = _default(task, isa, dots[0])
    limit = int(task.fields["chain"])
    sizes = dict(dots[0].tiles)
    names = {dot.name: dot for dot in dots}
    proved = dots[0].name if len(dots) > 1 else ""

    def groups(point: Point) -> int:
        if point["dot"] != proved:
            return 0
        return point["chain"] or limit

    def allowed(point: Point) -> bool:
        dot, tile = names[point["dot"]], Tile.of(point)
        if sizes and tile.rows > sizes[tile.vectors]:
            return False
        if point["chain"] and (point["dot"] != proved or point["chain"] >= limit):
            return False
        if dot.weight == "int8" and tile.expand != default["expand"]:
            return False
        wanted = registers_of(dot, tile.rows, tile.vectors, groups(point))
        if not sizes and wanted > isa.registers + 6 and point != default:
            return False
        if tile.chunks > 1:
            count, rows = row_chunks(total, tile)
            return count == tile.chunks and rows >= 2 * tile.rows and dot.rows == 1
        return not tile.by_rows

    def cost(point: Point) -> float:
        dot, tile = names[point["dot"]], Tile.of(point)
        block = tile.vectors * dot.lanes
        padded = -(-columns // block) * block / columns
        count, rows = row_chunks(total, tile)
        repeated = count * sum(n * height for _, n, height in row_tiles(rows, tile.rows)) / total
        inner = inner_cost(isa, dot, tile.rows, tile.vectors, groups(point), tile.expand)
        start = 0.02 * (count - 1) + 0.03 * (tile.unroll - 1)
        return padded * repeated * inner + start

    heights = sorted({*row_choices(isa, dots[0], total), default["rows"]})
    vectors = tuple(sizes) if sizes else tuple(sorted({1, 2, 3, 4, default["vectors"]}))
    parameters: dict[str, Any] = {
        "dot": [dot.name for dot in dots],
        "chain": [0, *(c for c in (1, 2) if c < limit and proved)],
        "rows": heights,
        "vectors": list(vectors),
        "unroll": [1, 2] if not sizes else [1],
        "expand": [False, True],
        "chunks": [c for c in CHUNKS if c == 1 or total >= 8 * c],
        "by_rows": [False, True],
    }
    return Space(parameters, default, lambda point: point == default or allowed(point), cost)
