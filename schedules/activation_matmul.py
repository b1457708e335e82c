"""Matmuls of two activations: attention's Q K^T and P V.

``out[b, m, n] = epilogue(sum_k a[b, m, k] * c[b, k, n])`` (``c[b, n, k]`` if transposed). Per batch
entry and column block the column operand is packed into a small local buffer, the row operand is
converted if it must be, and the register tiles of ``schedules.kernel`` run. The loop over batch
entries (heads, windows) is parallel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvm import tirx

from .builder import Writer, const, load, vector_type
from .dot import Dot
from .gemm import GemmSpec, Tile
from .kernel import BITS, GemmKernel
from .operands import Operand, passes_of, product
from .repack import column_sums, pack_columns, pack_rows
from .strides import entry_offset, permuted_strides

__all__ = ["DOT", "activation_matmul"]

DOT = "vitq.dot"
"""Attribute of the kernel: its dot sequence."""


def narrow_scalar(spec: GemmSpec, depth: int, dtypes: Sequence[str]) -> GemmSpec:
    """Set ``narrow``, ``lift`` and ``fold_zero`` from the operands' dtypes."""
    epilogue = spec.epilogue
    if epilogue.kind == "acc":
        return spec
    bound = depth
    for dtype in dtypes:
        bound <<= BITS[dtype] - 1
    lift = max(0, 32 - epilogue.shift)
    total = epilogue.shift + lift
    narrow = bound << lift < 2**31 and total <= 62 and abs(epilogue.zero_point) < 2**29
    fold = narrow and (2 * abs(epilogue.zero_point) + 1) << (total - 1) < 2**62
    return replace(spec, epilogue=replace(
        epilogue, narrow=narrow, lift=lift if narrow else 0, fold_zero=fold))


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
        self.blocks = -(-self.columns // self.nt)
        self.groups = -(-self.depth // dot.kv)
        self.block_size = self.groups * self.nt * dot.kv
        self.a, self.b, *self.added, self.c = (self.w.flat(buffer) for buffer in params)

    def build(self, attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        w = self.w
        with w.loop("batch", product(self.batch), "parallel") as entry:
            rows = self._operand(0, self.a, entry, self.rows, self.depth)
            self.out = self._operand(2, self.c, entry, self.rows, self.columns)
            if self.added:
                self.residual = self._residual(entry)
            self.passes = passes_of(w, rows, self.dot, self.groups * self.dot.kv, self._offset,
                                    "operand")
            self.packed = w.alloc("packed", (self.block_size,), self.dot.weight)
            self.sums = w.alloc("sums", (self.nt,), "int32")
            with w.loop("block", self.blocks) as block:
                self.first = block * self.nt
                self._pack(entry, block)
                self.all_rows(self.rows)
        return w.prim_func(self.params, attrs)

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

    def _pack(self, entry: Any, block: Any) -> None:
        """Bring one block of columns into register form."""
        args = (self.dot, self.nt, block, self.columns, self.packed, 0)
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
        epilogue = self.epilogue
        return self.dot.arithmetic.scalar_rescale(
            epilogue.mult, epilogue.shift, self.lanes, epilogue.lift,
            epilogue.zero_point if self.folds_zero else 0)

    def wide_scale(self, v: int) -> tuple[Any, Any]:
        """Return the one multiplier and shift."""
        full = vector_type("int32", self.lanes)
        return const(self.epilogue.mult, full), const(self.epilogue.shift, full)


def activation_matmul(
    params: Sequence[Any], spec: GemmSpec, dot: Dot, tile: Tile, attrs: Mapping[str, Any]
) -> tirx.PrimFunc:
    """Build the kernel of an activation matmul.

    Parameters
    ----------
    params
        The PrimFunc's buffers: a [..., M, K], b [..., K, N] or [..., N, K], [residual [..., M, N],
        leading axes of 1 being shared], out [..., M, N]; all but the residual with axes permuted as
        ``spec`` says.
    spec, dot, tile
        What to compute, with which sequence, and how it is cut.
    attrs
        Attributes of the new PrimFunc.
    """
    a, b, *_ = params
    spec = narrow_scalar(spec, int(a.shape[-1]), [str(a.dtype), str(b.dtype)])
    return _Matmul(params, spec, dot, tile).build({**attrs, DOT: dot.name})
