"""A small writer of TIR statements: what kernels are made with where a schedule cannot say it.

The writer keeps a stack of open statement lists. ``bind`` makes a single-assignment value,
``alloc`` a buffer of the enclosing scope, and the loops and conditions are context managers::

    w = Writer()
    with w.loop("i", 4, "parallel") as i:
        x = w.bind("x", a[i] + 1)
        w.store(b, x, i)
    func = w.prim_func([a, b], {"global_symbol": "main"})

Nothing here parses TVMScript, so building a kernel costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx.stmt import ForKind

__all__ = ["Writer", "const", "load", "ramp", "vector_of", "vector_type"]

_KINDS = {
    "serial": ForKind.SERIAL,
    "parallel": ForKind.PARALLEL,
    "vectorized": ForKind.VECTORIZED,
    "unrolled": ForKind.UNROLLED,
}


def vector_type(dtype: str, lanes: int) -> str:
    """Return the name of a vector dtype: ``vector_type("int16", 16) == "int16x16"``."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def const(value: int, dtype: str) -> Any:
    """Return an integer constant, splat over the lanes of ``dtype``."""
    base, _, lanes = dtype.partition("x")
    scalar = tirx.const(value, base)
    return tirx.Broadcast(scalar, int(lanes)) if lanes else scalar


def vector_of(values: Sequence[int], dtype: str) -> Any:
    """Return a vector of scalar constants."""
    scalars = [tirx.const(value, dtype) for value in values]
    return tirx.Shuffle(scalars, [tirx.const(i, "int32") for i in range(len(scalars))])


def ramp(base: Any, lanes: int) -> Any:
    """Return the index of ``lanes`` neighbouring elements from ``base``."""
    if lanes == 1:
        return base
    if isinstance(base, int):
        base = tirx.const(base, "int32")
    return tirx.Ramp(base, 1, lanes)


def load(buffer: Any, *indices: Any, lanes: int = 1) -> Any:
    """Load ``lanes`` neighbouring elements, the last index being the first of them."""
    *outer, last = indices
    return tirx.BufferLoad(buffer, [*outer, ramp(last, lanes)])


class Writer:
    """Collects statements; see the module's docstring."""

    def __init__(self) -> None:
        self._stack: list[list[Any]] = [[]]
        self._names: dict[str, int] = {}

    def _fresh(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else f"{name}_{count}"

    def emit(self, statement: Any) -> None:
        """Append a statement to the innermost open scope."""
        self._stack[-1].append(statement)

    def bind(self, name: str, value: Any) -> Any:
        """Name a value; it is computed here, once."""
        var = tirx.Var(self._fresh(name), value.ty)
        self.emit(tirx.Bind(var, value))
        return var

    def store(self, buffer: Any, value: Any, *indices: Any, lanes: int = 1) -> None:
        """Store ``value`` (``lanes`` neighbouring elements from the last index)."""
        *outer, last = indices
        self.emit(tirx.BufferStore(buffer, value, [*outer, ramp(last, lanes)]))

    def alloc(self, name: str, shape: Sequence[Any], dtype: str) -> Any:
        """Allocate a buffer of a scalar dtype that lives in the enclosing scope.

        Vectors are loaded and stored by ``lanes``: TVM's storage rewriting gives memory of buffers
        of vector dtypes to others without minding the lanes.
        """
        assert "x" not in dtype, dtype
        buffer = tirx.decl_buffer(list(shape), dtype, self._fresh(name), scope="global")
        self.emit(tirx.AllocBuffer(buffer))
        return buffer

    def alias(self, buffer: Any, shape: Sequence[Any], name: str) -> Any:
        """Declare ``buffer``'s memory again, with another shape."""
        view = tirx.decl_buffer(list(shape), str(buffer.dtype), self._fresh(name))
        self.emit(tirx.DeclBuffer(view, data=buffer.data))
        return view

    def flat(self, buffer: Any) -> Any:
        """Declare ``buffer``'s memory as one dimension."""
        total = 1
        for extent in buffer.shape:
            total *= int(extent)
        return self.alias(buffer, (total,), f"{buffer.name}_flat")

    @contextmanager
    def scope(self) -> Iterator[list[Any]]:
        """Collect statements in a list of their own (for a body built elsewhere)."""
        statements: list[Any] = []
        self._stack.append(statements)
        try:
            yield statements
        finally:
            self._stack.pop()

    @contextmanager
    def loop(self, name: str, extent: Any, kind: str = "serial") -> Iterator[Any]:
        """Open a loop from 0 to ``extent``; yields its variable."""
        var = tirx.Var(self._fresh(name), "int32")
        with self.scope() as body:
            yield var
        self.emit(tirx.For(var, 0, extent, _KINDS[kind], _sequence(body)))

    @contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """Open the body of an ``if`` without an ``else``."""
        with self.scope() as body:
            yield
        self.emit(tirx.IfThenElse(condition, _sequence(body), None))

    @contextmanager
    def otherwise(self) -> Iterator[None]:
        """Give the ``if`` just emitted its ``else``."""
        with self.scope() as body:
            yield
        last = self._stack[-1].pop()
        self.emit(tirx.IfThenElse(last.condition, last.then_case, _sequence(body)))

    def prim_func(self, params: Sequence[Any], attrs: Mapping[str, Any]) -> tirx.PrimFunc:
        """Close the function; Relax passes look for a root block in every kernel."""
        (body,) = self._stack
        root = s_tir.SBlock([], [], [], "root", _sequence(body))
        return tirx.PrimFunc(
            list(params),
            s_tir.SBlockRealize([], tirx.const(True, "bool"), root),
            attrs=tvm.ir.make_node("ir.DictAttrs", **dict(attrs)),
        )


def _sequence(statements: list[Any]) -> Any:
    if not statements:
        return tirx.Evaluate(tirx.const(0, "int32"))
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)
