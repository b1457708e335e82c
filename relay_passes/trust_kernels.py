"""Say which kernels only ever see tensors that the module itself made.

TVM gives every kernel an entry that checks each argument's device, dtype, shape, strides and
alignment: more code than most kernels are. Where all arguments are constants and results of other
kernels, types proved these properties at compile time, so the kernel gets the attribute
:data:`~schedules.calling.TRUSTED` and its entry loses the checks (``schedules.calling``). Kernels
that read an input of the module keep them.
"""

from __future__ import annotations

import tvm
from tvm import relax, tirx

from schedules.calling import TRUSTED

__all__ = ["TrustKernels"]

_CALL_TIR = "relax.call_tir"


def _outside(func: relax.Function) -> set[tvm.ir.GlobalVar]:
    """Return the kernels that read a parameter of ``func``, or a view of one."""
    given: set[relax.Var] = set(func.params)
    found: set[tvm.ir.GlobalVar] = set()

    def from_outside(expr: relax.Expr) -> bool:
        if isinstance(expr, relax.Var):
            return expr in given
        if isinstance(expr, relax.Tuple):
            return any(from_outside(field) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return from_outside(expr.tuple_value)
        return isinstance(expr, relax.Call) and any(from_outside(arg) for arg in expr.args)

    for block in func.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if not from_outside(value):
                continue
            if isinstance(value, relax.Call) and value.op == tvm.ir.Op.get(_CALL_TIR):
                found.add(value.args[0])
            else:
                given.add(binding.var)
    return found


@tvm.transform.module_pass(opt_level=0, name="vitq.TrustKernels")
class TrustKernels:
    """Mark every PrimFunc that no ``call_tir`` gives a tensor from outside."""

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Mark the kernels of a module whose layout operators are views already."""
        outside: set[tvm.ir.GlobalVar] = set()
        for _, func in mod.functions_items():
            if isinstance(func, relax.Function):
                outside |= _outside(func)
        result = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and gvar not in outside:
                result.update_func(gvar, func.with_attr(TRUSTED, True))
        return result
