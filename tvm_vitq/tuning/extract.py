"""The tasks of a model: its distinct kernels, how often each is called, and what it is called with.

A :class:`Job` is a task with one of its calls: the operator with its real weights and attributes,
and the proved intervals of its activations. Inputs are drawn from those, at random and from their
ends, and the reference interpreter's arithmetic says what the kernel must make of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from relay_passes.check_ranges import code_intervals
from relay_passes.dialect.registry import Interval, constant, constant_of, is_vitq_call
from relay_passes.fold_layout import FoldLayout
from relay_passes.hoist_slices import HoistSlices
from relay_passes.pack import LINEAR, PackWeights, pack_linear, plan_of
from relay_passes.split_boundary import SplitBoundary
from schedules.apply import schedule_function, task_of
from schedules.isa import ISA
from schedules.records import Schedules
from schedules.space import space_of
from schedules.task import Point, Task
from tvm_vitq.reference import arithmetic, nonlinear
from tvm_vitq.reference.registry import REFERENCE, expect

__all__ = ["Job", "extract", "kernel_of"]

assert arithmetic and nonlinear  # they enter their operators in REFERENCE


@dataclass
class Job:
    """A task and one call of it.

    Parameters
    ----------
    task
        The task.
    mod
        Module whose function ``main`` is the call; its parameters are the activations.
    intervals
        Proved (lowest, highest, largest sum of a row or None) of each parameter.
    calls
        How often the model calls the task.
    """

    task: Task
    mod: tvm.IRModule
    intervals: list[tuple[int, int, int | None]]
    calls: int = 1
    _folder: Path | None = field(default=None, repr=False)

    @property
    def call(self) -> relax.Call:
        """The call."""
        call: relax.Call = self.mod["main"].body.blocks[0].bindings[0].value
        return call

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a call, 0 if it is no matmul."""
        return int(np.prod(self.task.shape)) if self.task.kind in ("linear", "matmul") else 0

    @property
    def guess(self) -> float:
        """Roughly the seconds that its calls take: which tasks are looked at first."""
        work = self.macs / 1e11 if self.macs else float(np.prod(self.task.shape)) * 4e-10
        return self.calls * work

    def inputs(self, seed: int, extreme: bool) -> list[np.ndarray]:
        """Draw activations: any codes of their intervals, or mostly the ends."""
        rng = np.random.default_rng(seed)
        return [_draw(rng, param.ty, interval, extreme)
                for param, interval in zip(self.mod["main"].params, self.intervals, strict=True)]

    def expected(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return what the reference makes of activations: each result."""
        call, given = self.call, iter(inputs)
        args = [next(given) if isinstance(arg, relax.Var) else constant(arg) for arg in call.args]
        attrs = call.attrs
        for i, key in enumerate(("a_axes", "b_axes")):
            if key in attrs:
                args[i] = args[i].transpose([int(axis) for axis in attrs[key]])
        if call.op.name == "vitq.layer_norm" and len(args) == 4:
            args = [args[0][args[3]], *args[1:3]]  # a table of rows
        value = REFERENCE[call.op.name](args, attrs)
        if "out_axes" in attrs:
            value = value.transpose([int(axis) for axis in attrs["out_axes"]])
        dtype = str(call.ty.dtype)
        return [np.ascontiguousarray(expect(value, dtype, "result").astype(dtype))]

    def save(self, folder: Path) -> Path:
        """Write all that building and checking a kernel takes into a folder; once is enough."""
        if self._folder is not None:
            return self._folder
        folder.mkdir(parents=True, exist_ok=True)
        for number, extreme in enumerate((False, True)):
            inputs = self.inputs(number, extreme)
            np.savez(folder / f"inputs{number}.npz", *inputs)
            np.savez(folder / f"expected{number}.npz", *self.expected(inputs))
        document = {"kind": self.task.kind, "task": self.task.text, "intervals": self.intervals,
                    "module": tvm.ir.save_json(self.mod)}  # fmt: skip
        (folder / "job.json").write_text(json.dumps(document), encoding="utf-8")
        self._folder = folder
        return folder

    @staticmethod
    def load(folder: Path) -> Job:
        """Read what :meth:`save` wrote."""
        found = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        intervals = [(lo, hi, row_sum) for lo, hi, row_sum in found["intervals"]]
        task, kind = Task(found["kind"], found["task"]), Job
        if task.gpu:
            from .extract_gpu import GpuJob as kind
        return kind(task, tvm.ir.load_json(found["module"]), intervals, 1, folder)


def _draw(
    rng: np.random.Generator, ty: Any, interval: tuple[int, int, int | None], extreme: bool
) -> np.ndarray:
    lo, hi, row_sum = interval
    shape = [int(extent) for extent in ty.shape.values]
    if row_sum is not None:
        return _rows_of_sum(rng, shape, min(row_sum, 2**31 - 1), hi, extreme).astype(str(ty.dtype))
    if not extreme:
        return rng.integers(lo, hi, shape, endpoint=True, dtype=np.int64).astype(str(ty.dtype))
    value = rng.choice(np.array([lo, hi]), shape)
    rows = value.reshape(-1, shape[-1])
    rows[::5], rows[1::5] = lo, hi  # whole rows of one code
    return value.astype(str(ty.dtype))


def _rows_of_sum(
    rng: np.random.Generator, shape: list[int], total: int, most: int, extreme: bool
) -> np.ndarray:
    """Draw rows of non-negative codes that sum to at most ``total``."""
    if extreme:
        value = np.zeros(shape, np.int64).reshape(-1, shape[-1])
        value[np.arange(len(value)), rng.integers(0, shape[-1], len(value))] = min(total, most)
        return value.reshape(shape)
    parts = rng.exponential(size=shape)
    parts /= parts.sum(axis=-1, keepdims=True)
    return np.minimum(np.floor(parts * total).astype(np.int64), most)


def _alone(call: relax.Call, intervals: Any, isa: ISA) -> Job | None:
    """Return the job of one call, None if it has no space or is made of what is not known."""
    params: list[relax.Var] = []
    found: list[tuple[int, int, int | None]] = []
    args: list[relax.Expr] = []
    for arg in call.args:
        if not isinstance(arg, relax.Var):
            if constant_of(arg) is None:
                return None
            args.append(arg)
            continue
        interval = intervals.get(arg)
        if not isinstance(interval, Interval):
            return None
        param = relax.Var(f"x{len(params)}", arg.ty)
        params.append(param)
        args.append(param)
        found.append((interval.lo, interval.hi, interval.row_sum))
    return job_of(relax.Call(call.op, args, call.attrs), params, found, isa)


def job_of(
    call: relax.Call, params: list[relax.Var], intervals: list[tuple[int, int, int | None]],
    isa: ISA, calls: int = 1,
) -> Job | None:  # fmt: skip
    """Return the job of an operator of the dialect, None if nothing is tuned there.

    Parameters
    ----------
    call
        Of variables and constants.
    params, intervals
        The variables, in order, and the proved interval of each, as in :class:`Job`.
    isa
        Instruction set.
    calls
        How often it is called.
    """
    mod = _module(params, call)
    job = Job(Task("", ""), mod, intervals, calls)
    if call.op.name.removeprefix("vitq.") in LINEAR:
        lookup = Schedules(isa)
        lo, hi, _ = intervals[0]
        plan_of(job.call, isa, (lo, hi), lookup)
        task = next(iter(lookup.misses.values()), None)
    else:
        func, _ = _prim_func(mod)
        task = None if func is None else task_of(func)
    if task is None or space_of(task, isa) is None:
        return None
    job.task = task
    return job


def _module(params: list[relax.Var], call: relax.Call) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(call)
        bb.emit_func_output(out)
    return bb.get()


def _calls(func: relax.Function) -> list[relax.Call]:
    return [binding.value for block in func.body.blocks for binding in block.bindings
            if is_vitq_call(binding.value)]


def extract(integer: tvm.IRModule, isa: ISA) -> list[Job]:
    """Return the tasks of a module of the fused integer dialect, the longest first.

    Parameters
    ----------
    integer
        What :func:`relay_passes.pipeline.lower` returns.
    isa
        Instruction set of the target.
    """
    if isa.gpu:
        from .extract_gpu import extract_gpu

        return extract_gpu(integer, isa)
    found: dict[str, Job] = {}
    split = tvm.transform.Sequential([SplitBoundary(), HoistSlices()])(integer)
    folded = tvm.transform.Sequential([PackWeights(isa, Schedules(isa)), FoldLayout(isa)])(split)
    for main, linear in ((split["main_codes"], True), (folded["main_codes"], False)):
        intervals = code_intervals(main)
        for call in _calls(main):
            name = call.op.name.removeprefix("vitq.")
            if (name in LINEAR) is not linear or call.op.name not in REFERENCE:
                continue
            job = _alone(call, intervals, isa)
            if job is not None:
                known = found.setdefault(job.task.key, job)
                known.calls += known is not job
    return sorted(found.values(), key=lambda job: -job.guess)


def _prim_func(mod: tvm.IRModule) -> tuple[tirx.PrimFunc | None, list[Any]]:
    """Legalise a module of one call; return its PrimFunc and arguments (None: an activation)."""
    legal = relax.transform.LegalizeOps()(mod)
    calls = [binding.value for block in legal["main"].body.blocks for binding in block.bindings]
    (call,) = [value for value in calls if isinstance(value, relax.Call)]
    if call.op != tvm.ir.Op.get("relax.call_tir"):
        return None, []
    return legal[call.args[0]], [constant_of(arg) for arg in call.args[1].fields]


def kernel_of(job: Job, point: Point, isa: ISA) -> tuple[tirx.PrimFunc, list[Any]]:
    """Return the scheduled PrimFunc of a point, and its arguments without the result.

    An argument is an array, or None where an activation goes, in order. Results follow them.
    """
    if isa.gpu:
        from .extract_gpu import gpu_kernel_of

        return gpu_kernel_of(job, point, isa)
    schedules, mod = Schedules.fixed(isa, job.task, point), job.mod
    if job.task.kind == "linear":
        lo, hi, _ = job.intervals[0]
        plan = plan_of(job.call, isa, (lo, hi), schedules)
        assert plan is not None
        mod = _module(list(mod["main"].params), pack_linear(job.call, plan))
    func, arguments = _prim_func(mod)
    assert func is not None
    return schedule_function(func, isa, schedules=schedules), arguments
