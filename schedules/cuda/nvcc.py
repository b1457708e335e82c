"""NVIDIA's compiler: where it is, machine code with a report of resources, PTX and SASS.

It is needed to make an artefact, not to run one: on PATH, in ``$CUDA_HOME`` or ``/usr/local/cuda``,
or from ``pip install tvm-vitq[cuda]``, whose packages hold a whole compiler; like any nvcc it wants
a C++ compiler of the host beside it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .overlap import OPTIONS
from .target import is_hopper

__all__ = ["Resources", "compile_cuda", "find_nvcc", "find_nvdisasm", "ptx", "resource_report",
           "sass"]

# Multiplication and addition stay two roundings, as in the reference; there is no fast math.
_OPTIONS = ("-O3", "-fmad=false", "-Xptxas", "-v")

_MEND = ("install CUDA 12 or 13's toolkit, set CUDA_HOME, or 'pip install tvm-vitq[cuda]' "
         "and a C++ compiler")


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor, as ``ptxas`` reports it.

    Parameters
    ----------
    registers
        32-bit registers of a thread.
    stack
        Bytes of local memory (in device memory) of a thread: arrays that are not in registers.
    spill_stores, spill_loads
        Bytes that a thread stores to, and loads from, local memory for want of registers.
    shared
        Bytes of static shared memory of a block; dynamic shared memory is the launch's.
    serialized
        Whether ``ptxas`` has ``wgmma`` products wait for each other, or for what it injects.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    serialized: bool = False

    @property
    def spills(self) -> bool:
        """Whether a thread uses local memory at all."""
        return bool(self.stack or self.spill_stores or self.spill_loads)


def _toolkit(name: str) -> str | None:
    """Return the path of a program of CUDA's toolkit."""
    pip = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    homes = [Path(os.environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    homes += [Path("/usr/local/cuda"), pip / "cu13", pip / "cuda_nvcc"]
    places = [os.environ.get("PATH", ""), *(str(home / "bin") for home in homes)]
    return next((found for place in places if (found := shutil.which(name, path=place))), None)


def find_nvcc() -> str:
    """Return the path of ``nvcc``.

    Raises
    ------
    ValueError
        There is none; one line says how to get it.
    """
    path = _toolkit("nvcc")
    if path is None:
        raise ValueError(f"code for NVIDIA GPUs needs nvcc, which was not found: {_MEND}")
    return path


def find_nvdisasm() -> str | None:
    """Return the path of ``nvdisasm``, which shows SASS; None if there is none."""
    return _toolkit("nvdisasm")


def compile_cuda(source: str, arch: str) -> tuple[bytes, dict[str, Resources]]:
    """Compile to a "fat binary": machine code for ``arch`` and PTX for what comes after it.

    Parameters
    ----------
    source
        CUDA C++ text.
    arch
        For example ``"sm_80"``.

    Returns
    -------
    binary, resources
        What the driver loads; for each kernel what it takes.

    Raises
    ------
    ValueError
        There is no nvcc, or it refuses the text.
    """
    number = arch.removeprefix("sm_")
    code = f"arch=compute_{number},code=[sm_{number},compute_{number}]"
    binary, messages = _nvcc(source, "fatbin", ["-gencode", code, *_options(arch)])
    return binary, resource_report(messages)


def ptx(source: str, arch: str) -> dict[str, str]:
    """Return the PTX text of each kernel; errors as of :func:`compile_cuda`."""
    options = [f"-arch=compute_{arch.removeprefix('sm_')}", *_options(arch)]
    text = _nvcc(source, "ptx", options)[0].decode()
    return _split(text, r"^\.(?:visible )?\.?entry (\w+)\(")


def sass(source: str, arch: str) -> dict[str, str]:
    """Return the machine code of each kernel as text; errors as of :func:`compile_cuda`.

    Raises
    ------
    ValueError
        There is no ``nvdisasm``.
    """
    disassembler = find_nvdisasm()
    if disassembler is None:
        raise ValueError("SASS needs nvdisasm, which was not found: install CUDA's toolkit or "
                         "'pip install nvidia-cuda-nvdisasm'")
    binary = _nvcc(source, "cubin", [f"-arch={arch}", *_options(arch)])[0]
    with tempfile.TemporaryDirectory(prefix="vitq-cuda-") as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(binary)
        done = subprocess.run([disassembler, "-c", str(path)], capture_output=True, text=True,
                              check=False)
    if done.returncode != 0:
        raise ValueError(f"nvdisasm failed: {_last_line(done.stderr)}")
    return _split(done.stdout, r"^\s*\.section\s+\.text\.(\w+),")


def _options(arch: str) -> Sequence[str]:
    return OPTIONS if is_hopper(arch) else ()


def resource_report(messages: str) -> dict[str, Resources]:
    """Return what ``ptxas -v`` wrote of each kernel.

    Parameters
    ----------
    messages
        nvcc's standard error with ``-Xptxas -v``.
    """
    report = {}
    serialized = set(re.findall(r"\(C75\d\d\).* function '(\w+)'", messages))
    for name, text in _split(messages, r"Compiling entry function '(\w+)' for 'sm_").items():
        def number(pattern: str, text: str = text) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        report[name] = Resources(
            registers=number(r"Used (\d+) registers"),
            stack=number(r"(\d+) bytes stack frame"),
            spill_stores=number(r"(\d+) bytes spill stores"),
            spill_loads=number(r"(\d+) bytes spill loads"),
            shared=number(r"(\d+) bytes smem"),
            serialized=name in serialized,
        )
    return report


def _split(text: str, start: str) -> dict[str, str]:
    """Return the parts of ``text`` that begin at matches of ``start``, by its group."""
    found = list(re.finditer(start, text, re.MULTILINE))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return {match[1]: text[match.start():end] for match, end in zip(found, ends, strict=True)}


def _nvcc(source: str, kind: str, options: Sequence[str]) -> tuple[bytes, str]:
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory(prefix="vitq-cuda-") as folder:
        text, out = Path(folder) / "kernels.cu", Path(folder) / f"kernels.{kind}"
        text.write_text(source)
        done = subprocess.run(
            [nvcc, f"-{kind}", *_OPTIONS, *options, "-o", str(out), str(text)],
            capture_output=True, text=True, check=False)
        if done.returncode != 0 or not out.exists():
            raise ValueError(f"nvcc ({nvcc}) failed: {_first_error(done.stderr + done.stdout)}")
        return out.read_bytes(), done.stderr


def _first_error(messages: str) -> str:
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|fatal|not found|Unsupported", line)]
    line = (errors or lines or ["no message"])[0]
    return re.sub(r"^\S*/(kernels\.\w+)", r"\1", line)


def _last_line(messages: str) -> str:
    return (messages.strip().splitlines() or ["no message"])[-1]
