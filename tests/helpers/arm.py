"""Cross-compiling for AArch64 and running under qemu, for tests; skips say what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tvm

from tests.helpers.kernels import Case
from tvm_vitq.artifact.emulate import Emulator

COMPILER = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"
MISSING = [name for name in (COMPILER, QEMU) if shutil.which(name) is None]

needs_compiler = pytest.mark.skipif(
    COMPILER in MISSING, reason=f"no {COMPILER} (Debian: g++-aarch64-linux-gnu)")
needs_qemu = pytest.mark.skipif(
    bool(MISSING),
    reason=f"no {' and no '.join(MISSING)} (Debian: g++-aarch64-linux-gnu, qemu-user)")

LEVELS = {
    "aarch64": f"{QEMU} -cpu cortex-a53",
    "aarch64+dotprod": f"{QEMU} -cpu neoverse-n1",
    "aarch64+i8mm": f"{QEMU} -cpu max",
}
"""Targets, each with the emulator of a processor that has no more than it needs."""


def emulator(build_once: Callable[..., Path], command: str) -> Emulator:
    """Return an emulator; the program that runs libraries is built once per test run."""
    folder = build_once("replay", lambda path: Emulator(QEMU, "aarch64", path) and None)
    return Emulator(command, "aarch64", folder)


def different(cases: Mapping[str, Case], folder: Path, runner: Emulator) -> dict[str, int]:
    """Run kernels in one library; return how many elements of each are not as expected."""
    functions = {name: case.func.with_attr("global_symbol", name) for name, case in cases.items()}
    target = next(iter(cases.values())).target
    path = folder / "kernels.so"
    built = tvm.compile(tvm.IRModule(functions), target=target)
    built.export_library(str(path), cc=COMPILER)
    found = runner.call(path, [(name, case.values) for name, case in cases.items()])
    return {
        name: int(np.sum(result != case.expected))
        for (name, case), result in zip(cases.items(), found, strict=True)
    }
