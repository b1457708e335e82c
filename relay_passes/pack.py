"""Pack constant weights into the layout that the target's matmul kernels load.

Before::

    vitq.linear_requant(x, w int8[K, N], bias[N], mult[N], shift[N], …)

After (``nt`` columns a block, ``kv`` channels a group, as the dot sequence wants them)::

    vitq.packed_linear_requant(x, w' int8[N/nt, K/kv, nt, kv], bias', mult', shift', …)

The packed weights replace the original ones, so weights are still stored once, as int8. Where the
instruction set has no kernels nothing changes. The dot sequence is chosen for each layer (and,
within it, each column block) from the weights and the proved interval of the activations' codes:
see ``schedules.packing``. Records of tuning may say otherwise, and how the kernel is cut: the
packed call then has the attribute ``tile``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator

from schedules.isa import ISA
from schedules.packing import LinearPlan, narrow_form, pack, pad_columns, plan_linear
from schedules.records import Schedules
from schedules.spaces.linear import linear_task
from schedules.task import Point

from .check_ranges import code_intervals
from .dialect import packed as _packed_dialect
from .dialect.registry import Interval, call, constant, constant_of, is_vitq_call

__all__ = ["LINEAR", "PackWeights", "pack_linear", "plan_of"]

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
    args = [relax.const(pack(w, plan.nt, plan.dot.kv, plan.dot)),
            relax.const(pad_columns(wrapped, plan.nt, 0))]
    attrs = {key: node.attrs[key] for key in (node.attrs.keys() if node.attrs else ())}
    if scale:
        mult, shift = scale
        bound = _accumulator_bound(w, bias, dtype)
        mult, shift, flags = narrow_form(mult, shift, bound, int(node.attrs["zero_point"]),
                                         plan.dot.least_shift)
        args += [relax.const(pad_columns(mult, plan.nt, 0)),
                 relax.const(pad_columns(shift, plan.nt, plan.dot.least_shift))]
        attrs |= flags
    args += node.args[5:]
    name = node.op.name.removeprefix("vitq.")
    if plan.schedule:
        attrs["tile"] = plan.schedule
    return call(
        f"packed_{name}", x, *args, **attrs, columns=int(w.shape[1]), dot=plan.dot.name,
        lanes=plan.dot.lanes, offset=plan.offset, chains=list(plan.chains),
        fallback=plan.fallback,
    )


def plan_of(
    node: relax.Call, isa: ISA, codes: tuple[int, int] | None, schedules: Schedules
) -> LinearPlan | None:
    """Return the plan of a ``vitq.linear*`` call with constant parameters.

    Parameters
    ----------
    node
        The call.
    isa
        Instruction set.
    codes
        Proved interval of its activations; None: their dtype's.
    schedules
        Say how the task is to be cut.
    """
    x, w = node.args[0].ty, constant(node.args[1])
    rows = int(np.prod([int(extent) for extent in x.shape.values[:-1]]))
    residual = str(node.args[5].ty.dtype) if len(node.args) > 5 else ""

    def choose(chain: int) -> Point | None:
        name, shape = node.op.name.removeprefix("vitq."), (rows, w.shape[1], w.shape[0])
        return schedules.point(
            linear_task(name, shape, str(x.dtype), str(node.ty.dtype), residual, chain))

    return plan_linear(isa, str(x.dtype), rows, w, codes, choose)


@relax.expr_functor.mutator
class _Pack(PyExprMutator):
    def __init__(
        self, mod: tvm.IRModule, isa: ISA, intervals: dict[relax.Var, Any], schedules: Schedules
    ) -> None:
        super().__init__(mod)
        self.isa = isa
        self.schedules = schedules
        self.intervals = intervals

    def visit_call_(self, node: relax.Call) -> relax.Expr:
        codes = self.intervals.get(node.args[0]) if node.args else None
        node = self.visit_expr_post_order(node)
        if not any(is_vitq_call(node, name) for name in LINEAR):
            return node
        constants = node.args[1:3] if len(node.args) == 3 else node.args[1:5]
        if any(constant_of(c) is None for c in constants):
            return node
        interval = (codes.lo, codes.hi) if isinstance(codes, Interval) else None
        plan = plan_of(node, self.isa, interval, self.schedules)
        return node if plan is None else pack_linear(node, plan)


@tvm.transform.module_pass(opt_level=0, name="vitq.PackWeights")
class PackWeights:
    """Rewrite every weight matmul into its packed form for one instruction set."""

    def __init__(self, isa: ISA, schedules: Schedules | None = None) -> None:
        self.isa = isa
        self.schedules = schedules or Schedules.shipped(isa)

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite every Relax function of the module."""
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mutator = _Pack(mod, self.isa, code_intervals(func), self.schedules)
                mutator.builder_.update_func(gvar, mutator.visit_expr(func))
                mod = mutator.builder_.get()
        return mod
