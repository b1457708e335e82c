"""One weight matmul of a kernel: its operands and what becomes of its sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from schedules.gemm import GemmSpec
from schedules.operands import Operand, product

from .epilogue import Result
from .tail import Tail
from .writer import CudaWriter

__all__ = ["Member"]


@dataclass(frozen=True)
class Member:
    """One weight matmul: its PrimFunc's parameters, what it computes, what follows it."""

    params: Sequence[Any]
    spec: GemmSpec
    tail: Tail | None = None
    out: Any = None

    @property
    def x(self) -> Any:
        """Activations."""
        return self.params[0]

    @property
    def weights(self) -> Any:
        """Packed weights."""
        return self.params[1]

    @property
    def table(self) -> Any:
        """Table of rows of x, None if there is none."""
        return self.params[-2] if self.spec.gather in ("x", "both") else None

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return int(self.params[-1].shape[-1])

    @property
    def last(self) -> Any:
        """What is written: the result, or that of the tail."""
        return self.params[-1] if self.out is None else self.out

    @property
    def rows(self) -> int:
        """Rows of the result."""
        return product(self.params[-1].shape[:-1])

    @property
    def unit(self) -> int:
        """Bytes of a row, or of a piece of it, that can be copied at once: 16 at most."""
        width = int(self.x.shape[-1])
        return math.gcd(width * int(np.dtype(str(self.x.dtype)).itemsize), 16)

    def source(self, w: CudaWriter) -> Operand:
        """Return the rows that are multiplied."""
        width = int(self.x.shape[-1])
        pieces = 1 if self.table is None else product(self.table.shape[1:])
        table = None if self.table is None else w.flat(self.table)
        return Operand(w.flat(self.x), 0, width, self.rows, width * pieces, table, pieces)

    def result(self, w: CudaWriter) -> Result:
        """Return how results are made of sums."""
        bias, *rest = self.params[2:-1]
        tail = self.tail and replace(
            self.tail, buffers={key: w.flat(buffer) for key, buffer in self.tail.buffers.items()})
        kind = self.spec.epilogue.kind
        mult, shift = rest[:2] if kind != "acc" else (None, None)
        residual = w.flat(rest[2]) if kind == "requant_add" else None
        table = w.flat(self.params[-2]) if self.spec.gather in ("residual", "both") else None
        return Result(
            self.spec.epilogue, self.rows, self.columns, bias, mult, shift,
            w.flat(self.last), residual, table, tail)
