"""Run everything between the input's and the output's kernels as one recorded CUDA graph.

TVM's ``RewriteCUDAGraph`` moves all storage that is planned, and all launches that read and write
nothing but such storage and constants, into functions that are recorded when they first run. What
stays outside are the kernels that read the caller's tensor or write the one returned to it. The
pass does so only where it is told to by its configuration; that is what this one adds.
"""

from __future__ import annotations

import tvm
from tvm import relax

__all__ = ["CaptureGraph"]


@tvm.transform.module_pass(opt_level=0, name="vitq.CaptureGraph")
class CaptureGraph:
    """Apply ``RewriteCUDAGraph``; the module's memory must be planned, and its allocations kept."""

    def transform_module(
        self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite every Relax function of the module."""
        with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
            return relax.transform.RewriteCUDAGraph()(mod)
