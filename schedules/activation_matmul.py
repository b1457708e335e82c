"""Matmuls of two activations: attention's Q K^T and P V.

``out[b, m, n] = epilogue(sum_k a[b, m, k] * c[b, k, n])`` (``c[b, n, k]`` if transposed). Per batch
entry and column block the column operand is packed into a small local buffer, the row operand is
converted if it must be, and the register tiles of ``schedules.kernel`` run. Columns that are left
make a block of as few vectors as hold them, which ends at the last column: it repeats some columns
of the block before, but loads and stores whole vectors. The loop over batch entries (heads,
windows), and over the parts that a tile cuts their rows into, is parallel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvm import tirx

from .builder import Writer, const, load, vector_type
from .dot import Dot
from .gemm import GemmSpec, Tile, row_chunks, tail_tile
from .kernel import GemmKernel
from .operands import Operand, passes_of, product
from .repack import column_sums, pack_columns, pack_rows
from .strides import entry_offset, permuted_strides

__all__ = ["DOT", "activation_matmul"]

DOT = "vitq.dot"
"""Attribute of the kernel: its dot sequence."""


class _Matmul(GemmKernel):
    def __init__(self, params: Sequence[Any], spec: GemmSpec, dot: Dot, tile: Tile) -> None:
        super().__init__(Writer(), dot, tile, spec.epilogue)
        self.params = params
        self.spec = spec
        # The result is stored permuted: the strides of its own axes come by the inverse.
        stored = tuple(spec.out_axes.index(i) for i in range(len(spec.out_axes)))
        axes = spec.a_axes, spec.b_axes, stored
        self.strides = [
            permuted_strides([int(extent) for extent in buffer.shape], order)
            for buffer, order in zip([*params[:2], params[-1]], axes, strict=True)
        ]
        shape = [int(extent) for extent in params[0].shape]
        *self.batch, self.rows, self.depth = [shape[i] for i in spec.a_axes] or shape
        self.columns = int(params[-1].shape[-1])
        self.groups = -(-self.depth // dot.kv)
        self.a, self.b, *rest, self.c = (self.w.flat(buffer) for buffer in params)
        self.scalars = None if spec.epilogue.kind == "acc" else rest.pop()
        self.added = rest

    def build(self, attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        w = self.w
        chunks, self.chunk = row_chunks(self.rows, self.tile)
        with w.loop("batch", product(self.batch) * chunks, "parallel") as piece:
            self._lay_out_scale()
            entry = self._piece(piece, chunks)
            rows = self._part(self._operand(0, self.a, entry, self.rows, self.depth))
            self.out = self._part(self._operand(2, self.c, entry, self.rows, self.columns))
            if self.added:
                self.residual = self._part(self._residual(entry))
            self.passes = passes_of(w, rows, self.dot, self.groups * self.dot.kv, self._offset,
                                    "operand")
            size = self.groups * self.nt * self.dot.kv
            self.packed = w.alloc("packed", (size,), self.dot.weight)
            self.sums = w.alloc("sums", (self.nt,), "int32")
            blocks, rest = divmod(self.columns, self.nt)
            if blocks:
                with w.loop("block", blocks) as block:
                    self._block(entry, block * self.nt)
            if rest:
                self.tile = tail_tile(self.tile, self.dot, rest)
                self.nt = self.lanes * self.tile.vectors
                self._block(entry, max(self.columns - self.nt, 0))
        return w.prim_func(self.params, attrs)

    def _piece(self, piece: Any, chunks: int) -> Any:
        """Return a piece's batch entry; note the first of its rows."""
        self.first_row = None
        if chunks == 1:
            return piece
        last = tirx.const(self.rows - self.chunk, "int32")
        at = tirx.min(tirx.floormod(piece, chunks) * self.chunk, last)
        self.first_row = self.w.bind("chunk", at)
        return self.w.bind("entry", tirx.floordiv(piece, chunks))

    def _part(self, whole: Operand) -> Operand:
        """Return the piece's rows of a matrix."""
        if self.first_row is None:
            return whole
        base = self.w.bind("base", whole.base + self.first_row * whole.stride)
        return replace(whole, base=base, rows=self.chunk)

    def _lay_out_scale(self) -> None:
        """Spread multiplier, shift and zero point over vectors, once for each batch entry.

        The fast form is kept in memory for the reason that :func:`vector_rescale` gives.
        """
        if self.scalars is None:
            return
        w, lanes, epilogue = self.w, self.lanes, self.epilogue
        mult, shift, *zero = (w.bind("scalar", load(self.scalars, i))
                              for i in range(int(self.scalars.shape[0])))
        self.scale = [tirx.Broadcast(value, lanes) for value in (mult, shift)]
        self.zero = zero[0] if zero else None
        self.parts: dict[str, Any] = {}
        if not self.narrow:
            return
        folded = self.zero if self.folds_zero and self.zero is not None else 0
        parts = self.dot.arithmetic.vector_rescale(*self.scale, lanes, epilogue.lift, folded)
        for name, value in parts.items():
            dtype, _, count = str(value.ty.dtype).partition("x")
            self.parts[name] = w.alloc(name, (int(count),), dtype)
            w.store(self.parts[name], value, 0, lanes=int(count))

    def _operand(self, index: int, buffer: Any, entry: Any, rows: int, columns: int) -> Operand:
        """Return one batch entry's matrix of operand ``index`` (2: the result)."""
        *batch, stride, _ = self.strides[index]
        base = self.w.bind("base", entry_offset(entry, self.batch, batch))
        return Operand(buffer, base, stride, rows, columns)

    def _residual(self, entry: Any) -> Operand:
        """Return one batch entry's residual, which entries may share."""
        shape = [int(extent) for extent in self.params[2].shape]
        *strides, _, _ = permuted_strides(shape, ())
        batch = [stride if extent > 1 else 0
                 for stride, extent in zip(strides, shape, strict=False)]
        base = self.w.bind("base", entry_offset(entry, self.batch, batch))
        return Operand(self.added[0], base, self.columns, self.rows, self.columns)

    @property
    def whole(self) -> bool:
        """Whether no column block passes the last column: only one that is alone may."""
        return self.columns >= self.nt

    def _block(self, entry: Any, first: Any) -> None:
        """Multiply a block of columns; the last one may overlap the one before."""
        self.first = first
        self._pack(entry)
        self.all_rows(self.chunk)

    def _pack(self, entry: Any) -> None:
        """Bring one block of columns into register form."""
        args = (self.dot, self.nt, self.first, self.columns, self.packed, 0)
        if self.spec.transpose_b:
            source = self._operand(1, self.b, entry, self.columns, self.depth)
            pack_rows(self.w, source, *args)
        else:
            source = self._operand(1, self.b, entry, self.depth, self.columns)
            pack_columns(self.w, source, *args)
        if self._offset:
            dot = self.passes[-1].dot
            column_sums(self.w, dot, self.packed, 0, self.groups, self.nt, -self._offset, self.sums)

    @property
    def _offset(self) -> int:
        return self.dot.offset(str(self.a.dtype))

    def column_vector(self, k: Any, v: int) -> Any:
        """Load the packed block."""
        width = self.lanes * self.dot.kv
        return load(self.packed, k * (self.nt * self.dot.kv) + v * width, lanes=width)

    def start_value(self, v: int) -> Any:
        """Start from 0, or from what takes the offset of the row codes back."""
        if self._offset:
            return load(self.sums, v * self.lanes, lanes=self.lanes)
        return const(0, vector_type("int32", self.lanes))

    def rescale(self, v: int) -> Any:
        """Return the one rescale."""
        parts = {name: load(buffer, 0, lanes=int(buffer.shape[0]))
                 for name, buffer in self.parts.items()}
        return self.dot.arithmetic.Rescale(**parts, lift=self.epilogue.lift)

    def wide_scale(self, v: int) -> tuple[Any, Any]:
        """Return the one multiplier and shift."""
        mult, shift = self.scale
        return mult, shift

    def zero_vector(self, kind: str) -> Any:
        """Return the zero point's vector, None if it is 0."""
        if self.zero is None:
            return None
        return tirx.Cast(kind, tirx.Broadcast(self.zero, self.lanes))


def activation_matmul(
    params: Sequence[Any], spec: GemmSpec, dot: Dot, tile: Tile, attrs: Mapping[str, Any]
) -> tirx.PrimFunc:
    """Build the kernel of an activation matmul.

    Parameters
    ----------
    params
        The PrimFunc's buffers: a [..., M, K], b [..., K, N] or [..., N, K], [residual [..., M, N],
        leading axes of 1 being shared], [multiplier, shift and, unless it is 0, zero point], out
        [..., M, N]; a, b and out with axes permuted as ``spec`` says.
    spec, dot, tile
        What to compute, with which sequence, and how it is cut.
    attrs
        Attributes of the new PrimFunc.
    """
    return _Matmul(params, spec, dot, tile).build({**attrs, DOT: dot.name})
