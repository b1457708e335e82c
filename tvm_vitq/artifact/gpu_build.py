"""The GPU's part of an artefact: the kernels' text, machine code, resources, check of PTX."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import tvm
from tvm import tirx

from relay_passes.errors import VitqError
from schedules.cuda.compile import CudaBuild, cuda_build, ptx
from schedules.cuda.lower import Kernel, lower

from .gpu_kernels import check_ptx, products_of

__all__ = ["GpuCode", "compile_gpu"]


@dataclass(frozen=True)
class GpuCode:
    """Kernels as nvcc saw them.

    Attributes
    ----------
    source
        CUDA C++ text.
    launches
        How each kernel is launched, by the PrimFunc's name.
    build
        Holds machine code and resources; to be given to the module's build.
    boundary
        Floating-point instructions of the boundary kernels: ``{kernel: {mnemonic: count}}``.
    products
        The instruction that multiplies, by kernel.
    """

    source: str
    launches: Mapping[str, Kernel]
    build: CudaBuild
    boundary: dict[str, dict[str, int]]
    products: dict[str, str]

    def document(self) -> dict[str, Any]:
        """Return what an artefact keeps so that its kernels can be emulated."""
        launches = {name: asdict(kernel) for name, kernel in self.launches.items()}
        return {"source": self.source, "launches": launches}

    def building(self, target: tvm.target.Target) -> AbstractContextManager[CudaBuild]:
        """Return the context in which the module with these kernels is built and exported."""
        return cuda_build(target, self.build)


def compile_gpu(mod: tvm.IRModule, target: tvm.target.Target) -> GpuCode:
    """Compile a module's scheduled kernels, and check that only the boundary's hold floats.

    Raises
    ------
    VitqError
        If there is no nvcc, it refuses the text, or a kernel's PTX has a floating-point
        instruction that may not be there.
    """
    funcs = {gvar.name_hint: func for gvar, func in mod.functions_items()
             if isinstance(func, tirx.PrimFunc)}
    arch = str(target.attrs["arch"])
    build = CudaBuild(arch)
    try:
        source, launches = lower(funcs, target)
        build.compile(source)
        texts = ptx(source, arch)
        boundary = check_ptx(texts)
    except ValueError as why:
        raise VitqError(str(why)) from why
    return GpuCode(source, launches, build, boundary, products_of(texts))
