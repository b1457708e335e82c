"""What a weight matmul does to its sums: requantisation, residual, an elementwise tail, the store.

A thread has, of each row, eight neighbouring columns (see :mod:`.intrinsics`), so everything moves
in vectors: the columns' parameters from shared memory, residual and result from and to device
memory.

The fast form of requantisation: for ``e >= 33`` the rounding constant ``2^(e-1)`` has no bit in
the low word, so it is added to the high word of the product, which is then shifted by ``e - 32``.
That word is below 2^30 in magnitude and the constant at most 2^29 (with a zero point in it, 2^30),
so nothing overflows. A residual whose multiplier is a power of two needs no product. Codes are
packed by an instruction that limits them to their dtype, so only narrower clamps are written.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tvm import tirx

from schedules.builder import const, load
from schedules.gemm import Epilogue
from schedules.kernel import BITS
from schedules.requant import scalar_lift

from .tail import Tail
from .writer import CudaWriter, pointer

__all__ = ["WIDTH", "Finish", "Result"]

WIDTH = 8
"""Neighbouring columns of a thread."""
PACKS = {"int8": "vitq_pack_s8", "uint8": "vitq_pack_u8", "int16": "vitq_pack_s16"}


@dataclass(frozen=True)
class Result:
    """One member's results: what they are made with, where they go.

    Parameters
    ----------
    epilogue
        What follows the sums.
    rows, columns
        M and N.
    bias, mult, shift
        int32 buffers, padded to groups of 32 columns; the latter None for sums as they are.
    out
        Flat buffer of the result.
    residual, table
        Flat buffers: what is added, and of which rows (None: the same ones).
    tail
        Elementwise expression of the codes, if there is one.
    """

    epilogue: Epilogue
    rows: int
    columns: int
    bias: Any
    mult: Any
    shift: Any
    out: Any
    residual: Any = None
    table: Any = None
    tail: Tail | None = None

    @property
    def parameters(self) -> list[Any]:
        """The columns' parameters."""
        return [p for p in (self.bias, self.mult, self.shift) if p is not None]


