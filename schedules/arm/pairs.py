"""Register tiles of ``smmla``: two rows by two columns in every accumulator.

A tile is ``rows/2`` row pairs by ``nt/2`` column pairs. One step multiplies 8 channels of K: it
loads 16 bytes of every row pair and of every column pair, so twelve rows by eight columns are ten
loads for 24 instructions. At the end the halves of two neighbouring accumulators are put together
(``zip1`` and ``zip2`` of 64-bit words) into a vector of four columns for each of the two rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tvm import tirx

from ..builder import const, load
from ..gemm import row_tiles
from ..operands import Pass, row_pair

if TYPE_CHECKING:
    from ..kernel import GemmKernel

__all__ = ["all_pairs"]


def _pick(vectors: list[Any], order: list[int]) -> Any:
    return tirx.Shuffle(vectors, [tirx.const(i, "int32") for i in order])


def all_pairs(kernel: GemmKernel, total: int) -> None:
    """Run the register tile over rows 0 to ``total``, two by two."""
    w, pairs = kernel.w, -(-total // 2)
    for start, count, height in row_tiles(pairs, kernel.tile.rows // 2):
        with w.loop("tile", count) as t:
            first = start + t * height
            if start + count * height > pairs:
                first = tirx.min(first, tirx.const(pairs - height, "int32"))
            _tile(kernel, w.bind("first_pair", first), height, total)


def _tile(kernel: GemmKernel, first: Any, height: int, total: int) -> None:
    w, vectors = kernel.w, kernel.tile.vectors
    columns = 2 * vectors
    acc = w.alloc("acc", (height * columns * 4,), "int32")

    def at(pair: int, column: int) -> int:
        return (pair * columns + column) * 4

    def starts(value_of: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
        """Yield column pairs and their start values, for both rows of a pair."""
        for v in range(vectors):
            value = w.bind("start", value_of(v))
            for half in (0, 1):
                order = [2 * half, 2 * half + 1] * 2
                yield 2 * v + half, w.bind("start", _pick([value], order))

    for column, value in starts(kernel.first_value):
        for pair in range(height):
            w.store(acc, value, at(pair, column), lanes=4)
    for index, step in enumerate(kernel.passes):
        if index:
            for column, value in starts(kernel.start_value):
                for pair in range(height):
                    here = load(acc, at(pair, column), lanes=4)
                    shifted = tirx.shift_left(here, const(8, "int32x4")) + value
                    w.store(acc, shifted, at(pair, column), lanes=4)
        _multiply(kernel, step, acc, first, height)
    for pair in range(height):
        rows = row_pair(first + pair, total)
        sums = [[load(acc, at(pair, c), lanes=4) for c in (2 * v, 2 * v + 1)]
                for v in range(vectors)]
        sums = [[w.bind("sum", value) for value in both] for both in sums]
        for half, row in enumerate(rows):
            order = [2 * half, 2 * half + 1, 2 * half + 4, 2 * half + 5]
            kernel.finish([_pick(both, order) for both in sums], row)


def _multiply(kernel: GemmKernel, step: Pass, acc: Any, first: Any, height: int) -> None:
    w, dot, rows = kernel.w, step.dot, step.rows
    size = 2 * dot.kv
    with w.loop("ko", rows.depth // dot.kv) as k:
        columns = []
        for v in range(kernel.tile.vectors):
            whole = w.bind("w", kernel.column_vector(k, v))
            columns += [w.bind("w", _pick([whole], list(range(i * size, (i + 1) * size))))
                        for i in (0, 1)]
        for pair in range(height):
            codes = w.bind("a", rows.load(first + pair, k * size, size))
            for c, weights in enumerate(columns):
                at = (pair * len(columns) + c) * 4
                w.store(acc, dot.step(load(acc, at, lanes=4), [codes], [weights]), at, lanes=4)
