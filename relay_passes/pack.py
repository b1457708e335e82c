"""Pack constant weights into the layout that the target's matmul kernels load.

Before::

    vitq.linear_requant(x, w int8[K, N], bias[N], mult[N], shift[N], …)

After (``nt`` columns a block, ``kv`` channels a group, as the dot sequence wants them)::

    vitq.packed_linear_requant(x, w' int8[N/nt, K/kv, nt, kv], bias', mult', shift', …)

The packed weights replace the original ones, so weights are still stored once, as int8. Where the
instruction set has no kernels nothing changes. The dot sequence is chosen for each layer (and,
within it, each column block) from the weights and the proved interval of the activations' codes:
see ``schedules.packing``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator

from schedules.isa import ISA
from schedules.packing import LinearPlan, narrow_form, pack, pad_columns, plan_linear

from .check_ranges import code_intervals
from .dialect import packed as _packed_dialect
from .dialect.registry import Interval, call, constant, constant_of, is_vitq_call

__all__ = ["PackWeights"]

assert _packed_dialect  # registers the packed operators

LINEAR = ("linear", "linear_requant", "linear_requant_add")
LARGEST = {"int8": 128, "uint8": 255, "int16": 32768}


def _accumulator_bound(w: np.ndarray, bias: np.ndarray, dtype: str) -> int:
    """Return a bound of the accumulator's magnitude from the actual weights."""
    sums = np.abs(w.astype(np.int64)).sum(axis=0) * LARGEST[dtype]
    return int((sums + np.abs(bias.astype(np.int64))).max(initial=0))


def pack_linear(node: relax.Call, plan: LinearPlan) -> relax.Call:
    """Return the packed form of a ``vitq.linear*`` call with constant parameters."""
    x, *constants = node.args
    w, bias, *scale = [constant(c) for c in constants[: 2 if len(node.args) == 3 else 4]]
    dtype = str(x.ty.dtype)
    folded = bias.astype(np.int64) - plan.offset * w.astype(np.int64).sum(axis=0)
    wrapped = folded.astype(np.int32)  # modulo 2^32, as the accumulator is
    args = [relax.const(pack(w, plan.nt, plan.dot.kv)),
            relax.const(pad_columns(wrapped, plan.nt, 0))]
    attrs = {key: node.attrs[key] for key in (node.attrs.keys() if node.attrs else ())}
    if scale:
        mult, shift = scale
        bound = _accumulator_bound(w, bias, dtype)
        mult, shift, flags = narrow_form(mult, shift, bound, int(node.attrs["zero_point"]))
        args += [relax.const(pad_columns(mult, plan.nt, 0)),
                 relax.const(pad_columns(shift, plan.nt, 32))]
        attrs |= flags
    args += node.args[5:]
    name = node.op.name.removeprefix("vitq.")
    return call(
        f"packed_{name}", x, *args, **attrs, columns=int(w.shape[1]), dot=plan.dot.name,
        lanes=plan.dot.lanes, offset=plan.offset, chains=list(plan.chains),
        fallback=plan.fallback,
    )


@relax.expr_functor.mutator
class _Pack(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, isa: ISA, intervals: dict[relax.Var, Any]) -> None:
        super().__init__(mod)
        self.isa = isa
        self.intervals = intervals

    def visit_call_(self, node: relax.Call) -> relax.Expr:
        codes = self.intervals.get(node.args[0]) if node.args else None
        node = self.visit_expr_post_order(node)
        if not any(is_vitq_call(node, name) for name in LINEAR):
            return node
        constants = node.args[1:3] if len(node.args) == 3 else node.args[1:5]
        if any(constant_of(c) is None for c in constants):
            return node
        x = node.args[0].ty
        shape = [int(extent) for extent in x.shape.values]
        w = constant(node.args[1])
        interval = (codes.lo, codes.hi) if isinstance(codes, Interval) else None
        plan = plan_linear(self.isa, str(x.dtype), int(np.prod(shape[:-1])), w, interval)
        return node if plan is None else pack_linear(node, plan)


@tvm.transform.module_pass(opt_level=0, name="vitq.PackWeights")
class PackWeights:
    """Rewrite every weight matmul into its packed form for one instruction set."""

    def __init__(self, isa: ISA) -> None:
        self.isa = isa

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite every Relax function of the module."""
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mutator = _Pack(mod, self.isa, code_intervals(func))
                mutator.builder_.update_func(gvar, mutator.visit_expr(func))
                mod = mutator.builder_.get()
        return mod
