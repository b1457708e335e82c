"""CUDA kernels run on the CPU, bit for bit, from the very text that nvcc would get.

:class:`Emulator` compiles the text with the host's C++ compiler; ``emulation.hpp`` says what a
thread, a warp and shared memory are there, and what is done so that a missing barrier or wait
shows. Needs a C++17 compiler (``$CXX``, ``c++``, ``g++`` or ``clang++``) and no CUDA.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

from .lower import Kernel, lower

__all__ = ["Counts", "EmulationError", "Emulator"]

HEADER = Path(__file__).with_name("emulation_cuda.hpp")

_FLAGS = ("-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden",
          "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-stack-protector", "-w")
_RUBBISH = "-ftrivial-auto-var-init=pattern"  # registers; compilers before GCC 12 lack it

_HEAD = re.compile(
    r'extern "C" __global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\(([^)]*)\) \{')
_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];")
_DEVICE = re.compile(r"^__device__ [^(]*?(\w+)\(", re.MULTILINE)


class EmulationError(RuntimeError):
    """A kernel did what no kernel may do; the message is one line that says what and where."""


class _Report(ctypes.Structure):
    _fields_ = [("problem", ctypes.c_int), ("line", ctypes.c_int), ("other", ctypes.c_int),
                ("argument", ctypes.c_int), ("offset", ctypes.c_long),
                ("block", ctypes.c_uint * 3), ("thread", ctypes.c_uint),
                ("mma", ctypes.c_long), ("ldmatrix", ctypes.c_long),
                ("conflicts", ctypes.c_long), ("barriers", ctypes.c_long),
                ("copied", ctypes.c_long)]


@dataclass(frozen=True)
class Counts:
    """What one launch did.

    Parameters
    ----------
    mma
        ``mma`` instructions (of 16 x 8 x 32), over all warps.
    ldmatrix
        ``ldmatrix`` instructions.
    conflicts
        Additional passes over shared memory that ``ldmatrix`` took for bank conflicts.
    barriers
        Barriers, over all blocks.
    copies
        Asynchronous copies, over all threads.
    """

    mma: int
    ldmatrix: int
    conflicts: int
    barriers: int
    copies: int


class Emulator:
    """Kernels compiled for this CPU.

    Parameters
    ----------
    funcs
        PrimFuncs by name, of one launch each, with buffers of constant shape as parameters.
    target
        A CUDA target; of its architecture only what the kernels' text asks of it is emulated.

    Raises
    ------
    ValueError
        There is no C++ compiler, it refuses the text, or a PrimFunc is not one kernel.
    """

    def __init__(self, funcs: Mapping[str, tirx.PrimFunc], target: tvm.target.Target) -> None:
        self._open(*lower(funcs, target), str(target.attrs["arch"]))

    @classmethod
    def of_source(cls, source: str, kernels: Mapping[str, Kernel], arch: str) -> Emulator:
        """Return an emulator of kernels as :func:`schedules.cuda.lower.lower` gives them."""
        emulator = cls.__new__(cls)
        emulator._open(source, kernels, arch)
        return emulator

    def _open(self, source: str, kernels: Mapping[str, Kernel], arch: str) -> None:
        self._kernels = dict(kernels)
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="vitq-emulate-")
        self._waits = "vitq_wait_for_launches();" in source
        self._text = _host_source(source, arch)
        self._library = _compile(self._text, Path(self._folder.name))
        self._library.vitq_launch.restype = ctypes.c_int

    def run(self, name: str, *arrays: np.ndarray, seed: int = 0) -> Counts:
        """Launch a kernel on arrays; those that it writes are written in place.

        Parameters
        ----------
        name
            The PrimFunc's name.
        arrays
            One C-contiguous array for each parameter, of its shape and dtype.
        seed
            Decides the order of threads, warps and blocks, and which copies are late.

        Raises
        ------
        ValueError
            An array does not fit its parameter.
        EmulationError
            The kernel accesses memory that is not its own, waits for threads that do not come, …
        """
        expected = self._kernels[name].arguments
        if len(arrays) != len(expected):
            raise ValueError(f"{name} takes {len(expected)} arrays, not {len(arrays)}")
        for array, buffer in zip(arrays, expected, strict=True):
            if array.shape != buffer.shape or str(array.dtype) != buffer.dtype:
                raise ValueError(f"{name}: {buffer.name} is {buffer.dtype} {buffer.shape}, "
                                 f"not {array.dtype} {array.shape}")
            if not array.flags.c_contiguous:
                raise ValueError(f"{name}: {buffer.name} is not C-contiguous")
        return self._launch(name, [array.ctypes.data for array in arrays],
                            [array.nbytes for array in arrays], seed)

    def register(self, prefix: str, seed: int = 0) -> None:
        """Register each kernel as a packed function ``prefix + name`` of tensors on the CPU.

        A Relax VM on the CPU can call it with destination-passing style
        (``R.call_dps_packed(prefix + name, …)``).
        """
        for name in self._kernels:
            def function(*tensors: Any, name: str = name) -> None:
                self.run(name, *map(np.from_dlpack, tensors), seed=seed)

            tvm_ffi.register_global_func(prefix + name, function, override=True)

    def _launch(self, name: str, data: list[int], sizes: list[int], seed: int) -> Counts:
        kernel = self._kernels[name]
        count = len(kernel.parameters)
        report = _Report()
        with self._lock:
            if self._waits:
                late = bytes(index not in kernel.early for index in kernel.parameters)
                self._library.vitq_late(late, ctypes.c_int(len(late)))
            problem = self._library.vitq_launch(
                ctypes.cast(getattr(self._library, f"vitq_call_{kernel.name}"), ctypes.c_void_p),
                ctypes.c_int(count),
                (ctypes.c_void_p * count)(*(data[i] for i in kernel.parameters)),
                (ctypes.c_long * count)(*(sizes[i] for i in kernel.parameters)),
                (ctypes.c_uint * 3)(*kernel.grid), ctypes.c_int(kernel.threads),
                ctypes.c_long(kernel.shared_bytes), ctypes.c_uint64(seed), ctypes.byref(report))
        if problem:
            raise EmulationError(f"{name}: {self._explain(name, kernel, report)}")
        return Counts(report.mma, report.ldmatrix, report.conflicts, report.barriers,
                      report.copied)

    def _explain(self, name: str, kernel: Kernel, report: _Report) -> str:
        lines = self._text.splitlines()

        def line(number: int) -> str:
            return f"`{lines[number - 1].strip()}`" if number else "the kernel's end"

        where = f"block {tuple(report.block)}, thread {report.thread}"
        seen = f"at or after {line(report.line)}" if report.line else "near the kernel's begin"
        if report.problem == 1:
            return (f"threads wait at {line(report.line)} while others are at "
                    f"{line(report.other)} ({where})")
        if report.problem == 2:
            if report.argument == -2:
                return f"access {report.offset} bytes after shared memory {seen} ({where})"
            if report.argument < 0:
                return f"access to memory that is no argument's {seen} ({where})"
            buffer = kernel.arguments[kernel.parameters[report.argument]]
            return f"access at byte {report.offset} of {buffer.name} {seen} ({where})"
        if report.problem == 9 and report.argument >= 0:
            buffer = kernel.arguments[kernel.parameters[report.argument]]
            return (f"{buffer.name} is accessed before the wait for earlier launches {seen} "
                    f"({where})")
        if report.problem == 5:
            buffer = kernel.arguments[kernel.parameters[report.argument]]
            return f"bytes before or after {buffer.name} were written"
        what = {3: "address is not aligned", 4: "address is not in shared memory",
                6: "fewer than 32 threads", 7: "selector beyond 7 after",
                8: "products without a fence before them",
                9: "the kernel does not wait for earlier launches"}[report.problem]
        return f"{what}: {line(report.line)} ({where})"


def _host_source(source: str, arch: str) -> str:
    """Return generated CUDA C++ as C++ for ``emulation.hpp``."""
    first = source.index('extern "C" __global__')
    emulated = set(re.findall(r"#define (vitq_\w+)\(", HEADER.read_text()))
    parts = _DEVICE.split(source[:first])
    starts = [match.start() for match in _DEVICE.finditer(source[:first])] + [first]
    kept = [source[begin:end] for name, begin, end
            in zip(parts[1::2], starts[:-1], starts[1:], strict=True) if name not in emulated]
    for text in kept:
        if "asm" in text:
            raise ValueError(f"not emulated: {text.partition('{')[0].strip()}")
    body = source[first:]
    if re.search(r"^\s*__shared__", body, re.MULTILINE):
        raise ValueError("static shared memory is not emulated: use shared.dyn")
    body = _HEAD.sub(lambda match: f"{match[0]}\n  const vitq::Index threadIdx = "
                                   "vitq::current->thread, blockIdx = vitq::block;", body)
    body = _SHARED.sub(r"\1* const \2 = reinterpret_cast<\1*>(vitq::shared);", body)
    entries = "".join(
        f'VITQ_EXPORT void vitq_call_{match[1]}(void* const* a) {{ vitq::call({match[1]}, a); }}\n'
        for match in _HEAD.finditer(source))
    return (f"#define VITQ_CUDA_ARCH {arch.removeprefix('sm_').rstrip('af')}0\n"
            f'#include "{HEADER}"\n#define VITQ_EXPORT extern "C" '
            '__attribute__((visibility("default")))\n'
            + "".join(kept) + body + entries + _LAUNCH)


_LAUNCH = """
VITQ_EXPORT void vitq_late(const char* flags, int count) {
  vitq::late.assign(flags, flags + count);
}
VITQ_EXPORT int vitq_launch(void (*function)(void* const*), int count, void** data,
                            const long* bytes, const unsigned int* grid, int threads,
                            long shared_bytes, std::uint64_t seed, vitq::Report* out) {
  return vitq::launch(function, count, data, bytes, grid, threads, shared_bytes, seed, out);
}
"""


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise ValueError("the emulator of CUDA kernels needs a C++17 compiler: install g++ or set CXX")


def _compile(text: str, folder: Path) -> ctypes.CDLL:
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(text)
    command = [_compiler(), *_FLAGS, "-o", str(library), str(source)]
    done = subprocess.run([*command, _RUBBISH], capture_output=True, text=True, check=False)
    if done.returncode != 0 and _RUBBISH in done.stderr:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise ValueError("the C++ compiler refuses emulated kernels: "
                         + (errors or [done.stderr.strip()[-200:]])[0])
    return ctypes.CDLL(str(library))
