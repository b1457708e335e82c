"""Whatever else the dialect can produce on a GPU: one thread for each element of the result.

Stages that the result is made of are computed by the thread that needs them: maps become part of
its expression, a reduction a loop before it. That is for what runs once in a network (the join of
class token and patches, an average over tokens); what runs in every block has kernels of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from schedules.builder import const, load

from .expression import Expressions
from .writer import CudaWriter

__all__ = ["cast", "index_of", "lower_elements"]

THREADS = 128


def cast(value: Any, dtype: str) -> Any:
    """Return a value in a dtype."""
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)


def index_of(value: Any) -> Any:
    """Return an index of a TE definition, which may be an int64, as an int32."""
    return const(int(value), "int32") if isinstance(value, tirx.IntImm) else cast(value, "int32")


class _Elements:
    def __init__(self, func: tirx.PrimFunc, blocks: Sequence[Any]) -> None:
        self.params = list(func.params)
        self.blocks = {block.body.buffer: block for block in blocks}
        self.out = self.params[-1]
        self.size = int(np.prod([int(e) for e in self.out.shape], dtype=np.int64))

    def build(self, attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Return the PrimFunc."""
        count = -(-self.size // THREADS)
        w = self.w = CudaWriter((count,), THREADS)
        self.flat = {buffer: w.flat(buffer) for buffer in self.params}
        at = w.bind("element", w.block[0] * THREADS + w.thread)
        if self.size % THREADS:
            with w.when(at < self.size):
                self._element(at)
        else:
            self._element(at)
        return w.prim_func(self.params, attrs)

    def _element(self, at: Any) -> None:
        indices: list[Any] = []
        rest = at
        for extent in reversed(self.out.shape[1:]):
            indices.insert(0, tirx.floormod(rest, const(int(extent), "int32")))
            rest = tirx.floordiv(rest, const(int(extent), "int32"))
        value = self._value(self.out, [rest, *indices] if self.out.shape else [])
        self.w.store(self.flat[self.out], value, at)

    def _value(self, buffer: Any, indices: Sequence[Any]) -> Any:
        """Return an element of a stage."""
        w, block = self.w, self.blocks[buffer]
        spatial = [v for v in block.iter_vars if int(v.iter_type) == 0]
        reduced = [v for v in block.iter_vars if int(v.iter_type) == 2]
        axes = {v.var: cast(at, str(v.var.ty.dtype))
                for v, at in zip(spatial, indices, strict=True)}
        stored = block.body.value
        if not reduced:
            return Expressions(w, axes, self._read).code(stored)
        total = w.registers("total", 1, str(buffer.dtype))
        w.store(total, Expressions(w, axes, self._read).code(block.init.value), 0)
        self._reduce(total, stored, axes, reduced)
        return load(total, 0)

    def _reduce(self, total: Any, stored: Any, axes: dict[Any, Any], reduced: list[Any]) -> None:
        w = self.w
        if not reduced:
            value = Expressions(w, axes, self._read).code(stored.b)
            joined = type(stored)(load(total, 0), value)
            w.store(total, joined, 0)
            return
        with w.loop("k", int(reduced[0].dom.extent)) as k:
            at = cast(k, str(reduced[0].var.ty.dtype))
            self._reduce(total, stored, {**axes, reduced[0].var: at}, reduced[1:])

    def _read(self, node: Any, code: Any) -> Any:
        indices = [index_of(code(index)) for index in node.indices]
        if node.source in self.blocks:
            return self._value(node.source, indices)
        place: Any = const(0, "int32")
        for index, extent in zip(indices, node.source.shape, strict=True):
            # What a condition guards may be loaded nevertheless, so it is kept inside.
            inside = tirx.max(tirx.min(index, const(int(extent) - 1, "int32")), const(0, "int32"))
            place = place * int(extent) + inside
        return load(self.flat[node.source], place)


def lower_elements(
    func: tirx.PrimFunc, blocks: Sequence[Any], attrs: Mapping[str, Any]
) -> tirx.PrimFunc:
    """Return ``func`` as a kernel of one thread an element.

    Parameters
    ----------
    func
        An unscheduled PrimFunc made of TE stages.
    blocks
        Its blocks in order, without the root.
    attrs
        Attributes of the new PrimFunc.
    """
    return _Elements(func, blocks).build(attrs)
