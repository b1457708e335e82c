"""Bit-exact interpreter of the integer dialect, fused or not: the oracle of every artefact.

It walks a module binding by binding with int64 NumPy arithmetic (the operators are in
``arithmetic.py``, ``nonlinear.py`` and ``layout.py``) and checks that no value leaves the dtype
that type inference gave it. It never calls the TE definitions that are compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from relay_passes.dialect.registry import constant_of
from relay_passes.errors import VitqError
from tvm_vitq.reference import arithmetic, nonlinear
from tvm_vitq.reference.layout import LAYOUT
from tvm_vitq.reference.registry import REFERENCE, RangeError, expect

__all__ = ["Interpreter", "run_integer"]

assert arithmetic and nonlinear  # they enter their operators in REFERENCE

Observer = Callable[[str, str, np.ndarray], None]


class Interpreter:
    """A module of the integer dialect, ready to be run on arrays.

    Parameters
    ----------
    mod : tvm.IRModule
        Integer dialect, before legalisation (packing of weights not applied).
    function : str
        Function to run: ``main``, or ``main_codes`` of a module split at its float boundary.

    Raises
    ------
    VitqError
        If the module has no such function.
    """

    def __init__(self, mod: tvm.IRModule, function: str = "main") -> None:
        self.functions = {
            var.name_hint: func
            for var, func in mod.functions.items()
            if isinstance(func, relax.Function)
        }
        if function not in self.functions:
            raise VitqError(
                f"the module has no function {function}; it has {', '.join(self.functions)}"
            )
        self.entry = self.functions[function]
        self._constants: dict[relax.Expr, np.ndarray] = {}

    def __call__(self, x: np.ndarray, observe: Observer | None = None) -> np.ndarray:
        """Run on ``x`` [n * B, ...], n batches of the module's own size B, one after another.

        Parameters
        ----------
        x : ndarray
            Input of the function's dtype.
        observe : callable, optional
            ``observe(binding, operator, value)`` after every binding of every batch; ``value`` has
            the binding's dtype.

        Returns
        -------
        ndarray
            float32 logits of ``main``, integer codes of ``main_codes``.

        Raises
        ------
        VitqError
            If the shape or dtype of ``x`` does not fit.
        RangeError
            If an intermediate leaves its dtype, which is a fault of the compiler.
        """
        (param,) = self.entry.params
        shape = [int(extent) for extent in param.ty.shape.values]
        dtype = str(param.ty.dtype)
        if list(x.shape[1:]) != shape[1:] or x.shape[0] % shape[0] or not x.shape[0]:
            raise VitqError(
                f"input has shape {list(x.shape)}, the model takes {shape} (or whole multiples of "
                "its batch)"
            )
        if str(x.dtype) != dtype:
            raise VitqError(f"input is {x.dtype}, the model takes {dtype}; convert it first")
        batches = np.split(x, x.shape[0] // shape[0])
        return np.concatenate([self._run(self.entry, [part], observe) for part in batches])

    def evaluate(self, *args: np.ndarray, observe: Observer | None = None) -> np.ndarray:
        """Run once on arrays of exactly the parameters' types, as many as there are."""
        return self._run(self.entry, list(args), observe)

    def _run(
        self, func: relax.Function, args: list[np.ndarray], observe: Observer | None
    ) -> np.ndarray:
        values: dict[relax.Var, Any] = dict(zip(func.params, args, strict=True))
        for block in func.body.blocks:
            for binding in block.bindings:
                name, expr = binding.var.name, binding.value
                try:
                    value = self._evaluate(expr, values, observe)
                    values[binding.var] = value = _stored(value, binding.var.ty)
                except RangeError as error:
                    raise RangeError(f"{name} ({_operator(expr)}): {error}") from None
                if observe is not None and isinstance(value, np.ndarray):
                    observe(name, _operator(expr), value)
        return self._value(func.body.body, values)

    def _value(self, expr: relax.Expr, values: dict[relax.Var, Any]) -> Any:
        if isinstance(expr, relax.Var):
            return values[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(field, values) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value, values)[expr.index]
        if expr not in self._constants:
            constant = constant_of(expr)
            if constant is None:
                return None  # a shape or a tuple of indices, read from the call itself
            self._constants[expr] = constant
        return self._constants[expr]

    def _evaluate(
        self, expr: relax.Expr, values: dict[relax.Var, Any], observe: Observer | None
    ) -> Any:
        if not isinstance(expr, relax.Call):
            return self._value(expr, values)
        args = [self._value(arg, values) for arg in expr.args]
        if isinstance(expr.op, tvm.ir.GlobalVar):
            return self._run(self.functions[expr.op.name_hint], args, observe)
        name = _operator(expr)
        if name in REFERENCE:
            return REFERENCE[name](args, expr.attrs)
        if name in LAYOUT:
            return LAYOUT[name](args, expr)
        raise VitqError(f"{name} has no integer reference; lower the module first")


def _operator(expr: relax.Expr) -> str:
    if isinstance(expr, relax.Call):
        return expr.op.name_hint if isinstance(expr.op, tvm.ir.GlobalVar) else str(expr.op.name)
    return type(expr).__name__


def _stored(value: Any, ty: relax.Type) -> Any:
    """Return a value in its inferred dtype after checking that nothing is lost."""
    if not isinstance(value, np.ndarray):
        return value
    dtype = str(ty.dtype)
    if list(value.shape) != [int(extent) for extent in ty.shape.values]:
        raise RangeError(f"result has shape {list(value.shape)}, its type says {ty.shape}")
    if value.dtype == dtype:
        return value
    if not np.issubdtype(value.dtype, np.integer) or dtype.startswith("float"):
        raise RangeError(f"result is {value.dtype}, its type says {dtype}")
    return expect(value, dtype, "result").astype(dtype)


def run_integer(
    mod: tvm.IRModule, x: np.ndarray, observe: Observer | None = None, function: str = "main"
) -> np.ndarray:
    """Run a module of the integer dialect on ``x`` with exact integer arithmetic.

    See :class:`Interpreter` for the parameters; make one of those to run the same module often.

    Returns
    -------
    ndarray
        float32 logits of ``main``, or integer codes of ``main_codes``.
    """
    return Interpreter(mod, function)(x, observe)
