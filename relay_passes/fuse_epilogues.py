"""Fuse requantisation and the residual add into the matmul that feeds them.

========================================  =========================  ==============================
pattern (inner results used once)         becomes                    reason
========================================  =========================  ==============================
requantize(linear(x, w, b))               linear_requant             the accumulator never leaves
                                                                     registers
add(requantize(linear(x, w, b)), r)       linear_requant_add         the residual is read where the
                                                                     result is stored
requantize(matmul(a, b))                  matmul_requant             as for linear
add(requantize(matmul(a, b)), r)          matmul_requant_add         r may be one for all windows
========================================  =========================  ==============================

Fusing changes no bit as long as the int32 value between ``requantize`` and ``add`` does not
saturate. The fused operator has no such clamp: it is what the range proof looks at, what the
reference interprets and what is built.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator

from .dialect.registry import call, constant_of, is_vitq_call
from .values import shape_of

__all__ = ["FuseEpilogues"]

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
OUT = ("zero_point", "qmin", "qmax", "out_dtype")


def _uses(func: relax.Function) -> dict[relax.Var, int]:
    uses: dict[relax.Var, int] = {}

    def count(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call):
            for arg in expr.args:
                count(arg)
        elif isinstance(expr, relax.Tuple):
            for field in expr.fields:
                count(field)
        elif isinstance(expr, relax.Var):
            uses[expr] = uses.get(expr, 0) + 1

    for block in func.body.blocks:
        for binding in block.bindings:
            count(binding.value)
    count(func.body.body)
    return uses


def _identity(mult: int, shift: int) -> bool:
    """Whether rq multiplies by exactly one."""
    return mult == 1 << shift


def _fits(residual: tuple[int, ...], shape: tuple[int, ...], shared: bool) -> bool:
    """Whether a residual has the shape; if ``shared``, its leading axes may be 1."""
    if not shared or len(residual) != len(shape) or residual[-2:] != shape[-2:]:
        return residual == shape
    return all(r in (1, s) for r, s in zip(residual, shape, strict=True))


@relax.expr_functor.mutator
class _Fuse(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, func: relax.Function) -> None:
        super().__init__(mod)
        self.uses = _uses(func)

    def _single(self, expr: relax.Expr, *names: str) -> relax.Call | None:
        """The call of one of ``names`` that ``expr`` is bound to, if nothing else uses it."""
        if not isinstance(expr, relax.Var) or self.uses.get(expr, 0) != 1:
            return None
        value = self.lookup_binding(expr)
        return value if any(is_vitq_call(value, name) for name in names) else None

    def visit_call_(self, node: relax.Call) -> relax.Expr:
        node = super().visit_call_(node)
        if is_vitq_call(node, "requantize"):
            return self._requantize(node)
        if is_vitq_call(node, "add"):
            return self._add(node)
        return node

    def _requantize(self, node: relax.Call) -> relax.Call:
        acc = self._single(node.args[0], "linear", "matmul")
        if acc is None or int(node.attrs["in_zero_point"]) != 0:
            return node
        mult, shift = constant_of(node.args[1]), constant_of(node.args[2])
        assert mult is not None and shift is not None
        out = {key: node.attrs[key] for key in OUT}
        if is_vitq_call(acc, "linear"):
            width = shape_of(acc)[-1] if acc.ty is not None else shape_of(acc.args[1])[-1]
            rows = [np.ascontiguousarray(np.broadcast_to(v, (width,))) for v in (mult, shift)]
            return call("linear_requant", *acc.args, *map(relax.const, rows), **out)
        if mult.size != 1:
            return node
        return call(
            "matmul_requant", *acc.args, transpose_b=acc.attrs["transpose_b"],
            mult=int(mult.item()), shift=int(shift.item()), **out,
        )

    def _add(self, node: relax.Call) -> relax.Call:
        for main, other in ((0, 1), (1, 0)):
            fused = self._single(node.args[main], "linear_requant", "matmul_requant")
            if fused is None or str(fused.attrs["out_dtype"]) != "int32":
                continue
            a, b = ("a", "b") if main == 0 else ("b", "a")
            attrs = node.attrs
            if int(fused.attrs["zero_point"]) or int(attrs[f"{a}_zero_point"]):
                continue
            if not _identity(int(attrs[f"{a}_mult"]), int(attrs[f"{a}_shift"])):
                continue
            if int(attrs[f"{b}_zero_point"]):
                continue
            residual = node.args[other]
            if str(residual.ty.dtype) != "int16":
                continue
            scores = is_vitq_call(fused, "matmul_requant")
            if not _fits(shape_of(residual), shape_of(node.args[main]), shared=scores):
                continue
            kept = ("transpose_b", "mult", "shift") if scores else ()
            return call(
                f"{fused.op.name.removeprefix('vitq.')}_add", *fused.args, residual,
                res_mult=attrs[f"{b}_mult"], res_shift=attrs[f"{b}_shift"],
                **{key: fused.attrs[key] for key in kept}, **{key: attrs[key] for key in OUT},
            )
        return node


@tvm.transform.module_pass(opt_level=0, name="vitq.FuseEpilogues")
class FuseEpilogues:
    """Fold requantize and residual add into linear and matmul."""

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite every Relax function of the module."""
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mutator = _Fuse(mod, func)
                mutator.builder_.update_func(gvar, mutator.visit_expr(func))
                mod = mutator.builder_.get()
        return relax.transform.DeadCodeElimination()(mod)
