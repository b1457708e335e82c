"""TVM's passes from scheduled loops to kernels, with fewer checks where nothing can be wrong.

The TIR pipeline :data:`PIPELINE` is TVM's own, and then takes the argument checks out of the
entries of functions that carry :data:`TRUSTED`. Give it as ``tir_pipeline`` to ``relax.build``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import tirx

__all__ = ["PIPELINE", "TRUSTED"]

TRUSTED = "vitq.trusted"
"""Attribute of a PrimFunc whose callers pass what it expects."""
PIPELINE = "vitq"


@tvm.transform.module_pass(opt_level=0, name="vitq.SkipChecks")
class _SkipChecks:
    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        trusted = {gvar: func for gvar, func in mod.functions_items()
                   if isinstance(func, tirx.PrimFunc) and func.attrs.get(TRUSTED, False)}
        result = mod.clone()
        result.update(tirx.transform.SkipAssert()(tvm.IRModule(trusted)))
        return result


def _pipeline() -> tuple[tvm.transform.Pass, Callable[..., Any], Callable[..., Any]]:
    lower, finalize_host, finalize_device = tirx.get_tir_pipeline("default")
    return tvm.transform.Sequential([lower, _SkipChecks()]), finalize_host, finalize_device


tirx.register_tir_pipeline(PIPELINE, _pipeline)
