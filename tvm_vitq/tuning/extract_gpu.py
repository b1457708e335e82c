"""The tasks of a model on a GPU: its launches of weight matmuls and attention.

A GPU's kernel may compute several operators, so a job's module has them all, legalised and not yet
scheduled. What the kernel must make of its inputs is what the operators' own definitions make of
them, compiled one by one for this machine's processor as plain loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from relay_passes.check_ranges import code_intervals
from relay_passes.dialect.registry import Interval, constant_of
from relay_passes.group_kernels import GroupKernels
from relay_passes.kernel_slices import kernel_slices
from relay_passes.pipeline import kernel_passes, machine_passes
from schedules.apply import ApplySchedules
from schedules.calling import PIPELINE
from schedules.isa import GENERIC, ISA, resolve_target
from schedules.records import Schedules
from schedules.task import Point

from .extract import Job

__all__ = ["GpuJob", "extract_gpu", "gpu_kernel_of"]


class GpuJob(Job):
    """A task of a GPU: its module's ``main`` calls PrimFuncs that are not scheduled."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a call."""
        products = int(np.prod(self.task.shape))
        return 2 * products if self.task.kind == "gpu_attention" else products

    def expected(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return what the operators' definitions make of activations."""
        target = resolve_target("native")
        passes = [ApplySchedules(GENERIC), *machine_passes(GENERIC)]
        with target:
            plain = tvm.transform.Sequential(passes)(self.mod)
            built = relax.build(plain, target, relax_pipeline=None, tir_pipeline=PIPELINE)
        machine = relax.VirtualMachine(built, tvm.cpu())
        found = machine["main"](*(tvm.runtime.tensor(value) for value in inputs))
        results = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
        return [value.numpy() for value in results]


def extract_gpu(integer: tvm.IRModule, isa: ISA) -> list[Job]:
    """Return the tasks of a module of the fused integer dialect, the longest first.

    Parameters
    ----------
    integer
        What :func:`relay_passes.pipeline.lower` returns.
    isa
        The GPU's.
    """
    passes = kernel_passes(isa, Schedules(isa))
    names = [str(one.info.name) for one in passes]
    legalise = names.index("LegalizeOps")
    dialect = tvm.transform.Sequential(passes[:legalise])(integer)
    known = {var.name: interval for var, interval in code_intervals(dialect["main_codes"]).items()}
    kernels = tvm.transform.Sequential(passes[legalise:])(dialect)
    jobs: dict[str, Job] = {}
    for mod, variables in kernel_slices(kernels, "main_codes"):
        intervals = [known.get(var.name) for var in variables]
        lookup = Schedules(isa)
        launches = _launches(_scheduled(mod, lookup))
        task = next(iter(lookup.misses.values()), None)
        known_ones = [interval for interval in intervals if isinstance(interval, Interval)]
        if task is None or len(launches) != 1 or len(known_ones) != len(intervals):
            continue
        if task.key in jobs:
            jobs[task.key].calls += 1
            continue
        ends = [(one.lo, one.hi, one.row_sum) for one in known_ones]
        jobs[task.key] = GpuJob(task, mod, ends)
    return sorted(jobs.values(), key=lambda job: -job.guess)


def _scheduled(mod: tvm.IRModule, schedules: Schedules) -> tvm.IRModule:
    passes = [GroupKernels(schedules), ApplySchedules(schedules.isa, schedules)]
    return tvm.transform.Sequential(passes)(mod)


def _launches(mod: tvm.IRModule) -> list[relax.Call]:
    return [binding.value for block in mod["main"].body.blocks for binding in block.bindings
            if isinstance(binding.value, relax.Call) and binding.value.op.name == "relax.call_tir"]


def gpu_kernel_of(job: Job, point: Point, isa: ISA) -> tuple[tirx.PrimFunc, list[Any]]:
    """Return the scheduled PrimFunc of a point, and its arguments without the results.

    Raises
    ------
    ValueError
        If the task takes more than one kernel, or an activation twice.
    """
    mod = _scheduled(job.mod, Schedules.fixed(isa, job.task, point))
    main, calls = mod["main"], _launches(mod)
    if len(calls) != 1:
        raise ValueError(f"{job.task} takes {len(calls)} kernels")
    arguments = list(calls[0].args[1].fields)
    given = [arg for arg in arguments if isinstance(arg, relax.Var)]
    if [arg.name for arg in given] != [param.name for param in main.params]:
        raise ValueError(f"{job.task} takes an activation more than once")
    func = mod[calls[0].args[0]]
    return func, [None if isinstance(arg, relax.Var) else constant_of(arg) for arg in arguments]
