"""An elementwise operator behind a weight matmul: its TE expression on codes in registers.

What the expression loads, besides the code, stands in small tensors: what it loads at fixed places
is loaded once, what it loads by column once for each column of a thread, and only what it looks up
by the code (a table) for each element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm_ffi
from tvm import tirx

from schedules.builder import const, load

from .attention_expression import NotTaken, Translator, Value, element
from .expression import Expressions, loads_of, stages_of

__all__ = ["Tail"]


@dataclass
class Tail:
    """See the module's docstring.

    Parameters
    ----------
    func
        The unscheduled PrimFunc; its first parameter is the codes.
    buffers
        Its other parameters' buffers in the kernel, flat where they are loaded from.
    interval
        Of the codes.
    """

    func: tirx.PrimFunc
    buffers: Mapping[Any, Any]
    interval: tuple[int, int]
    fixed: dict[Any, Any] = field(default_factory=dict, init=False)
    by_column: dict[Any, list[Any]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Take the stages; several are taken as one expression of the last."""
        self.stages = {stage.buffer: stage for stage in stages_of(self.func)}
        if any(stage.reduced for stage in self.stages.values()):
            raise ValueError("a tail has no reductions")
        self.last = self.stages[self.func.params[-1]]

    @property
    def dtype(self) -> str:
        """Dtype of the result."""
        return str(self.last.buffer.dtype)

    def columns(self, w: Any, columns: Sequence[Any]) -> None:
        """Load what does not depend on the codes, for these columns."""
        self.at = list(columns)
        self.by_column.clear()
        for stage in self.stages.values():
            axes = {v: None for v in stage.axes}
            for node in loads_of(stage.value):
                flat = self.buffers.get(node.source)
                if flat is None:
                    continue
                used = _variables(node.indices, axes)
                inner = any(loads_of(index) for index in node.indices)
                if inner or used - {stage.axes[-1]}:
                    continue
                key = _key(node)
                if not used:
                    if key not in self.fixed:
                        self.fixed[key] = w.bind("fixed", load(flat, self._place(node, {})))
                elif key not in self.by_column:
                    self.by_column[key] = [
                        w.bind("column", load(flat, self._place(node, {stage.axes[-1]: at})))
                        for at in self.at]

    def _place(self, node: Any, axes: Mapping[Any, Any]) -> Any:
        read = Expressions(None, axes, lambda inner, _: inner)
        return _flat_index(node.source, [read.code(index) for index in node.indices])

    def codes(self, w: Any, row: Any, codes: Sequence[Any], packed: bool = False) -> list[Any]:
        """Return the results for eight codes of a row, as int32.

        ``packed`` says that the caller limits them to their dtype.
        """
        return [self._code(w, row, i, code, packed) for i, code in enumerate(codes)]

    def _code(self, w: Any, row: Any, i: int, code: Any, packed: bool) -> Any:
        try:
            found = self._translated(w, row, i, code, packed)
        except NotTaken:
            found = self._rebuilt(w, row, i, code)
        return w.bind("code", found)

    def _axes(self, stage: Any, row: Any, i: int) -> dict[Any, Any]:
        """Return the indices of the element of column ``i`` of a row."""
        indices: list[Any] = [self.at[i]]
        for extent in reversed([int(e) for e in stage.buffer.shape[:-1]]):
            indices.insert(0, tirx.floormod(row, const(extent, "int32")))
            row = tirx.floordiv(row, const(extent, "int32"))
        return dict(zip(stage.axes, indices, strict=True))

    def _translated(self, w: Any, row: Any, i: int, code: Any, packed: bool) -> Any:
        """Return the value by registers of 32 bits and intervals."""
        done: dict[Any, Value] = {}

        def value_of(stage: Any) -> Value:
            if stage.buffer in done:
                return done[stage.buffer]
            axes = self._axes(stage, row, i)

            def read(node: Any) -> Value:
                if node.source.same_as(self.func.params[0]):
                    return Value(code, *self.interval)
                if node.source in self.stages:
                    return value_of(self.stages[node.source])
                dtype = str(node.source.dtype)
                if _key(node) in self.fixed:
                    return element(self.fixed[_key(node)], dtype)
                if _key(node) in self.by_column:
                    return element(self.by_column[_key(node)][i], dtype)
                places = [translator.value(index).to("int32") if loads_of(index)
                          else Expressions(None, axes, lambda inner, _: inner).code(index)
                          for index in node.indices]
                place = _flat_index(node.source, places)
                return element(w.bind("entry", load(self.buffers[node.source], place)), dtype)

            translator = Translator(w, read)
            last = packed and stage.buffer.same_as(self.last.buffer)
            done[stage.buffer] = (translator.saturated(stage.value, self.dtype) if last
                                  else translator.value(stage.value))
            return done[stage.buffer]

        found = value_of(self.last)
        return found.to("int32")

    def _rebuilt(self, w: Any, row: Any, i: int, code: Any) -> Any:
        """Return the value in the dtypes of the definition."""
        def value_of(stage: Any) -> Any:
            def read(node: Any, rebuild: Any) -> Any:
                if node.source.same_as(self.func.params[0]):
                    dtype = str(node.source.dtype)
                    return code if dtype == "int32" else tirx.Cast(dtype, code)
                if node.source in self.stages:
                    return value_of(self.stages[node.source])
                if _key(node) in self.fixed:
                    return self.fixed[_key(node)]
                if _key(node) in self.by_column:
                    return self.by_column[_key(node)][i]
                place = _flat_index(node.source, [rebuild(index) for index in node.indices])
                return load(self.buffers[node.source], place)

            return Expressions(w, self._axes(stage, row, i), read).code(stage.value)

        value = value_of(self.last)
        return value if self.dtype == "int32" else tirx.Cast("int32", value)


def _key(node: Any) -> tuple[Any, str]:
    """Return the same for equal loads: TIR made of TE repeats what a name stood for."""
    return node.source, str(list(node.indices))


def _variables(indices: Sequence[Any], axes: Mapping[Any, Any]) -> set[Any]:
    """Return which of the axes some expressions hold."""
    found: set[Any] = set()

    def visit(node: Any) -> None:
        if isinstance(node, tirx.Var) and node in axes:
            found.add(node)

    for index in indices:
        tvm_ffi.structural_walk(index, (object, visit))
    return found


def _flat_index(buffer: Any, indices: Sequence[Any]) -> Any:
    place: Any = const(0, "int32")
    for index, extent in zip(indices, buffer.shape, strict=True):
        place = place * const(int(extent), "int32") + index
    return place
