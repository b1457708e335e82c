"""A process that builds kernels, or runs them: ``python -m tvm_vitq.tuning.worker build|run SPEC``.

Whatever a candidate does (compile for ever, crash, hang), only this process suffers, and
:class:`~tvm_vitq.tuning.child.Child` starts another. Requests and replies are one JSON document a
line; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .clock import Clock, clock_of, gpu_peak

__all__ = ["CHECKS", "Loaded", "build", "main", "read_arguments"]

CHECKS = 2
"""Sets of inputs that a kernel's output is compared on."""
_WEIGHT_BYTES = 6 << 20
_MOST_COPIES = 24


def build(folder: Path, point: dict[str, Any], out: Path, target: Any) -> None:
    """Build the kernel of a point: ``out/kernel.so``, ``out/constants.npz``.

    Parameters
    ----------
    folder
        Of the job.
    point, out
        The point, and the folder to make.
    target
        TVM's target.
    """
    import tvm

    from schedules.cuda.compile import cuda_build
    from schedules.isa import architecture_of, isa_for
    from schedules.space import space_of
    from tvm_vitq.artifact.toolchain import compiler
    from tvm_vitq.tuning.extract import Job, kernel_of

    job, isa = Job.load(folder), isa_for(target)
    func, arguments = kernel_of(job, point, isa)
    out.mkdir(parents=True, exist_ok=True)
    constants = {str(i): value for i, value in enumerate(arguments) if value is not None}
    np.savez(out / "constants.npz", **constants)
    func = func.with_attr("global_symbol", "main")
    path, linker = str(out / "kernel.so"), compiler(architecture_of(target))
    if target.kind.name != "cuda":
        tvm.compile(func, target=target).export_library(path, cc=linker)
        return
    with target, cuda_build(target) as made:
        library = tvm.compile(tvm.IRModule({"main": func}), target=target)
        library.export_library(path, cc=linker, fpack_imports=made.pack)
    # The default is what compile takes, whatever it spills.
    other = point != space_of(job.task, isa).default  # type: ignore[union-attr]
    if other and any(used.spills or used.serialized for used in made.resources.values()):
        raise ValueError("ptxas spills registers, or has products wait for each other")


def read_arguments(
    job: Path, kernel: Path, check: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return a built kernel's arguments, in order, and what the results must be."""
    with np.load(kernel / "constants.npz") as held:
        constants = {int(name): held[name] for name in held.files}
    with np.load(job / f"inputs{check}.npz") as held:
        inputs = [held[name] for name in held.files]
    given, arguments = iter(inputs), []
    for i in range(len(constants) + len(inputs)):
        arguments.append(constants[i] if i in constants else next(given))
    with np.load(job / f"expected{check}.npz") as held:
        return arguments, [held[name] for name in held.files]


class Loaded:
    """A kernel on this machine, ready to be timed.

    Parameters
    ----------
    job, kernel
        Folders of the job and of the built kernel.
    clock
        The device that runs it, and how it is timed there.

    In a model, other layers' weights pass through the caches between two calls of a layer. So the
    constants are held many times, and calls take one copy after the other.
    """

    def __init__(self, job: Path, kernel: Path, clock: Clock) -> None:
        import tvm

        self.clock = clock
        device = clock.device
        self.run = tvm.runtime.load_module(str(kernel / "kernel.so"))["main"]
        self.sets: list[list[Any]] = []
        self.wrong = 0
        for check in range(CHECKS):
            arguments, expected = read_arguments(job, kernel, check)
            results = [tvm.runtime.tensor(np.full_like(value, 85), device) for value in expected]
            tensors = [tvm.runtime.tensor(value, device) for value in arguments]
            self.run(*tensors, *results)
            self.wrong += sum(int((result.numpy() != value).sum())
                              for result, value in zip(results, expected, strict=True))
        with np.load(kernel / "constants.npz") as held:
            constants = {int(name): held[name] for name in held.files}
        size = sum(value.nbytes for value in constants.values()) or _WEIGHT_BYTES
        for _ in range(max(1, min(_MOST_COPIES, _WEIGHT_BYTES // size))):
            copies = [tvm.runtime.tensor(constants[i], device) if i in constants else tensor
                      for i, tensor in enumerate(tensors)]
            self.sets.append([*copies, *results])
        self.seconds, _ = self.sample(1)

    def sample(self, calls: int) -> tuple[float, float]:
        """Return seconds a call, and seconds of processor time in one of wall time."""
        return self.clock.sample(self, calls)


def _compare(
    base: Loaded, other: Loaded, rounds: int, threads: int, least: float = 4e-4
) -> dict[str, Any]:
    """Time two kernels turn about; samples that lost the processor are taken again, if they may."""
    pairs: list[list[float]] = []
    disturbed = 0
    calls = max(1, min(2000, int(least / min(base.seconds, other.seconds)) + 1))
    while len(pairs) < rounds and disturbed <= 2 * rounds:
        order = [base, other] if (len(pairs) + disturbed) % 2 else [other, base]
        taken = {id(kernel): kernel.sample(calls) for kernel in order}
        busy = min(share for _, share in taken.values())
        if threads == 1 and busy < 0.97:
            disturbed += 1
            continue
        pairs.append([taken[id(base)][0], taken[id(other)][0]])
    return {"pairs": pairs, "disturbed": disturbed}


def _peak(name: str, chain: int, target: Any) -> float | None:
    """Return the rate of a dot sequence in GMAC/s, None where there is no measure of it."""
    if target.kind.name == "cuda":
        return gpu_peak(name)
    from schedules.isa import isa_for
    from schedules.x86.intrinsics import DOTS
    from tvm_vitq.bench.peaks import register_peak

    if name not in DOTS:
        return None
    return register_peak(name, target, isa_for(target).registers, chain, seconds=0.1)


def _serve(mode: str, spec: dict[str, Any], say: Callable[[Any], None]) -> None:
    from schedules.isa import resolve_target

    target = resolve_target(spec["target"], threads=spec["threads"])
    clock = clock_of(target) if mode == "run" else None
    held: dict[str, Loaded] = {}
    say({"value": "ready"})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if mode == "build":
                build(Path(request["job"]), request["point"], Path(request["out"]), target)
                say({"value": None})
            elif request["do"] == "peak":
                say({"value": _peak(request["dot"], request["chain"], target)})
            elif request["do"] == "load":
                assert clock is not None
                loaded = Loaded(Path(request["job"]), Path(request["kernel"]), clock)
                if not loaded.wrong:
                    held[request["kernel"]] = loaded
                say({"value": loaded.wrong})
            elif request["do"] == "drop":
                held.pop(request["kernel"], None)
                say({"value": None})
            else:
                base, other = held[request["base"]], held[request["other"]]
                say({"value": _compare(base, other, request["rounds"], spec["threads"])})
        except Exception as why:  # of one candidate
            lines = [text.strip() for text in str(why).splitlines() if text.strip()]
            # What a kernel does to a GPU's context stays: the next one needs another process.
            ends = mode == "run" and target.kind.name == "cuda"
            say({"error": f"{type(why).__name__}: {(lines or ['no message'])[-1][:200]}",
                 "ends": ends})  # fmt: skip
            if ends:
                return


def main(arguments: list[str] | None = None) -> int:
    """Serve until standard input ends."""
    mode, spec_text = arguments if arguments is not None else sys.argv[1:]
    spec = json.loads(spec_text)
    if spec["cores"]:
        os.sched_setaffinity(0, spec["cores"])
    if mode == "build":
        os.nice(10)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: Any) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    _serve(mode, spec, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
