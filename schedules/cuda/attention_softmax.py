"""The softmax of attention: the stages of its definition, with registers for their loads.

Stages are a maximum of the row, the exponential of an element, its sum over the row, any number of
values of a row, and the probability of an element; see ``relay_passes.dialect.softmax`` for theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx

from schedules.builder import load
from schedules.rows import Stage

from .attention_expression import NotTaken, Translator, Value, element, limits
from .writer import CudaWriter

__all__ = ["Softmax"]


class Softmax:
    """Writes a softmax's expressions for one element at a time.

    Parameters
    ----------
    w
        Where.
    stages
        Its stages in order.
    params
        Its parameters: the scores, constants, the probabilities.
    flat
        The constants as flat buffers.
    """

    def __init__(self, w: CudaWriter, stages: Sequence[Stage], params: Sequence[Any],
                 flat: Mapping[Any, Any]) -> None:
        self.w, self.flat = w, flat
        self.most, self.exp, self.sum, *self.of_row, self.out = stages
        self.x = params[0]
        self.rows: dict[Any, Value] = {}  # the code is an array of registers, one a row
        self.constants: dict[Any, Value] = {}
        for stage in stages:
            tvm_ffi.structural_walk(stage.value, (object, self._hold))
        if not self._plain(self.most, self.x) or not self._plain(self.sum, self.exp.buffer):
            raise NotTaken("a softmax whose reductions are of expressions")
        self.known: dict[Any, tuple[int, int]] = {}
        tvm_ffi.structural_walk(self.exp.value, (object, self._difference))

    @staticmethod
    def _plain(stage: Stage, source: Any) -> bool:
        """Whether a reduction is of the elements of ``source`` themselves, cast at most."""
        value = stage.value
        while type(value).__name__ == "Cast":
            value = value.value
        return type(value).__name__ == "TensorLoad" and bool(value.source.same_as(source))

    def _hold(self, node: Any) -> None:
        """Load a constant's element once, here."""
        if (type(node).__name__ != "TensorLoad" or node.source not in self.flat
                or node in self.constants or len(node.indices) != 1
                or not isinstance(node.indices[0], tirx.IntImm)):
            return
        code = load(self.flat[node.source], int(node.indices[0]))
        held = element(self.w.bind("constant", code), str(node.source.dtype))
        code = self.w.bind("constant", held.code)
        self.constants[node] = Value(code, held.lo, held.hi, held.dtype)

    def _difference(self, node: Any) -> None:
        """Know that a row's maximum minus an element is not negative."""
        if type(node).__name__ != "Sub":
            return
        sides = []
        for side in (node.a, node.b):
            while type(side).__name__ == "Cast":
                side = side.value
            sides.append(side.source if type(side).__name__ == "TensorLoad" else None)
        most, x = sides
        if (most is not None and x is not None and most.same_as(self.most.buffer)
                and x.same_as(self.x)):
            low, high = limits(str(self.x.dtype))
            self.known[node] = 0, high - low

    def _translate(self, stage: Stage, r: Any, own: Mapping[Any, Value]) -> Value:
        def read(node: Any) -> Value:
            if node.source in own:
                return own[node.source]
            if node.source in self.rows:
                held = self.rows[node.source]
                return Value(load(held.code, r), held.lo, held.hi, held.dtype)
            if node in self.constants:
                return self.constants[node]
            if node.source in self.flat and len(node.indices) == 1:
                place = translator.value(node.indices[0]).to("int32")
                return element(load(self.flat[node.source], place), str(node.source.dtype))
            raise NotTaken(f"a read of {node.source.name}")

        translator = Translator(self.w, read, self.known)
        # What is stored is proved to fit: the cast to its dtype is no truncation.
        expr = stage.value
        value = translator.value(expr.value if type(expr).__name__ == "Cast" else expr)
        low, high = limits(str(stage.buffer.dtype))
        return Value(value.code, max(value.lo, low), min(value.hi, high), value.dtype)

    def _of_rows(self, stage: Stage, values: Sequence[Value]) -> None:
        array = self.w.registers(stage.name, 2, values[0].dtype)
        for r, value in enumerate(values):
            self.w.store(array, value.code, r)
        self.rows[stage.buffer] = Value(array, values[0].lo, values[0].hi, values[0].dtype)

    def start(self, most: Sequence[Any]) -> None:
        """Take the maxima of the rows."""
        self._of_rows(self.most, [Value(value, *limits(str(self.x.dtype))) for value in most])

    def exponential(self, code: Value, r: Any) -> Any:
        """Return the exponential of a score of row ``r``."""
        x = Value(code.code, *limits(str(self.x.dtype)))
        value = self._translate(self.exp, r, {self.x: x})
        if not (limits("int16")[0] <= value.lo and value.hi <= limits("int16")[1]):
            raise NotTaken("exponentials of more than 16 bits")
        return value.to("int32")

    def finish(self, sums: Sequence[Any]) -> None:
        """Take the sums of the rows and compute what else there is once a row."""
        self._of_rows(self.sum, [Value(value, *limits("int32")) for value in sums])
        for stage in self.of_row:
            self._of_rows(stage, [self._translate(stage, r, {}) for r in range(2)])

    def probability(self, code: Value, r: Any) -> Any:
        """Return the probability that an exponential of row ``r`` becomes."""
        exp = Value(code.code, *limits("int16"))
        return self._translate(self.out, r, {self.exp.buffer: exp}).to("int32")
