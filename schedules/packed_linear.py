"""The packed weight matmul.

``out[i, n] = epilogue(sum_k (x[i, k] + offset) * w[k, n] + bias[n])`` with weights packed as
``[N/nt, K/kv, nt, kv]`` int8. Loop order: column blocks (parallel), row tiles, K. One block's
weights stay in the first-level cache while all rows pass; activations stream from the second level.
A tile may also cut the rows into parts, and go through the parts or the blocks first.

Activations that are not yet what the dot sequence loads (int8 for a 16-bit one, say) are converted
once, in a first stage: it touches M*K elements where the matmul takes M*K*N/32 cycles. Where the
sequence is exact for some column blocks only, the others take the fallback sequence from the same
packed weights, through a panel that is sign-extended once a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvm import tirx

from .builder import Writer, load, vector_type
from .dot import dot_named
from .gemm import GemmSpec, Tile, row_chunks
from .kernel import GemmKernel
from .operands import Operand, passes_of, product

__all__ = ["packed_linear"]


class _Linear(GemmKernel):
    """The steps are methods, in the order in which they run."""

    def __init__(self, params: Sequence[Any], spec: GemmSpec, tile: Tile) -> None:
        super().__init__(Writer(), dot_named(spec.dot), tile, spec.epilogue)
        self.params = params
        self.spec = spec
        x, weights, self.bias, *rest = params[:-1]
        w, rows = self.w, product(params[-1].shape[:-1])
        table = rest.pop() if spec.gather else None
        places = None if table is None else w.flat(table)
        of_x = None if spec.gather == "residual" else places
        pieces = 1 if table is None or of_x is None else product(table.shape[1:])
        width = int(x.shape[-1])
        self.columns = int(params[-1].shape[-1])
        self.out = Operand(w.flat(params[-1]), 0, self.columns, rows, self.columns)
        if spec.epilogue.kind != "acc":
            self.mult, self.shift, *rest = rest
        if spec.epilogue.kind == "requant_add":
            self.residual = Operand(w.flat(rest[0]), 0, self.columns, rows, self.columns,
                                    None if spec.gather == "x" else places)
        self.blocks, self.steps, _, self.packed_kv = (int(s) for s in weights.shape)
        self.packed = w.alias(
            weights, (self.blocks, self.steps, self.nt * self.packed_kv), "packed"
        )
        self.x = Operand(w.flat(x), 0, width, rows, width * pieces, of_x, pieces)

    def build(self, attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        w, modes = self.w, self._modes()
        padded = self.steps * self.packed_kv
        passes = {
            dot: passes_of(w, self.x, dot_named(dot), padded, self.spec.offset, f"rows_{dot}",
                           "parallel")
            for dot in dict.fromkeys(dot for dot, _ in modes)
        }
        tile = self.tile if self.dot.rows == 1 else replace(self.tile, chunks=1)
        chunks, self.chunk = row_chunks(self.x.rows, tile)
        with w.loop("block", self.blocks * chunks, "parallel") as piece:
            block = self._piece(piece, chunks)
            self.block = block
            self.first = block * self.nt
            self._lay_out_scales()
            for (dot, chain), members in modes.items():
                self.dot, self.chain, self.passes = dot_named(dot), chain, passes[dot]
                if len(modes) == 1:
                    self._block()
                    continue
                with w.when(_one_of(block, members)):
                    self._block()
        return w.prim_func(self.params, attrs)

    def _piece(self, piece: Any, chunks: int) -> Any:
        """Return a piece's column block; note the first of its rows."""
        self.first_row = None
        if chunks == 1:
            return piece
        block, part = tirx.floordiv(piece, chunks), tirx.floormod(piece, chunks)
        if self.tile.by_rows:
            block, part = tirx.floormod(piece, self.blocks), tirx.floordiv(piece, self.blocks)
        last = tirx.const(self.x.rows - self.chunk, "int32")
        self.first_row = self.w.bind("chunk", tirx.min(part * self.chunk, last))
        return self.w.bind("block", block)

    def _modes(self) -> dict[tuple[str, int], list[int]]:
        """Return the column blocks of each (dot sequence, chain) in use."""
        spec = self.spec
        modes: dict[tuple[str, int], list[int]] = {}
        for block, chain in enumerate(spec.chains or (1,) * self.blocks):
            mode = (spec.dot, chain) if chain else (spec.fallback, 1)
            modes.setdefault(mode, []).append(block)
        return modes

    def _block(self) -> None:
        self._expand_weights()
        self.all_rows(self.chunk, self.first_row)

    def _expand_weights(self) -> None:
        """Sign-extend the block's weights into a local panel, if tile or layout want it."""
        self.panel = None
        split = self.packed_kv // self.dot.kv
        if split == 1 and not (self.tile.expand and self.dot.weight == "int16"):
            return
        w, lanes = self.w, self.nt * self.dot.kv
        panel = w.alloc("panel", (self.steps * split, lanes), "int16")
        with w.loop("k", self.steps) as k:
            if split == 1:
                value = load(self.packed, self.block, k, 0, lanes=lanes)
                w.store(panel, tirx.Cast(vector_type("int16", lanes), value), k, 0, lanes=lanes)
            else:
                self._split_groups(panel, k, split)
        self.panel = panel

    def _split_groups(self, panel: Any, k: Any, split: int) -> None:
        """Take groups of ``packed_kv`` channels apart into ``split`` groups of the dot's."""
        w, kv, packed_kv = self.w, self.dot.kv, self.packed_kv
        for v in range(self.tile.vectors):
            codes = w.bind("codes", load(
                self.packed, self.block, k, v * self.lanes * packed_kv,
                lanes=self.lanes * packed_kv))
            for part in range(split):
                picks = [j * packed_kv + part * kv + i
                         for j in range(self.lanes) for i in range(kv)]
                some = tirx.Shuffle([codes], [tirx.const(p, "int32") for p in picks])
                width = self.lanes * kv
                w.store(panel, tirx.Cast(vector_type("int16", width), some), k * split + part,
                        v * width, lanes=width)

    def _lay_out_scales(self) -> None:
        """Lay the block's multipliers and shifts out for the fast requantisation."""
        epilogue, lanes, vectors = self.epilogue, self.lanes, self.tile.vectors
        self.scales: dict[str, Any] = {}
        if epilogue.kind == "acc" or not self.narrow:
            return
        w = self.w
        zero_point = epilogue.zero_point if self.folds_zero else 0
        for v in range(vectors):
            mult, shift = (w.bind("scale", value) for value in self.wide_scale(v))
            parts = self.dot.arithmetic.vector_rescale(
                mult, shift, lanes, epilogue.lift, zero_point)
            for name, value in parts.items():
                dtype, _, count = str(value.ty.dtype).partition("x")
                if name not in self.scales:
                    self.scales[name] = w.alloc(name, (vectors * int(count),), dtype)
                w.store(self.scales[name], value, v * int(count), lanes=int(count))

    def column_vector(self, k: Any, v: int) -> Any:
        """Load packed weights, sign-extended if the dot wants 16 bits."""
        width = self.lanes * self.dot.kv
        if self.panel is not None:
            return load(self.panel, k, v * width, lanes=width)
        value = load(self.packed, self.block, k, v * width, lanes=width)
        if self.dot.weight == "int16":
            value = tirx.Cast(vector_type("int16", width), value)
        return value

    def start_value(self, v: int) -> Any:
        """Start from the bias."""
        return load(self.bias, self.first + v * self.lanes, lanes=self.lanes)

    def rescale(self, v: int) -> Any:
        """Load the parameters laid out for this block."""
        parts = {}
        for name, buffer in self.scales.items():
            count = int(buffer.shape[0]) // self.tile.vectors
            parts[name] = load(buffer, v * count, lanes=count)
        return self.dot.arithmetic.Rescale(**parts, lift=self.epilogue.lift)

    def wide_scale(self, v: int) -> tuple[Any, Any]:
        """Load multipliers and shifts."""
        at = self.first + v * self.lanes
        return load(self.mult, at, lanes=self.lanes), load(self.shift, at, lanes=self.lanes)


def _one_of(block: Any, members: Sequence[int]) -> Any:
    """Return the condition that ``block`` is one of ``members``, as few ranges as there are."""
    condition = None
    for member in members:
        if member - 1 in members:
            continue
        last = member
        while last + 1 in members:
            last += 1
        here = block == member if last == member else tirx.all(block >= member, block <= last)
        condition = here if condition is None else tirx.any(condition, here)
    return condition


def packed_linear(
    params: Sequence[Any], spec: GemmSpec, tile: Tile, attrs: Mapping[str, Any]
) -> tirx.PrimFunc:
    """Build the kernel of a packed linear operator.

    Parameters
    ----------
    params
        The PrimFunc's buffers: x, weights, bias, [mult, shift], [residual], [table of rows], out;
        bias, mult and shift are padded to whole column blocks.
    spec, tile
        What to compute, and how it is cut. ``tile.vectors`` must be the packed layout's.
    attrs
        Attributes of the new PrimFunc.
    """
    return _Linear(params, spec, tile).build(attrs)
