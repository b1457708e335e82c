"""Proof that what a kernel reads before earlier launches have ended is constant.

Where launches overlap (``schedules.cuda.overlap``) a kernel waits before it reads what an earlier
one may have written. What it reads before that, it says in the attribute
:data:`~schedules.cuda.writer.EARLY`; here every ``call_tir`` is looked at.
"""

from __future__ import annotations

import tvm
from tvm import relax, tirx

from relay_passes.dialect.registry import constant_of
from relay_passes.errors import VitqError
from schedules.cuda.writer import EARLY

__all__ = ["check_launches"]


def check_launches() -> tvm.transform.Pass:
    """Return a pass that checks scheduled kernels' calls and leaves the module as it is.

    Raises
    ------
    VitqError
        A kernel reads a tensor early that is no constant.
    """

    @tvm.transform.module_pass(opt_level=0, name="vitq.CheckLaunches")
    def _check(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        for _, func in mod.functions_items():
            if isinstance(func, relax.Function):
                _check_calls(mod, func)
        return mod

    return _check


def _check_calls(mod: tvm.IRModule, func: relax.Function) -> None:
    for block in func.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not (isinstance(call, relax.Call) and call.op == tvm.ir.Op.get("relax.call_tir")):
                continue
            kernel = mod[call.args[0]]
            assert isinstance(kernel, tirx.PrimFunc)
            for index in (kernel.attrs or {}).get(EARLY, ()):
                if constant_of(call.args[1].fields[int(index)]) is None:
                    raise VitqError(
                        f"{call.args[0].name_hint} reads {kernel.params[int(index)].name} while "
                        "earlier launches may run, and it is no constant")
