"""The order of the passes, to be read top to bottom.

``lower`` takes the quantize/dequantize form to the fused integer dialect and proves it;
``build_passes`` takes the dialect to a module that the Relax VM can run on a target. Together they
are the pipeline ``vitq`` of ``relax.get_pipeline``.
"""

from __future__ import annotations

from pathlib import Path

import tvm
from tvm import relax

from schedules.apply import ApplySchedules
from schedules.isa import ISA, isa_for
from schedules.records import Schedules

from .capture_graph import CaptureGraph
from .check_integer_only import check_integer_only, check_integer_only_tir
from .check_launches import check_launches
from .check_ranges import check_ranges
from .fold_layout import FoldLayout
from .fuse_epilogues import FuseEpilogues
from .group_kernels import GroupKernels
from .hoist_slices import HoistSlices
from .lower import LowerToInteger
from .pack import PackWeights
from .split_boundary import SplitBoundary
from .trust_kernels import TrustKernels

__all__ = ["build_passes", "kernel_passes", "lower", "machine_passes", "vitq_pipeline"]


def _dump(mod: tvm.IRModule, dump_ir: str | Path | None, name: str) -> tvm.IRModule:
    if dump_ir is not None:
        folder = Path(dump_ir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(mod.script())
    return mod


def lower(mod: tvm.IRModule, dump_ir: str | Path | None = None) -> tvm.IRModule:
    """Lower a quantize/dequantize module to the fused integer dialect and prove it.

    Parameters
    ----------
    mod
        Module in quantize/dequantize form (what ``tvm_vitq.quantize`` returns).
    dump_ir
        Folder that receives the module's text after every phase.

    Raises
    ------
    VitqError
        If an operator has no integer lowering, a float is left, or a range cannot be proved.
    """
    _dump(mod, dump_ir, "1_quantized")
    mod = _dump(LowerToInteger()(mod), dump_ir, "2_integer")
    mod = _dump(FuseEpilogues()(mod), dump_ir, "3_fused")
    check_integer_only(mod)
    check_ranges(mod)
    # A caller of main_codes may pass any code of the input's dtype, not only quantized ones.
    check_ranges(SplitBoundary()(mod))
    return mod


def build_passes(isa: ISA, schedules: Schedules | None = None) -> list[tvm.transform.Pass]:
    """Return the passes from the integer dialect to a VM-ready module for one instruction set.

    Parameters
    ----------
    isa
        Instruction set.
    schedules
        Records of tuning; None takes those that ship with the package.
    """
    schedules = schedules or Schedules.shipped(isa)
    return [
        *kernel_passes(isa, schedules),
        *([GroupKernels(schedules)] if isa.gpu else []),
        ApplySchedules(isa, schedules),
        check_integer_only_tir(),
        *([check_launches()] if isa.gpu else []),
        *machine_passes(isa),
    ]


def _views() -> list[tvm.transform.Pass]:
    """Return the passes that leave no kernel of a reshape."""
    return [relax.transform.RewriteDataflowReshape(), relax.transform.DeadCodeElimination()]


def kernel_passes(isa: ISA, schedules: Schedules) -> list[tvm.transform.Pass]:
    """Return the passes from the integer dialect to kernels that are not scheduled yet."""
    return [
        # Integer dialect to kernels. Split first: packing relies on the ranges of main_codes, whose
        # callers may pass any code of the input's dtype.
        SplitBoundary(),
        HoistSlices(),
        PackWeights(isa, schedules),
        FoldLayout(isa),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        *(_views() if isa.gpu else []),
    ]


def machine_passes(isa: ISA) -> list[tvm.transform.Pass]:
    """Return the passes from scheduled kernels to a module that the virtual machine can run."""
    return [
        *_views(),
        TrustKernels(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        *([CaptureGraph()] if isa.gpu else []),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]


def vitq_pipeline(target: tvm.target.Target | None = None) -> tvm.transform.Pass:
    """Return the pipeline ``vitq``: quantize/dequantize form to a VM-ready integer module."""

    @tvm.transform.module_pass(opt_level=0, name="vitq")
    def _pipeline(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        where = target or tvm.target.Target.current(allow_none=False)
        with where:
            return tvm.transform.Sequential(build_passes(isa_for(where)))(lower(mod))

    return _pipeline
