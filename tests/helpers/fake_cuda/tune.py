"""Tune a quantized module's kernels on the fake driver, in a process of its own.

Arguments: the module, the folder of records. Prints one line of JSON. The folder of the driver must
be in ``LD_LIBRARY_PATH`` when the process starts. Everything is the tuner's own but that kernels
are built and run in this process, where the driver is told which emulator a library's kernels have.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ARCH, TRIALS = "sm_90", 3


def main(module: Path, records: Path) -> dict[str, Any]:
    sys.modules["torch"] = None  # type: ignore[assignment]  # it would bring NVIDIA's own libcudart
    driver = ctypes.CDLL("libcudart.so.13", ctypes.RTLD_GLOBAL)
    driver.fake_problems.restype = ctypes.c_char_p
    import tvm

    from relay_passes.pipeline import lower
    from schedules.cuda.emulate import Emulator
    from schedules.isa import isa_for, resolve_target
    from schedules.records import RecordFile
    from tvm_vitq.artifact.metadata import describe_target
    from tvm_vitq.compiler import foreign
    from tvm_vitq.saved import load_quantized
    from tvm_vitq.tuning import worker
    from tvm_vitq.tuning.clock import clock_of
    from tvm_vitq.tuning.extract import extract, kernel_of
    from tvm_vitq.tuning.job import describe
    from tvm_vitq.tuning.runner import Comparison, KernelFault
    from tvm_vitq.tuning.tune import Limits, Tuning

    target = resolve_target(ARCH)
    isa = isa_for(target)
    assert foreign(describe_target(ARCH, target)) == ""
    emulators: dict[Path, Emulator] = {}

    class Builder:
        def build(self, job: Any, points: Any, folder: Path) -> list[Path | str]:
            saved, made = job.save(folder / "job"), []
            for number, point in enumerate(points):
                out = folder / f"kernel{number}"
                worker.build(saved, point, out, target)
                func, _ = kernel_of(job, point, isa)
                emulators[out] = Emulator({"main": func}, target)
                made.append(out)
            return made

        def close(self) -> None:
            pass

    class Runner:
        where = "fake"

        def __init__(self) -> None:
            self.clock = clock_of(target)
            self.held: dict[Path, worker.Loaded] = {}

        def load(self, job: Any, kernel: Path) -> worker.Loaded:
            if kernel not in self.held:
                emulator = emulators[kernel]
                driver.fake_open(emulator._library._name.encode())
                for one in emulator._kernels.values():
                    driver.fake_kernel(one.name.encode(), len(one.parameters))
                self.held[kernel] = worker.Loaded(job.save(kernel.parent), kernel, self.clock)
                if self.held[kernel].wrong:
                    raise KernelFault(f"{self.held[kernel].wrong} wrong outputs")
            return self.held[kernel]

        def compare(self, job: Any, base: Path, other: Path, rounds: int) -> Comparison:
            loaded = [self.load(job, base), self.load(job, other)]
            pairs = np.array(worker._compare(*loaded, 4, 1, least=2e-5)["pairs"])
            return Comparison(pairs[:, 0], pairs[:, 1])

        def peak(self, dot: str, chain: int) -> float | None:
            return worker._peak(dot, chain, target)

        def close(self) -> None:
            self.held.clear()

    jobs = extract(lower(load_quantized(module)), isa)
    chosen = [next(job for job in jobs if job.task.kind == kind)
              for kind in ("gpu_linear", "gpu_attention")]  # fmt: skip
    tuning = Tuning(chosen, isa, RecordFile.of(records, isa), Builder(), Limits(TRIALS, batch=3))
    tuning.run([Runner])
    return {**describe(tuning), "all": [str(job.task) for job in jobs],
            "calls": [job.calls for job in jobs],
            "problems": driver.fake_problems().decode().split("\n"),
            "device": str(tvm.cuda(0).compute_version)}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
