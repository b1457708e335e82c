"""The packed weight matmul of x86.

``out[i, n] = epilogue(sum_k x[i, k] * w[k, n] + bias[n])`` with weights packed as
``[N/nt, K/kv, nt, kv]`` int8. Loop order: column blocks (parallel), row tiles, K. One block's
weights stay in the first-level cache while all rows pass; activations stream from the second level.

Activations that are not yet what the dot sequence loads (int8 for a 16-bit one, say) are converted
once, in a first stage: it touches M*K elements where the matmul takes M*K*N/32 cycles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import tirx

from ..builder import Writer, const, load, vector_type
from ..gemm import GemmSpec, Tile
from ..requant import Rescale, vector_rescale
from .core import GemmKernel, Operand, convert_rows, product
from .intrinsics import DOTS

__all__ = ["packed_linear"]


class _Linear(GemmKernel):
    """The steps are methods, in the order in which they run."""

    def __init__(self, params: Sequence[Any], spec: GemmSpec, tile: Tile) -> None:
        super().__init__(Writer(), DOTS[spec.dot], tile, spec.epilogue)
        self.params = params
        x, weights, self.bias, *rest = params[:-1]
        w, depth, rows = self.w, int(x.shape[-1]), product(x.shape[:-1])
        self.columns = int(params[-1].shape[-1])
        self.out = Operand(w.flat(params[-1]), 0, self.columns, rows, self.columns)
        if spec.epilogue.kind != "acc":
            self.mult, self.shift, *rest = rest
        if spec.epilogue.kind == "requant_add":
            self.residual = Operand(w.flat(rest[0]), 0, self.columns, rows, self.columns)
        self.blocks, self.steps = int(weights.shape[0]), int(weights.shape[1])
        self.width = self.lanes * self.dot.kv
        self.packed = w.alias(
            weights, (self.blocks, self.steps, tile.vectors * self.width), "packed"
        )
        self.rows_of = Operand(w.flat(x), 0, depth, rows, depth)

    def build(self, attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        w, rows = self.w, self.rows_of.rows
        if self.rows_of.dtype != self.dot.operand:
            padded = self.steps * self.dot.kv
            self.rows_of = convert_rows(
                w, self.rows_of, self.dot, padded, "operand", "parallel"
            )
        with w.loop("block", self.blocks, "parallel") as block:
            self.block = block
            self.first = block * self.nt
            self._expand_weights()
            self._lay_out_scales()
            self.all_rows(rows)
        return w.prim_func(self.params, attrs)

    def _expand_weights(self) -> None:
        """Sign-extend the block's weights into a local panel, if the tile says so."""
        self.panel = None
        if not self.tile.expand or self.dot.weight == "int8":
            return
        w, width = self.w, self.tile.vectors * self.width
        panel = w.alloc("panel", (self.steps, width), "int16")
        with w.loop("k", self.steps) as k:
            value = load(self.packed, self.block, k, 0, lanes=width)
            w.store(panel, tirx.Cast(vector_type("int16", width), value), k, 0, lanes=width)
        self.panel = panel

    def _lay_out_scales(self) -> None:
        """Lay the block's multipliers and shifts out for the fast requantisation."""
        epilogue, lanes, vectors = self.epilogue, self.lanes, self.tile.vectors
        self.scales: dict[str, Any] = {}
        if epilogue.kind == "acc" or not self.narrow:
            return
        w = self.w
        zero_point = epilogue.zero_point if epilogue.fold_zero else 0
        lift = const(epilogue.lift, vector_type("int32", lanes))
        for v in range(vectors):
            mult, shift = (w.bind("scale", value) for value in self.wide_scale(v))
            for name, value in vector_rescale(mult, shift + lift, lanes, zero_point).items():
                count = self._lanes_of(name)
                if name not in self.scales:
                    dtype = "int32" if count == lanes else "int64"
                    self.scales[name] = w.alloc(name, (vectors * count,), dtype)
                w.store(self.scales[name], value, v * count, lanes=count)

    def _lanes_of(self, name: str) -> int:
        return self.lanes // 2 if name.startswith("round") else self.lanes

    def column_vector(self, k: Any, v: int) -> Any:
        """Load packed weights, sign-extended if the dot wants 16 bits."""
        if self.panel is not None:
            return load(self.panel, k, v * self.width, lanes=self.width)
        value = load(self.packed, self.block, k, v * self.width, lanes=self.width)
        if self.dot.weight == "int16":
            value = tirx.Cast(vector_type("int16", self.width), value)
        return value

    def start_value(self, v: int) -> Any:
        """Start from the bias."""
        return load(self.bias, self.first + v * self.lanes, lanes=self.lanes)

    def rescale(self, v: int) -> Rescale:
        """Load the parameters laid out for this block."""
        parts = {
            name: load(buffer, v * self._lanes_of(name), lanes=self._lanes_of(name))
            for name, buffer in self.scales.items()
        }
        return Rescale(**parts, lift=self.epilogue.lift)

    def wide_scale(self, v: int) -> tuple[Any, Any]:
        """Load multipliers and shifts."""
        at = self.first + v * self.lanes
        return load(self.mult, at, lanes=self.lanes), load(self.shift, at, lanes=self.lanes)


def packed_linear(
    params: Sequence[Any], spec: GemmSpec, tile: Tile, attrs: Mapping[str, Any]
) -> tirx.PrimFunc:
    """Build the kernel of a packed linear operator.

    Parameters
    ----------
    params
        The PrimFunc's buffers: x, weights, bias, [mult, shift], [residual], out; bias, mult and
        shift are padded to whole column blocks.
    spec, tile
        What to compute, and how it is cut. ``tile.vectors`` must be the packed layout's.
    attrs
        Attributes of the new PrimFunc.
    """
    return _Linear(params, spec, tile).build(attrs)
