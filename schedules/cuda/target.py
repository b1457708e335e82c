"""Names of CUDA targets, and what TVM has to know of each architecture without asking a GPU."""

from __future__ import annotations

import re

import tvm

from schedules.host import host_architecture

__all__ = ["ARCHITECTURES", "is_cuda_name", "is_hopper", "resolve_cuda_target"]

ARCHITECTURES = {
    "sm_75": 65536,
    "sm_80": 101376,
    "sm_86": 101376,
    "sm_87": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_90a": 232448,
}
"""Architectures and the shared memory that a block may have wherever their code runs, bytes (CUDA
C++ Programming Guide, technical specifications per compute capability). sm_80 and sm_87 themselves
have 166912, but sm_86 and sm_89, which run the same code, have not; sm_90's kernels may take more
than workstation GPUs of later generations have."""

DEFAULT = "sm_80"
"""Machine code of it runs on all of sm_80 … sm_89, and its PTX on everything newer."""


def is_hopper(arch: str) -> bool:
    """Whether code is for Hopper alone: four warps multiply together, launches overlap."""
    return arch == "sm_90a"


def is_cuda_name(name: str) -> bool:
    """Whether ``name`` is meant for :func:`resolve_cuda_target`."""
    return re.fullmatch(r"cuda(\+.*)?|sm(_\w*|\d\w*)(\+.*)?", name.lower()) is not None


def resolve_cuda_target(name: str = "cuda") -> tvm.target.Target:
    """Return the CUDA target called ``name``, with this machine's architecture as host.

    Parameters
    ----------
    name
        ``"sm_75"``, ``"sm_80"``, ``"sm_86"``, ``"sm_87"``, ``"sm_89"``, ``"sm_90"`` or
        ``"sm_90a"``, also as ``"cuda+sm_80"`` or ``"SM80"``; ``"cuda"`` is ``"sm_80"``. Code for
        one of them runs on it and on later ones: as machine code within a generation (sm_8x), else
        from PTX that the driver compiles; that of sm_90a (H100, H200: ``wgmma``, launches that
        overlap) on it alone.

    Raises
    ------
    ValueError
        There is no such architecture, or it has no int8 tensor cores.
    """
    base, _, extension = name.lower().partition("+")
    arch = extension or DEFAULT if base == "cuda" else name.lower()
    arch = re.sub(r"^sm_?(?=\d)", "sm_", arch)
    if arch not in ARCHITECTURES or name.endswith("+"):
        raise ValueError(f"unknown CUDA target {name!r}: use cuda (sm_80 and later) or one of "
                         f"{', '.join(ARCHITECTURES)} (int8 tensor cores begin with sm_75; GPUs "
                         "later than sm_90 run its code; sm_90a is for H100 and H200 alone)")
    return tvm.target.Target(
        {"kind": "cuda", "arch": arch, "max_threads_per_block": 1024, "thread_warp_size": 32,
         "max_shared_memory_per_block": ARCHITECTURES[arch]},
        host={"kind": "llvm", "mtriple": f"{host_architecture()}-linux-gnu"},
    )
