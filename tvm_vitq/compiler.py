"""From a quantized module to an artefact: lower, prove, record golden vectors, build, check, write.

The golden logits come from the bit-exact reference interpreter, never from the compiled code, and
the compiled code is checked against them before anything is written where the user asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relay_passes.errors import VitqError
from schedules.host import host_architecture
from tvm_vitq.artifact.foreign import ForeignArtifact, not_replayed
from tvm_vitq.artifact.gpu import is_gpu, reason_not_here
from tvm_vitq.artifact.load import Artifact, load, missing_features

if TYPE_CHECKING:
    import tvm

__all__ = ["compile_module", "foreign", "golden_codes", "reference_logits", "resolve"]

Phase = Callable[[str], AbstractContextManager[Any]]

_GOLDEN_VECTORS = 2


def resolve(name: str | Any) -> tuple[str, Any]:
    """Return the name and the TVM target of a target's name, or of a ``tvm.target.Target``.

    Raises
    ------
    VitqError
        If no such target is known, or there is no compiler to link with for its architecture.
    """
    import tvm

    from schedules.isa import architecture_of, isa_for, resolve_target
    from tvm_vitq.artifact.toolchain import compiler

    if isinstance(name, tvm.target.Target):
        target = name
        if target.kind.name not in ("llvm", "cuda"):
            raise VitqError(
                f"target {target.kind.name!r} is not supported; use an llvm (CPU) or cuda target"
            )
    else:
        try:
            target = resolve_target(str(name))
        except ValueError as why:
            raise VitqError(str(why).splitlines()[0]) from why
    try:
        isa_for(target)
    except ValueError as why:
        raise VitqError(str(why)) from why
    compiler(architecture_of(target))
    return str(name), target


def foreign(description: dict[str, Any]) -> str:
    """Return why this machine cannot run a target's code, "" if it can.

    Parameters
    ----------
    description
        What ``describe_target`` gives.
    """
    host = host_architecture()
    if description["architecture"] != host:
        return f"the code is for {description['architecture']} and this machine is {host}"
    missing = missing_features(description["features"])
    if missing:
        return f"the code needs {', '.join(missing)}, which this processor lacks"
    return reason_not_here(description) if is_gpu(description) else ""


class _EnoughError(Exception):
    """Ends a run of the interpreter once the input codes are known."""


def golden_codes(integer: tvm.IRModule, images: np.ndarray | None, count: int = 2) -> np.ndarray:
    """Return input codes for the golden vectors.

    Parameters
    ----------
    integer
        Module of the fused integer dialect.
    images
        ``[V, ...]`` inputs in the model's input form, whose first ``count`` are taken; None makes
        ``count`` inputs of uniformly distributed codes.
    count
        Number of vectors.

    Returns
    -------
    numpy.ndarray
        ``[V, ...]`` codes of the integer function's input.

    Raises
    ------
    VitqError
        If the images have another shape or dtype than the model's input, or are not finite.
    """
    from tvm_vitq.artifact.golden import on_grid
    from tvm_vitq.artifact.metadata import input_and_output
    from tvm_vitq.reference.interpreter import Interpreter

    codes, _ = input_and_output(integer)
    limits = codes["qmin"], codes["qmax"]
    if images is None:
        rng = np.random.default_rng(0)
        shape = (count, *codes["shape"][1:])
        drawn = rng.integers(codes["qmin"], codes["qmax"] + 1, shape).astype(codes["dtype"])
        return on_grid(drawn, *limits)
    x = integer["main"].params[0]
    dims, dtype = [int(v) for v in x.ty.shape.values], str(x.ty.dtype)
    images = np.asarray(images)[:count]
    if list(images.shape[1:]) != dims[1:] or len(images) == 0:
        raise VitqError(
            f"golden inputs have shape {list(images.shape)}; the model takes {['V', *dims[1:]]}"
        )
    if dtype == "uint8":
        if images.dtype != np.uint8:
            raise VitqError(f"golden inputs are {images.dtype}; the model takes uint8")
        return images
    if not np.isfinite(images).all():
        raise VitqError("golden inputs have NaN or Inf; give finite images")
    found: list[np.ndarray] = []

    def observe(_name: str, operator: str, value: np.ndarray) -> None:
        if operator == "vitq.quantize":
            found.append(value)
            raise _EnoughError

    run = Interpreter(integer)
    for start in range(0, len(images), dims[0]):
        part = images[start : start + dims[0]].astype(dtype)
        part = np.concatenate([part, np.repeat(part[-1:], dims[0] - len(part), axis=0)])
        try:
            run(part, observe)
        except _EnoughError:
            continue
    return on_grid(np.concatenate(found)[: len(images)], *limits)


def reference_logits(split: tvm.IRModule, codes: np.ndarray, batch: int) -> np.ndarray:
    """Return what the reference interpreter makes of input codes: logit codes ``[V, classes]``."""
    from tvm_vitq.reference.interpreter import run_integer

    missing = -len(codes) % batch
    padded = np.concatenate([codes, np.repeat(codes[-1:], missing, axis=0)])
    return run_integer(split, padded, function="main_codes")[: len(codes)]


def compile_module(
    mod: tvm.IRModule,
    target: str | Any = "native",
    output: str | Path | None = None,
    golden: np.ndarray | None = None,
    *,
    labels: Sequence[str] | None = None,
    dump_ir: str | Path | None = None,
    phase: Phase | None = None,
    verify_with: str | None = None,
    reference: tvm.IRModule | None = None,
    records: str | Path | None = None,
    threads: int = 1,
) -> Artifact | ForeignArtifact:
    """Compile a quantized module to one shared library, prove it and load it.

    Code that this machine can run is compared with the reference on the golden vectors before
    anything is written. Other code is so with ``verify_with``; without it the vectors are stored
    only, and report and metadata (``golden.replayed_with``) say so.

    Parameters
    ----------
    mod
        Module in quantize/dequantize form: what ``tvm_vitq.quantize`` returned or saved.
    target
        ``"native"``, ``"aarch64"``, ``"aarch64+dotprod"``, ``"aarch64+i8mm"``, a processor name of
        LLVM's (``"x86-64-v3"``, ``"cortex-a76"``, …), ``"cuda"`` or a GPU's architecture
        (``"sm_75"`` … ``"sm_90a"``), or a ``tvm.target.Target``.
    output
        The file to write, usually ``….so``. It is replaced only when everything has succeeded.
    golden
        Inputs ``[V, ...]`` in the model's input form; the first two become the golden vectors. None
        makes two inputs of random codes.
    labels
        Names of the classes, to be stored in the artefact.
    dump_ir
        Folder that receives the module's text after every phase.
    phase
        Called with a phase's name, returns the context that the phase runs in (for progress).
    verify_with
        Emulator that runs the target's code here, for example ``"qemu-aarch64"``; ``"emulator"``
        for a GPU's kernels.
    reference
        The same quantized network for a smaller batch. The reference interpreter, which takes time
        in proportion to the batch, then runs this one.
    records
        Folder of records of tuning (``tvm-vitq tune``), which come before those of the package, or
        ``"none"`` for the default rules alone. The artefact's metadata says under ``schedules``
        how many tasks were and were not in them.
    threads
        Threads that will run the kernels: records of as many are preferred.

    Returns
    -------
    Artifact or ForeignArtifact
        The loaded artefact; for code that cannot run here, its description.

    Raises
    ------
    VitqError
        If the module cannot be lowered, is not integer-only, has a range that cannot be proved, the
        target is unknown, the output cannot be written, or compiled code and reference differ.
    """
    from tvm_vitq.artifact.emulate import emulated_verify, find_emulator
    from tvm_vitq.artifact.output import atomic_output, check_output

    if output is None:
        raise VitqError("compile needs the file to write: output='model.so'")
    if not hasattr(mod, "functions") or "main" not in [v.name_hint for v in mod.get_global_vars()]:
        raise VitqError(
            "compile needs an IRModule with a function main, as tvm_vitq.quantize returns"
        )
    output = check_output(output)
    name, tvm_target = resolve(target)
    if verify_with is not None:
        find_emulator(verify_with, tvm_target.kind.name == "cuda")
    if dump_ir is not None and Path(dump_ir).exists() and not Path(dump_ir).is_dir():
        raise VitqError(f"cannot write the IR to {dump_ir}: it is a file; name a folder")

    import tvm

    from relay_passes.pipeline import build_passes, lower
    from relay_passes.split_boundary import SplitBoundary
    from schedules.isa import isa_for
    from tvm_vitq.artifact.build import export
    from tvm_vitq.artifact.gpu_build import compile_gpu
    from tvm_vitq.artifact.gpu_kernels import Launches, describe_gpu_kernels
    from tvm_vitq.artifact.kernels import MatmulPlans, describe_kernels
    from tvm_vitq.artifact.metadata import analyse, describe, describe_target
    from tvm_vitq.records import describe_schedules, open_schedules

    schedules = open_schedules(isa_for(tvm_target), records, threads)
    during = phase or (lambda _name: nullcontext())
    with during("lower to integers and prove"):
        integer = lower(mod, dump_ir=dump_ir)
        analysis, bounds = analyse(integer)
        description = describe_target(name, tvm_target)
        names = list(labels) if labels is not None else None
        metadata = describe(mod, integer, description, analysis, names)
        elsewhere = foreign(description)
        replayed = verify_with or (None if elsewhere else "this machine")
        metadata["golden"] = {"replayed_with": replayed}
    with during("golden vectors by the reference interpreter"):
        told = integer if reference is None else lower(reference)
        codes = golden_codes(told, golden, _GOLDEN_VECTORS)
        batch = int(told["main"].params[0].ty.shape.values[0])
        split = tvm.transform.Sequential([SplitBoundary()])(told)
        logits = reference_logits(split, codes, batch)
    with atomic_output(output) as draft:
        with during("build"), tvm_target:
            plans, launches, gpu = MatmulPlans(), Launches(), None
            with tvm.transform.PassContext(instruments=[plans, launches]):
                passes = build_passes(isa_for(tvm_target), schedules)
                kernels = tvm.transform.Sequential(passes)(integer)
            metadata["schedules"] = describe_schedules(schedules)
            if is_gpu(description):
                gpu = compile_gpu(kernels, tvm_target)
                metadata["kernels"] = describe_gpu_kernels(kernels, gpu.build.resources,
                                                           plans.plans, gpu.products)
                metadata["gpu"] = {"launches": launches.counts, "float_boundary": gpu.boundary}
            else:
                metadata["kernels"] = describe_kernels(kernels, plans.plans)
            if dump_ir is not None:
                (Path(dump_ir) / "4_kernels.py").write_text(kernels.script())
            export(kernels, tvm_target, draft, metadata, bounds, codes, logits, gpu)
        with during("compare with the reference"):
            if verify_with is not None:
                result = emulated_verify(draft, verify_with)
            elif elsewhere:
                result = not_replayed(len(codes), elsewhere)
            else:
                result = load(draft).verify()
        if result["equal"] is False:
            raise VitqError(
                f"compiled code and reference differ in {result['logits_different']} of "
                f"{result['logits_compared']} logits: a defect of tvm-vitq, nothing was written"
            )
    return ForeignArtifact(output, metadata, result, elsewhere) if elsewhere else load(output)
