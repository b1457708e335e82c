"""Make the records that ship with the package: tune the kernels of the usual models.

Run: ``python -m benchmarks.shipped DEIT_TINY.vitq [OTHER.vitq ...] --records DIR --minutes M``,
then ``tvm-vitq records prune DIR``, and copy the file into ``schedules/shipped``. The first module
is DeiT-Ti with its trained weights; which of its activations have 16 bits is what other sizes of it
(DeiT-S and -B; ViT-S and -B are the same) are taken to need, too: its tasks are widened to theirs.
Of the other modules the tasks are taken as they are, and once more with weights of the full range
of int8, as trained ones have, for which less is proved.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tvm import relax

from relay_passes.dialect.registry import constant_of
from relay_passes.pipeline import lower
from schedules.isa import ISA, isa_for, resolve_target
from schedules.records import RecordFile
from schedules.space import space_of
from tvm_vitq.bench.worker import cores
from tvm_vitq.cli.tune import task_table
from tvm_vitq.saved import load_quantized
from tvm_vitq.tuning.build import Builders
from tvm_vitq.tuning.extract import Job, extract, job_of
from tvm_vitq.tuning.job import processor
from tvm_vitq.tuning.runner import LocalRunner
from tvm_vitq.tuning.tune import Limits, Tuning

__all__ = ["full_range", "main", "widened"]

WIDTH, PATCH = 192, 768
"""DeiT-Ti's channels, and those of a patch's pixels (as many as its hidden ones)."""
SIZES = {"deit_small": 2, "deit_base": 4}


def _changed(job: Job, isa: ISA, shape: Any, constant: Any) -> Job | None:
    """Return a job whose activations' shapes and constants are others."""
    call = job.call
    params: list[relax.Var] = []
    args: list[relax.Expr] = []
    for arg in call.args:
        if isinstance(arg, relax.Var):
            old = [int(extent) for extent in arg.ty.shape.values]
            ty = relax.TensorType(shape(old), str(arg.ty.dtype))
            params.append(relax.Var(f"x{len(params)}", ty))
            args.append(params[-1])
        else:
            args.append(relax.const(constant(constant_of(arg))))
    return job_of(relax.Call(call.op, args, call.attrs), params, job.intervals, isa, job.calls)


def _uniform(job: Job, depth: int, columns: int) -> np.ndarray:
    """Return weight codes of the full range, or of one for which the sums fit 32 bits."""
    lo, hi, _ = job.intervals[0]
    most = min(127, (2**31 - 1) // (depth * max(-lo, hi)))
    rng = np.random.default_rng(depth * columns)
    return rng.integers(-most, most, (depth, columns), dtype=np.int8, endpoint=True)


def _weights(value: np.ndarray) -> bool:
    return value.ndim == 2 and value.dtype == np.int8


def full_range(job: Job, isa: ISA) -> Job | None:
    """Return a weight matmul's job with other weights; None for other jobs."""
    if job.task.kind != "linear":
        return None
    return _changed(job, isa, lambda shape: shape, lambda value: (
        _uniform(job, *value.shape) if _weights(value) else value))


def widened(job: Job, isa: ISA, factor: int) -> Job | None:
    """Return a job of DeiT-Ti for a network ``factor`` times as wide, with as many more heads.

    None for a LayerNorm, whose constants are made for its width.
    """
    if job.task.fields["op"] == "layer_norm":
        return None
    patches = job.task.kind == "linear" and job.task.shape[0] == 196

    def shape(old: list[int]) -> list[int]:
        if job.task.kind == "matmul" or job.task.fields["op"] == "softmax":
            return [old[0], *(e * factor if e == 3 else e for e in old[1:])]
        last = old[-1] if patches and old[-1] == PATCH else old[-1] * factor
        return [*old[:-1], last]

    def constant(value: np.ndarray) -> np.ndarray:
        if _weights(value):
            depth, columns = value.shape
            return _uniform(job, depth if patches else depth * factor,
                            columns if columns == 1000 else columns * factor)
        if value.ndim and value.shape[-1] % WIDTH == 0 and job.task.kind != "matmul":
            return np.concatenate([value] * factor, axis=-1)
        return value

    return _changed(job, isa, shape, constant)


def main() -> None:
    """Tune, and show what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--target", default="x86-64-v3")
    options = parser.parse_args()
    isa = isa_for(resolve_target(options.target))
    jobs: dict[str, Job] = {}

    def add(job: Job | None) -> None:
        if job is not None and space_of(job.task, isa) is not None:
            jobs.setdefault(job.task.key, job)

    for number, path in enumerate(options.models):
        for job in extract(lower(load_quantized(path)), isa):
            add(job)
            if number:
                add(full_range(job, isa))
            else:
                for factor in SIZES.values():
                    add(widened(job, isa, factor))
    ordered = sorted(jobs.values(), key=lambda job: -job.guess)
    options.records.mkdir(parents=True, exist_ok=True)
    builders = Builders(options.target, 2)
    limits = Limits(seconds=60 * options.minutes)
    tuning = Tuning(ordered, isa, RecordFile.of(options.records, isa),
                    builders, limits, host=processor())  # fmt: skip
    try:
        tuning.run([lambda: LocalRunner(options.target, 1, cores(1))])
    finally:
        builders.close()
        Console().print(task_table(tuning))
        print("\n".join(dict.fromkeys(tuning.notes)))


if __name__ == "__main__":
    main()