@dataclass
class Finish:
    """Writes the epilogue of one group of 32 columns.

    Parameters
    ----------
    w, result
        The writer; what to make.
    exact_rows, exact_columns
        Whether no row, no column of any block is past the end.
    width
        Columns of a thread, 8 or 1.
    """

    w: CudaWriter
    result: Result
    exact_rows: bool
    exact_columns: bool
    width: int = WIDTH
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take a tail of its own: what that loads once, it loads in the scope that is open now."""
        if self.result.tail is not None:
            self.result = replace(self.result, tail=replace(self.result.tail))

    @property
    def vectors(self) -> bool:
        """Whether eight neighbouring columns are whole and aligned."""
        return self.width == WIDTH and self.result.columns % WIDTH == 0

    @property
    def narrow(self) -> bool:
        """Whether accumulator and residual both fit the fast form."""
        residual, epilogue = self.result.residual, self.result.epilogue
        return epilogue.narrow and (residual is None or scalar_lift(
            epilogue.res_shift - 1, BITS[str(residual.dtype)]) is not None)

    def begin(self, column: Any) -> None:
        """Prepare for eight columns from ``column``."""
        self.column = column
        if self.result.tail is not None:
            self.result.tail.columns(self.w, self._columns())

    def parameters(self, sources: list[tuple[Any, Any]]) -> None:
        """Load the columns' parameters: bias, multipliers, shifts from buffers at places."""
        w = self.w
        names = ("bias", "mult", "shift")[: len(self.result.parameters)]
        for name, (buffer, place) in zip(names, sources, strict=False):
            self.parts[name] = w.registers(name, self.width)
            for first in range(0, self.width, 4):
                if self.width < 4:
                    w.store(self.parts[name], load(buffer, place), 0)
                else:
                    w.call("vitq_load16", pointer(self.parts[name], first),
                           pointer(buffer, place + first))
        epilogue = self.result.epilogue
        if epilogue.kind == "acc" or not self.narrow:
            return
        # The high word of 2^(e-1), plus the zero point times 2^e.
        rounding = w.registers("rounding", self.width)
        scale = const(2 * epilogue.zero_point + 1 if epilogue.fold_zero else 1, "int32")
        for i in range(self.width):
            bits = load(self.parts["shift"], i) + const(epilogue.lift - 33, "int32")
            bits = w.bind("bits", bits)
            w.store(rounding, tirx.shift_left(scale, bits), i)
            w.store(self.parts["shift"], bits + const(1, "int32"), i)
        self.parts["rounding"] = rounding

    def _columns(self) -> list[Any]:
        """Return the columns, those past the end being the last one."""
        last = const(self.result.columns - 1, "int32")
        columns = [self.column + i for i in range(self.width)]
        if self.exact_columns:
            return columns
        return [tirx.min(column, last) for column in columns]

    # Residual

    def fetch(self, rows: list[Any]) -> Any:
        """Load the residual of some rows; returns registers for :meth:`row`."""
        w, result = self.w, self.result
        if result.residual is None:
            return None
        size = int(np.dtype(str(result.residual.dtype)).itemsize)
        last = const(result.rows - 1, "int32")
        dtype = "int32" if self.vectors else str(result.residual.dtype)
        words = self.width * size // 4 if self.vectors else self.width
        held = w.registers("residual", words * len(rows), dtype)
        columns = self._columns()
        for i, row in enumerate(rows):
            row = row if self.exact_rows else tirx.min(row, last)
            if result.table is not None:
                row = load(result.table, row)
            base = w.bind("base", row * result.columns)
            if not self.vectors:
                for j, column in enumerate(columns):
                    w.store(held, load(result.residual, base + column), i * self.width + j)
                continue
            begin = self.column
            if not self.exact_columns:
                begin = tirx.min(begin, const(result.columns - self.width, "int32"))
            step = min(16, self.width * size)
            for part in range(self.width * size // step):
                w.call(f"vitq_load{step}", pointer(held, i * words + part * 4),
                       pointer(result.residual, base + begin + part * step // size))
        return held

    def _residual(self, held: Any, index: int, i: int) -> Any:
        """Return code ``i`` of row ``index`` of what :meth:`fetch` loaded, as int32."""
        dtype = str(self.result.residual.dtype)
        if not self.vectors:
            code = load(held, index * self.width + i)
            return code if dtype == "int32" else tirx.Cast("int32", code)
        size = int(np.dtype(dtype).itemsize)
        per = 4 // size
        word = load(held, (index * self.width + i) // per)
        if size == 4:
            return word
        up, down = const((per - 1 - i % per) * 8 * size, "int32"), 32 - 8 * size
        if dtype.startswith("u"):
            word = tirx.Cast("uint32", word)
            shifted = tirx.shift_left(word, tirx.Cast("uint32", up))
            return tirx.Cast("int32", tirx.shift_right(shifted, const(down, "uint32")))
        return tirx.shift_right(tirx.shift_left(word, up), const(down, "int32"))

    def _rescaled(self, code: Any, dtype: str) -> Any:
        """Return the residual's code on the result's scale, in int32 or int64."""
        mult, shift = self.result.epilogue.res_mult, self.result.epilogue.res_shift
        power = mult.bit_length() - 1
        down = shift - power
        bits = BITS[str(self.result.residual.dtype)]
        if dtype == "int32" and mult > 0 and mult == 1 << power and bits < 30 > bits - down:
            # (x * 2^p + 2^(e-1)) >> e
            if down <= 0:
                return tirx.shift_left(code, const(-down, "int32")) if down else code
            if down < 31:
                half = const(1 << (down - 1), "int32")
                return tirx.shift_right(code + half, const(down, "int32"))
        factor, rounding = const(mult, "int64"), const(1 << (shift - 1), "int64")
        if dtype == "int64":
            total = tirx.Cast("int64", code) * factor + rounding
            return tirx.shift_right(total, const(shift, "int64"))
        lift = scalar_lift(shift - 1, bits)
        assert lift is not None
        code = tirx.shift_left(code, const(lift, "int32")) if lift else code
        high = self.w.value("vitq_high", code, const(mult, "int32"))
        total = high + const(1 << (shift + lift - 33), "int32")
        return tirx.shift_right(total, const(shift + lift - 32, "int32"))

    # One row

    def row(self, row: Any, sums: list[Any], held: Any, index: int) -> None:
        """Finish eight sums of a row, and store them if it and its columns are there.

        What is not there is computed all the same: a branch for each row would keep the parameters
        of all columns in registers until the last row.
        """
        w, result = self.w, self.result
        codes = [w.bind("code", self.code(value, held, index, i)) for i, value in enumerate(sums)]
        if result.tail is not None:
            packed = self.vectors and str(result.out.dtype) in PACKS
            there = row if self.exact_rows else tirx.min(row, const(result.rows - 1, "int32"))
            codes = result.tail.codes(w, there, codes, packed)
        at = w.bind("at", row * result.columns + self.column)
        inside = [] if self.exact_rows else [row < const(result.rows, "int32")]
        if self.vectors and str(result.out.dtype) in (*PACKS, "int32"):
            self._store(codes, at, inside)
            return
        for i, code in enumerate(codes):
            here = [] if self.exact_columns else [
                self.column + i < const(result.columns, "int32")]
            with self._when([*inside, *here]):
                w.store(result.out, _cast(code, str(result.out.dtype)), at + i)

    def _when(self, conditions: list[Any]) -> Any:
        if not conditions:
            return nullcontext()
        return self.w.when(conditions[0] if len(conditions) == 1 else tirx.all(*conditions))

    def _store(self, codes: list[Any], at: Any, inside: list[Any]) -> None:
        """Store eight codes as one or two vectors."""
        w, dtype = self.w, str(self.result.out.dtype)
        size = int(np.dtype(dtype).itemsize)
        per, words = 4 // size, self.width * size // 4
        packed = w.registers("packed", words)
        for word in range(words):
            parts = codes[word * per : (word + 1) * per]
            w.store(packed, parts[0] if per == 1 else w.value(PACKS[dtype], *parts), word)
        if not self.exact_columns:
            inside = [*inside, self.column < const(self.result.columns, "int32")]
        step = min(16, self.width * size)
        with self._when(inside):
            for part in range(self.width * size // step):
                w.call(f"vitq_store{step}", pointer(self.result.out, at + part * step // size),
                       pointer(packed, part * 4))

    def code(self, value: Any, held: Any, index: int, i: int) -> Any:
        """Return the code of column ``i`` as int32, within its dtype where it is packed."""
        epilogue, parts = self.result.epilogue, self.parts
        value = value + load(parts["bias"], i)
        if epilogue.kind == "acc":
            return value
        kind = "int32" if self.narrow else "int64"
        if self.narrow:
            if epilogue.lift:
                value = tirx.shift_left(value, const(epilogue.lift, "int32"))
            high = self.w.value("vitq_high", value, load(parts["mult"], i))
            total = tirx.shift_right(high + load(parts["rounding"], i), load(parts["shift"], i))
        else:
            bits = tirx.Cast("int64", load(parts["shift"], i))
            one = const(1, "int64")
            wide = tirx.Cast("int64", value) * tirx.Cast("int64", load(parts["mult"], i))
            total = tirx.shift_right(wide + tirx.shift_left(one, bits - one), bits)
        if held is not None:
            total = total + self._rescaled(self._residual(held, index, i), kind)
        if epilogue.zero_point and not (self.narrow and epilogue.fold_zero):
            total = total + const(epilogue.zero_point, kind)
        return _cast(self._clamped(total, kind), "int32")

    def _clamped(self, total: Any, kind: str) -> Any:
        """Return ``total`` clamped, as far as the packing does not do it."""
        epilogue, dtype = self.result.epilogue, self.result.epilogue.out_dtype
        info = np.iinfo(dtype)
        done = (kind == "int32" and self.result.tail is None and self.vectors and dtype in PACKS)
        # A clamp to all of the word's own type limits nothing (nor has C++ such a literal).
        done = done or dtype == kind
        if not (done and epilogue.qmax == info.max):
            total = tirx.min(total, const(epilogue.qmax, kind))
        if not (done and epilogue.qmin == info.min):
            total = tirx.max(total, const(epilogue.qmin, kind))
        return total


def _cast(value: Any, dtype: str) -> Any:
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)
