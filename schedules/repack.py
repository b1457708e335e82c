"""Packing an activation at run time into the column operand of a matmul.

``packed[g, j, v] = source(g*kv + v, first + j)`` for ``nt`` columns (zeros where K is padded; only
an operand of fewer than ``nt`` columns has some behind N, which hold whatever is convenient and are
never stored), in the register form of the dot's second operand.

* Rows along K (``[K, N]``): ``kv`` neighbouring rows are interleaved.
* Rows along N (``[N, K]``, transposed): groups of ``kv`` codes are words, and 8 x 8 of them are
  transposed in registers; words of 64 bits are moved one by one.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .builder import Writer, const, load, vector_type
from .dot import Dot
from .operands import Operand

__all__ = ["column_sums", "pack_columns", "pack_rows"]

WORDS = 8
"""Edge of the block of words that is transposed at once."""


def _widen(value: Any, dtype: str, lanes: int) -> Any:
    return value if value.ty.dtype == vector_type(dtype, lanes) else tirx.Cast(
        vector_type(dtype, lanes), value)


def _zip(a: Any, b: Any, lanes: int, part: int | None = None) -> Any:
    """Interleave two vectors; ``part`` takes the low (0) or the high (1) half of the result."""
    order = [half * lanes + i for i in range(lanes) for half in (0, 1)]
    order = order if part is None else order[part * lanes : (part + 1) * lanes]
    return tirx.Shuffle([a, b], [tirx.const(p, "int32") for p in order])


def _interleave(w: Writer, dot: Dot, rows: list[Any], lanes: int) -> Any:
    count = len(rows)
    if dot.span > 1 and count > 1:  # NEON: rounds of zip1 and zip2
        even, odd = (_interleave(w, dot, rows[part::2], lanes) for part in (0, 1))
        return w.bind("zip", _zip(even, odd, lanes * count // 2))
    order = [r * lanes + i for i in range(lanes) for r in range(count)]
    return tirx.Shuffle(rows, [tirx.const(p, "int32") for p in order])


def _pack_slowly(w: Writer, element: Any, dot: Dot, groups: tuple[int, int], depth: int, nt: int,
                 out: Any, base: Any) -> None:
    """Pack groups [first, last) of one block element by element; ``element(k, j)`` gives a code."""
    first, last = groups
    if last <= first:
        return
    with w.loop("g", last - first) as step, w.loop("j", nt) as j:
        g = step + first
        for v in range(dot.kv):
            k = g * dot.kv + v
            value = tirx.Cast(dot.weight, element(tirx.min(k, tirx.const(depth - 1, "int32")), j))
            if depth % dot.kv:
                value = tirx.Select(k < depth, value, const(0, dot.weight))
            w.store(out, value, base + (g * nt + j) * dot.kv + v)


def pack_columns(w: Writer, source: Operand, dot: Dot, nt: int, first: Any, columns: int,
                 out: Any, base: Any) -> None:
    """Pack ``nt`` columns from ``first`` of a [K, N] operand to ``out[base:]`` ([K/kv, nt, kv])."""
    lanes, kv, depth = min(16, nt), dot.kv, source.rows
    whole, tail = divmod(depth, kv)
    zero = const(0, vector_type(dot.weight, lanes))

    def group(g: Any, valid: int) -> None:
        for j in range(0, nt, lanes):
            rows = [
                w.bind("row", _widen(source.load(g * kv + i, first + j, lanes), dot.weight,
                                     lanes)) if i < valid else zero
                for i in range(kv)
            ]
            w.store(out, _interleave(w, dot, rows, lanes), base + (g * nt + j) * kv,
                    lanes=lanes * kv)

    def fast() -> None:
        with w.loop("g", whole) as g:
            group(g, kv)
        if tail:
            group(whole, tail)

    def element(k: Any, j: Any) -> Any:
        return source.load(k, tirx.min(first + j, tirx.const(columns - 1, "int32")))

    def slow() -> None:
        _pack_slowly(w, element, dot, (0, whole + (tail > 0)), depth, nt, out, base)

    if columns < nt:
        slow()
    else:
        fast()


def _transpose_words(w: Writer, rows: list[Any]) -> list[Any]:
    """Transpose 8 vectors of 8 words with three rounds of two-operand shuffles."""
    def mix(a: Any, b: Any, order: list[int]) -> Any:
        return w.bind("mix", tirx.Shuffle([a, b], [tirx.const(p, "int32") for p in order]))

    low32, high32 = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    low64, high64 = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    low128, high128 = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    pairs = []
    for i in range(0, 8, 2):
        pairs += [mix(rows[i], rows[i + 1], low32), mix(rows[i], rows[i + 1], high32)]
    quads = []
    for i in (0, 4):
        a, b, c, d = pairs[i : i + 4]
        quads += [mix(a, c, low64), mix(a, c, high64), mix(b, d, low64), mix(b, d, high64)]
    return [mix(quads[i], quads[i + 4], low128) for i in range(4)] + [
        mix(quads[i], quads[i + 4], high128) for i in range(4)]


def _zip_words(w: Writer, rows: list[Any]) -> list[Any]:
    """Transpose 8 vectors of 8 words with three rounds of zip1 and zip2."""
    for _ in range(3):
        rows = [w.bind("zip", _zip(rows[i], rows[i + 4], WORDS, part))
                for i in range(4) for part in (0, 1)]
    return rows


def pack_rows(w: Writer, source: Operand, dot: Dot, nt: int, first: Any, columns: int,
              out: Any, base: Any) -> None:
    """Do what :func:`pack_columns` does for an [N, K] operand."""
    kv, depth = dot.kv, source.depth
    bits = kv * int(dot.weight.removeprefix("int"))
    if bits == 64:
        _pack_long_words(w, source, dot, nt, first, columns, out, base)
        return
    codes = WORDS * kv
    vector = vector_type(f"int{bits}", WORDS)
    transpose = _zip_words if dot.span > 1 else _transpose_words
    whole = depth // codes
    last = tirx.const(columns - 1, "int32")

    def row_of(j: Any) -> Any:
        row = first + j
        return row if columns >= nt else tirx.min(row, last)

    if whole:
        with w.loop("j", nt // WORDS) as j, w.loop("g", whole) as g:
            rows = []
            for i in range(WORDS):
                value = source.load(row_of(j * WORDS + i), g * codes, codes)
                value = _widen(value, dot.weight, codes)
                rows.append(w.bind("words", tirx.reinterpret(vector, value)))
            for i, words in enumerate(transpose(w, rows)):
                at = base + ((g * WORDS + i) * nt + j * WORDS) * kv
                value = tirx.reinterpret(vector_type(dot.weight, codes), words)
                w.store(out, value, at, lanes=codes)
    _pack_slowly(w, lambda k, j: source.load(row_of(j), k), dot,
                 (whole * WORDS, -(-depth // kv)), depth, nt, out, base)


def _pack_long_words(w: Writer, source: Operand, dot: Dot, nt: int, first: Any, columns: int,
                     out: Any, base: Any) -> None:
    """Do what :func:`pack_rows` does for groups of 64 bits."""
    kv, depth = dot.kv, source.depth
    whole, last = depth // kv, tirx.const(columns - 1, "int32")
    with w.loop("j", nt) as j:
        row = w.bind("from", tirx.min(first + j, last))
        with w.loop("g", whole) as g:
            w.store(out, source.load(row, g * kv, kv), base + (g * nt + j) * kv, lanes=kv)
    _pack_slowly(w, lambda k, j: source.load(tirx.min(first + j, last), k), dot,
                 (whole, -(-depth // kv)), depth, nt, out, base)


def column_sums(w: Writer, dot: Dot, packed: Any, base: Any, groups: int, nt: int,
                scale: int, out: Any) -> None:
    """Store ``scale`` times the sums over K of a packed int8 block's columns, as int32."""
    lanes, kv = dot.lanes, dot.kv
    full = vector_type("int32", lanes)
    vectors = range(nt // lanes)
    for v in vectors:
        w.store(out, const(0, full), v * lanes, lanes=lanes)
    ones = dot.spread(const(sum(1 << 8 * i for i in range(kv)), dot.word))
    with w.loop("g", groups) as g:
        for v in vectors:
            codes = load(packed, base + (g * nt + v * lanes) * kv, lanes=lanes * kv)
            total = dot.step(load(out, v * lanes, lanes=lanes), [ones], [codes])
            w.store(out, total, v * lanes, lanes=lanes)
    for v in vectors:
        total = load(out, v * lanes, lanes=lanes) * const(scale, full)
        w.store(out, total, v * lanes, lanes=lanes)
