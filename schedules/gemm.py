"""What a matmul kernel is told: its epilogue, and the tile that it is built with.

Both are plain data. :class:`Epilogue` travels from the operator's TE definition to its schedule as
an annotation of the block ``out`` (:data:`ANNOTATION`), so whoever schedules a PrimFunc need not
guess the parameters back from its arithmetic. :class:`Tile` is one point of the tuning space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .dot import Dot, dot_named
from .isa import ISA

__all__ = ["ANNOTATION", "Epilogue", "GemmSpec", "Tile", "default_tile", "linear_tile",
           "row_chunks", "row_tiles", "tail_tile"]

ANNOTATION = "vitq.gemm"


@dataclass(frozen=True)
class Epilogue:
    """What happens to the int32 accumulator before it is stored.

    Parameters
    ----------
    kind
        ``"acc"`` (store the accumulator), ``"requant"``, or ``"requant_add"`` (with a residual).
    zero_point, qmin, qmax, out_dtype
        Output code: ``clamp(rq(acc) [+ rq(res)] + zero_point, qmin, qmax)``. Activation matmuls
        take the zero point, and the one multiplier and shift of all columns, as an argument.
    res_mult, res_shift
        Rescale of the residual.
    narrow
        Proved: every shift of the accumulator is at least 32 - ``lift`` (33 on GPUs) and the
        accumulator stays in int32 when shifted left by ``lift``, so rq fits the fast form.
    lift
        See ``narrow``.
    fold_zero
        The zero point may be folded into the 64-bit rounding constants.
    """

    kind: str = "acc"
    zero_point: int = 0
    qmin: int = -(2**31)
    qmax: int = 2**31 - 1
    out_dtype: str = "int32"
    res_mult: int = 0
    res_shift: int = 0
    narrow: bool = False
    lift: int = 0
    fold_zero: bool = False


@dataclass(frozen=True)
class GemmSpec:
    """A whole matmul PrimFunc: which one, its packed layout, its epilogue.

    Parameters
    ----------
    kind
        ``"linear"``, ``"packed_linear"`` or ``"matmul"``.
    epilogue
        What follows the accumulator.
    dot, vectors
        Dot sequence of the packed layout and vectors of columns in a block.
    offset
        Added to every activation code (the bias takes it back).
    chains
        For a sequence that adds in int16: for each column block, how many groups of K may be added
        before they are widened; 0 where not even one may, so that ``fallback`` is used.
    fallback
        Dot sequence of such blocks.
    gather
        Of a packed linear: its last operand is a table of the rows that are taken of ``"x"``, of
        the ``"residual"``, or of ``"both"``.
    transpose_b
        Of a matmul.
    a_axes, b_axes, out_axes
        Of a matmul: the operands are the tensors permuted by these, and so is what is stored; empty
        where nothing is permuted. The last axis stays the last.
    tile
        Of a packed linear, what a record says of it; None for the default rules.
    """

    kind: str
    epilogue: Epilogue
    dot: str = ""
    vectors: int = 0
    offset: int = 0
    chains: tuple[int, ...] = ()
    fallback: str = ""
    gather: str = ""
    transpose_b: bool = False
    a_axes: tuple[int, ...] = ()
    b_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    tile: Tile | None = None

    def to_json(self) -> str:
        """Return the annotation's text."""
        found = asdict(self)
        if self.tile is None:
            del found["tile"]
        return json.dumps(found, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> GemmSpec:
        """Read what :meth:`to_json` wrote."""
        found = json.loads(text)
        found["epilogue"] = Epilogue(**found["epilogue"])
        for name in ("chains", "a_axes", "b_axes", "out_axes"):
            found[name] = tuple(found[name])
        if "tile" in found:
            found["tile"] = Tile(**found["tile"])
        return GemmSpec(**found)


@dataclass(frozen=True)
class Tile:
    """How a matmul kernel is cut.

    Parameters
    ----------
    rows
        Rows of the register tile, at most.
    vectors
        Vectors of columns of the register tile (the packed layout has ``vectors * lanes`` columns).
    unroll
        Steps of K in one round of the inner loop.
    expand
        Sign-extend a column block's weights once into a local panel, instead of in the inner loop.
    chunks
        Parts that the rows are cut into, at most. Every column block of every part is a piece of
        work of its own, for the caches and for threads.
    by_rows
        Whether the pieces of one part follow each other, rather than those of one column block.
    """

    rows: int
    vectors: int
    unroll: int = 1
    expand: bool = False
    chunks: int = 1
    by_rows: bool = False

    @staticmethod
    def of(point: Mapping[str, Any]) -> Tile:
        """Take the tile out of a point of the tuning space."""
        names = [field.name for field in fields(Tile)]
        return Tile(**{name: point[name] for name in names if name in point})

    def with_rows(self, rows: int) -> Tile:
        """Return the same tile with another number of rows."""
        return replace(self, rows=rows)


def default_tile(isa: ISA, rows: int, columns: int, dot: Dot | None = None) -> Tile:
    """Return the tile that is used where no record says better.

    As many accumulators as the registers hold beside one step's operands (AVX2: 12 of 16, AVX-512:
    24 of 32), in as many vectors of columns as waste the fewest columns; of equals, the two-vector
    form, which loads least. Sequences that name their own tiles (``dot.tiles``) choose among those.
    """
    accumulators = 24 if isa.registers == 32 else 12
    choices: tuple[int, ...] = (2, 4, 1) if rows > 4 else (4, 2, 1)
    sizes = {vectors: accumulators // vectors for vectors in choices}
    if dot is not None and dot.tiles:
        sizes = dict(dot.tiles)
        choices = tuple(sizes)

    def padded(vectors: int) -> int:
        block = vectors * isa.lanes
        return -(-columns // block) * block

    vectors = min(choices, key=padded)
    if padded(vectors) * 10 > padded(choices[0]) * 9:  # less than a tenth saved: not worth it
        vectors = choices[0]
    return Tile(rows=sizes[vectors], vectors=vectors, expand=rows >= 24)


def tail_tile(tile: Tile, dot: Dot, columns: int) -> Tile:
    """Return the tile of the last, smaller column block: as few vectors, and as many rows."""
    vectors = -(-columns // dot.lanes)
    if not dot.tiles:
        return replace(tile, vectors=vectors, rows=tile.rows * tile.vectors // vectors)
    enough = [choice for choice in dot.tiles if vectors <= choice[0] < tile.vectors]
    if not enough:
        return tile
    vectors, rows = min(enough)
    return replace(tile, vectors=vectors, rows=rows)


def linear_tile(isa: ISA, spec: GemmSpec, rows: int, columns: int) -> Tile:
    """Return the tile of a packed weight matmul; the packed layout fixes its vectors.

    A sequence that adds in int16 keeps the weights of a whole chain in registers, so its tile has
    fewer rows: 3 x 2 on AVX2, beside 4 weight vectors, two activations, two sums and the ones.
    """
    dot = dot_named(spec.dot)
    if dot.tiles:
        return Tile(dict(dot.tiles)[spec.vectors], spec.vectors, expand=rows >= 24)
    tile = replace(default_tile(isa, rows, columns), vectors=spec.vectors)
    if max(spec.chains, default=0) <= 1:
        return tile
    return tile.with_rows(tile.rows * 2 // 3 if isa.registers == 32 else tile.rows // 2)


def row_chunks(total: int, tile: Tile) -> tuple[int, int]:
    """Return number and rows of the parts that ``tile`` cuts ``total`` rows into.

    All parts have as many rows; the last one ends at the last row, overlapping the one before.
    """
    rows = -(-total // tile.chunks)
    rows = min(-(-rows // tile.rows) * tile.rows, total)
    return -(-total // rows), rows


def row_tiles(total: int, most: int) -> list[tuple[int, int, int]]:
    """Cut ``total`` rows into tiles of at most ``most`` rows.

    One height is best (the kernel's code is made once for each): tiles that do not divide the rows
    then overlap the one before at the end. Where that would repeat more than 2 % of the rows, there
    are two heights that differ by one.

    Returns
    -------
    list of (start, count, height)
        ``count`` tiles of ``height`` rows from row ``start``, the last one moved back to end at
        ``total`` if it would pass it; one or two entries.
    """
    for height in range(most, max(most - 3, 1), -1):
        count = -(-total // height)
        if height <= total and count * height <= total * 1.02:
            return [(0, count, height)]
    tiles = -(-total // most)
    low, extra = divmod(total, tiles)
    parts = [(0, extra, low + 1)] if extra else []
    return [*parts, (extra * (low + 1), tiles - extra, low)]
