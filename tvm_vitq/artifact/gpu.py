"""Artefacts for NVIDIA GPUs: which GPU is here, and how such a file is opened where there is none.

TVM loads the code of a GPU through its CUDA runtime, which needs the driver. Without one the
library's own data and the virtual machine's program can still be read, on the CPU, once something
takes the place of the loader (:func:`open_without_gpu`): that is enough to describe the artefact,
and to replay it with kernels that are emulated.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["GPU_EMULATOR", "GRAPH_FUNCTIONS", "architecture_here", "capability", "is_gpu",
           "open_without_gpu", "reason_not_here"]

GPU_EMULATOR = "emulator"
"""What ``--verify-with`` and ``--with`` call the emulation of GPU kernels."""
_LOADER = "ffi.Module.load_from_bytes.cuda"
GRAPH_FUNCTIONS = ("vm.builtin.cuda_graph.get_cached_alloc",
                   "vm.builtin.cuda_graph.run_or_capture")
"""What programs for a GPU call to allocate once and to record launches: the machine looks them up
when a program is opened."""


def is_gpu(description: Mapping[str, Any]) -> bool:
    """Whether a target's description (``metadata["target"]``) is of a GPU."""
    return description.get("kind") == "cuda"


def capability(architecture: str) -> int:
    """Return an architecture's number: 90 for ``"sm_90"`` and ``"sm_90a"``."""
    found = re.fullmatch(r"sm_(\d+)[a-z]?", architecture)
    return int(found[1]) if found else 0


def architecture_here() -> str:
    """Return the architecture of this machine's first GPU, ``""`` if TVM finds none."""
    import tvm

    device = tvm.cuda(0)
    if not device.exist:
        return ""
    return "sm_" + str(device.compute_version).replace(".", "")


def _missing_library() -> str:
    """Return the library that TVM's CUDA runtime wants and lacks here, ``""`` if it loads."""
    import tvm

    try:
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
    except OSError as why:
        return str(why).partition(":")[0]
    return ""


def reason_not_here(description: Mapping[str, Any]) -> str:
    """Return why this machine's GPU cannot run a target's code, ``""`` if it can."""
    needed, here = str(description["arch"]), architecture_here()
    if not here:
        missing = _missing_library()
        return (f"the code is for an NVIDIA GPU ({needed}), and TVM finds none on this machine"
                f"{missing and f' (without {missing})'}")
    if capability(here) < capability(needed):
        return f"the code is for {needed}, and this machine's GPU is {here}"
    if needed[-1:].isalpha() and capability(here) != capability(needed):
        return (f"the code is for {needed} alone, and this machine's GPU is {here}: compile for "
                f"{needed[:-1]}")
    return ""


def open_without_gpu() -> None:
    """Let libraries with GPU code be loaded on a machine whose TVM has no loader for it.

    What is loaded instead has no kernels, and programs that record launches stop where they do so.
    Where the real functions are registered nothing changes.
    """
    import tvm  # the CUDA runtime registers its functions when TVM is imported
    import tvm_ffi

    assert tvm

    def stop(*_: Any) -> None:
        raise RuntimeError("there is no GPU to run this program on")

    stand_ins: dict[str, Any] = {_LOADER: lambda _: tvm_ffi.system_lib("vitq_no_kernels_")}
    for name, function in {**stand_ins, **dict.fromkeys(GRAPH_FUNCTIONS, stop)}.items():
        if tvm_ffi.get_global_func(name, allow_missing=True) is None:
            tvm_ffi.register_global_func(name, function)
