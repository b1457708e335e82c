"""The one list of ``vitq.*`` operators and the small machinery that registers them with Relax.

Every operator file calls :func:`register` once per operator. An operator is four things: its type
inference, its TE compute (the definition that every schedule must equal bit for bit), its interval
bounds (what the range proof uses) and its name. The reference interpreter in
``tvm_vitq.reference`` implements the same operators a second time, independently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm.ir._ffi_api as _ir_ffi
import tvm_ffi
from tvm import relax, te
from tvm.relax.transform.legalize_ops.common import register_legalize

from relay_passes.errors import VitqError

__all__ = [
    "SPECS",
    "Claim",
    "Interval",
    "OpSpec",
    "call",
    "constant_of",
    "is_vitq_call",
    "register",
]


# Type inference runs behind TVM's FFI: without this a VitqError comes back as a RuntimeError.
tvm_ffi.register_error("VitqError", VitqError)


@dataclass(frozen=True)
class Interval:
    """Closed interval of integers that every element of a tensor lies in.

    ``row_sum``, where an operator knows it (softmax), bounds the sum of the magnitudes along the
    last axis better than extent times largest element does.
    """

    lo: int
    hi: int
    row_sum: int | None = None


@dataclass(frozen=True)
class Claim:
    """One bound: the intermediate ``name`` of an operator is in [lo, hi] and must fit ``dtype``."""

    name: str
    lo: int
    hi: int
    dtype: str

    @property
    def holds(self) -> bool:
        """Whether [lo, hi] fits the dtype."""
        info = np.iinfo(self.dtype)
        return int(info.min) <= self.lo and self.hi <= int(info.max)


InferFn = Callable[[relax.Call], relax.TensorType]
ComputeFn = Callable[[Sequence[te.Tensor], Any], te.Tensor]
BoundsFn = Callable[[relax.Call, Sequence[Interval]], tuple[Interval, list[Claim]]]
ScalarsFn = Callable[[relax.Call], np.ndarray]


@dataclass(frozen=True)
class OpSpec:
    """Everything relay_passes knows of one operator."""

    name: str
    arguments: tuple[str, ...]
    infer: InferFn
    compute: ComputeFn
    bounds: BoundsFn
    scalars: ScalarsFn | None = None


SPECS: dict[str, OpSpec] = {}


def register(
    name: str,
    arguments: Sequence[str],
    doc: str,
    *,
    infer: InferFn,
    compute: ComputeFn,
    bounds: BoundsFn,
    scalars: ScalarsFn | None = None,
) -> OpSpec:
    """Register operator ``vitq.<name>`` with Relax (types, purity, printing, legalisation).

    With ``scalars``, legalisation passes what it returns to ``compute`` as one more tensor: numbers
    that change no code then need not be built into kernels, so calls that differ in them share one.
    Registering twice (a module reload) keeps the first registration with Relax and replaces the
    Python functions.
    """
    full = f"vitq.{name}"
    fresh = full not in SPECS
    spec = OpSpec(full, tuple(arguments), infer, compute, bounds, scalars)
    SPECS[full] = spec
    if not fresh:
        return spec
    _ir_ffi.RegisterOp(full, doc)
    op = tvm.ir.Op.get(full)
    op.set_num_inputs(len(arguments))
    for argument in arguments:
        op.add_argument(argument, "Tensor", "")
    op.set_attr("FInferType", lambda node, _ctx: SPECS[full].infer(node))
    op.set_attr("FPurity", True)
    op.set_attr("TScriptPrinterName", full)

    @register_legalize(full)
    def _legalize(bb: relax.BlockBuilder, node: relax.Call) -> relax.Expr:
        def build(*tensors: te.Tensor) -> te.Tensor:
            return SPECS[full].compute(tensors, node.attrs)

        numbers = SPECS[full].scalars
        return bb.call_te(
            build,
            *node.args,
            *([_exact(numbers(node))] if numbers else []),
            primfunc_name_hint=full.replace(".", "_"),
            primfunc_attrs={"vitq.op": full},
        )

    return spec


def _exact(value: np.ndarray) -> relax.Expr:
    """Return a constant of the array's dtype, which TVM by itself would make int32 of int64."""
    return relax.const(value, str(value.dtype))


def call(name: str, *args: relax.Expr, **attrs: Any) -> relax.Call:
    """Make a call of ``vitq.<name>`` with the given tensor arguments and attributes."""
    return relax.Call(
        tvm.ir.Op.get(f"vitq.{name}"), list(args), tvm.ir.make_node("ir.DictAttrs", **attrs)
    )


def is_vitq_call(expr: relax.Expr, name: str | None = None) -> bool:
    """Whether ``expr`` calls a vitq operator (the one called ``name``, if given)."""
    if not (isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op)):
        return False
    return expr.op.name in SPECS if name is None else expr.op.name == f"vitq.{name}"


def constant(expr: relax.Expr) -> np.ndarray:
    """Return the NumPy value of an expression that must be a constant."""
    value = constant_of(expr)
    if value is None:
        raise TypeError(f"{type(expr).__name__} is not a constant")
    return value


def constant_of(expr: relax.Expr) -> np.ndarray | None:
    """Return the NumPy value of a constant expression, None for anything else."""
    return expr.value.numpy() if isinstance(expr, tvm.ir.GenericConst) else None
