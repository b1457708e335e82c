"""Sums and maxima of a row, a vector of columns at a time.

A reduction is opened before the loop over columns, takes one ``step`` a vector and gives its
``result`` after. A row that ends inside a vector ends with one that overlaps the vector before it:
``fresh`` says how many of its last elements are new. Two kinds of sums have forms of their own:

* int32 sums of 8- and 16-bit values: ``vpmaddwd`` by 1 adds neighbours and widens at once;
* int64 sums of their squares: ``vpmaddwd`` gives sums of two squares below 2^32, whose halves are
  added up apart in 32-bit lanes (rows of up to 65536 elements).
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx

from .builder import Writer, const, load, vector_of, vector_type
from .lanes import Lanes, limits
from .words import Words

__all__ = ["reduction"]

_WORDS = ("int8", "uint8", "int16")
_LONGEST = 2**16


def _fold(writer: Writer, value: Any, lanes: int, join: Any) -> Any:
    """Join the lanes of a vector, halves onto each other."""
    while lanes > 1:
        lanes //= 2
        value = writer.bind("whole", value)
        low, high = (tirx.Shuffle([value], [tirx.const(i + at, "int32") for i in range(lanes)])
                     for at in (0, lanes))
        value = join(low, high)
    return value


class _Plain:
    """Accumulates in lanes of the result's dtype."""

    def __init__(self, writer: Writer, kind: str, value: Any, dtype: str, words: Words) -> None:
        self.w, self.value, self.dtype, self.words = writer, value, dtype, words
        self.add = kind == "Add"
        self.acc = self._zeros(dtype, words.width, 0 if self.add else limits(dtype)[0])

    def _zeros(self, dtype: str, lanes: int, value: int = 0) -> Any:
        acc = self.w.alloc("acc", (lanes,), dtype)
        self.w.store(acc, const(value, vector_type(dtype, lanes)), 0, lanes=lanes)
        return acc

    def _mask(self, fresh: int, on: int, dtype: str) -> Any:
        width = self.words.width
        if fresh == width:
            return const(on, vector_type(dtype, width))
        return vector_of([on if i >= width - fresh else 0 for i in range(width)], dtype)

    def _accumulate(self, acc: Any, value: Any, lanes: int) -> None:
        self.w.store(acc, self._join(load(acc, 0, lanes=lanes), value), 0, lanes=lanes)

    def _join(self, a: Any, b: Any) -> Any:
        return a + b if self.add else tirx.max(a, b)

    def step(self, lanes: Lanes, fresh: int) -> None:
        """Take one vector of columns."""
        width = self.words.width
        code = lanes.to(lanes.translate(self.value), self.dtype, True).code
        if fresh < width and self.add:
            code = tirx.bitwise_and(code, self._mask(fresh, -1, self.dtype))
        self._accumulate(self.acc, code, width)

    def result(self) -> Any:
        """Return the scalar."""
        width = self.words.width
        return _fold(self.w, load(self.acc, 0, lanes=width), width, self._join)


class _PairSum(_Plain):
    """int32 sum of 16-bit values."""

    def __init__(self, writer: Writer, value: Any, words: Words) -> None:
        self.w, self.value, self.words, self.add = writer, value, words, True
        self.half = words.width // 2
        self.acc = self._zeros("int32", self.half)

    def step(self, lanes: Lanes, fresh: int) -> None:
        """Take one vector of columns."""
        code = lanes.to(lanes.translate(self.value), "int16", True).code
        pairs = self.words.pair_sums(code, self._mask(fresh, 1, "int16"))
        self._accumulate(self.acc, pairs, self.half)

    def result(self) -> Any:
        """Return the scalar."""
        return _fold(self.w, load(self.acc, 0, lanes=self.half), self.half, self._join)


class _Squares(_PairSum):
    """int64 sum of the squares of 16-bit values."""

    def __init__(self, writer: Writer, value: Any, words: Words) -> None:
        super().__init__(writer, value, words)
        self.high = self._zeros("int32", self.half)

    def step(self, lanes: Lanes, fresh: int) -> None:
        """Take one vector of columns."""
        code = lanes.to(lanes.translate(self.value), "int16", True).code
        kept = code if fresh == self.words.width else tirx.bitwise_and(
            code, self._mask(fresh, -1, "int16"))
        signed, unsigned = (vector_type(dtype, self.half) for dtype in ("int32", "uint32"))
        pairs = self.w.bind("pairs", self.words.pair_sums(kept, code))
        high = tirx.shift_right(tirx.Cast(unsigned, pairs), const(16, unsigned))
        self._accumulate(self.acc, tirx.bitwise_and(pairs, const(0xFFFF, signed)), self.half)
        self._accumulate(self.high, tirx.Cast(signed, high), self.half)

    def result(self) -> Any:
        """Return the scalar."""
        low, high = (
            tirx.Cast("int64", _fold(self.w, load(acc, 0, lanes=self.half), self.half, self._join))
            for acc in (self.acc, self.high))
        return tirx.shift_left(high, tirx.const(16, "int64")) + low


def _widened(value: Any, dtype: str) -> Any | None:
    """Return the 8- or 16-bit expression that ``value`` casts to ``dtype``, if it does."""
    if type(value).__name__ != "Cast" or str(value.ty.dtype) != dtype:
        return None
    return value.value if str(value.value.ty.dtype) in _WORDS else None


def _squared(value: Any) -> Any | None:
    """Return x of ``int64(int32(x) * int32(x))``."""
    if type(value).__name__ != "Cast" or type(value.value).__name__ != "Mul":
        return None
    a, b = (_widened(part, "int32") for part in (value.value.a, value.value.b))
    return a if a is not None and b is not None and tvm_ffi.structural_equal(a, b) else None


def reduction(writer: Writer, kind: str, value: Any, dtype: str, words: Words,
              length: int) -> _Plain:
    """Open a reduction.

    Parameters
    ----------
    writer
        Where code goes.
    kind
        "Add" or "Max".
    value, dtype
        TE expression of an element, dtype of the result.
    words
        Word operations, which know the width of a vector.
    length
        Elements of a row.
    """
    if kind == "Add" and words.pairs_name:
        word = _widened(value, "int32") if dtype == "int32" else None
        if word is not None:
            return _PairSum(writer, word, words)
        root = _squared(value) if dtype == "int64" and length <= _LONGEST else None
        if root is not None:
            return _Squares(writer, root, words)
    return _Plain(writer, kind, value, dtype, words)
