"""Small CUDA kernels for tests, and the emulator that runs them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from tvm import tirx

from schedules.builder import const, load
from schedules.cuda.compile import find_nvcc
from schedules.cuda.emulate import Emulator
from schedules.cuda.nvcc import find_nvdisasm
from schedules.cuda.target import resolve_cuda_target
from schedules.cuda.writer import CudaWriter, pointer

__all__ = ["TRUE", "Kernel", "emulator", "kernel", "matmul_data", "needs_nvcc", "needs_nvdisasm",
           "tiled_matmul", "words"]


def _nvcc_missing() -> str:
    try:
        find_nvcc()
    except ValueError as error:
        return str(error)
    return "" if shutil.which("c++") or shutil.which("g++") else "nvcc needs a C++ compiler: g++"


_MISSING = _nvcc_missing()
needs_nvcc = pytest.mark.skipif(bool(_MISSING), reason=_MISSING)
needs_nvdisasm = pytest.mark.skipif(
    bool(_MISSING) or find_nvdisasm() is None,
    reason=_MISSING or "no nvdisasm: pip install nvidia-cuda-nvdisasm")

Kernel = Callable[..., None]
TRUE = tirx.const(True, "bool")


def words(name: str, size: int, dtype: str = "int32") -> Any:
    """Return a parameter of a kernel."""
    return tirx.decl_buffer((size,), dtype, name)


def kernel(
    write: Kernel, params: Sequence[Any], blocks: Sequence[int] = (1,), threads: int = 32
) -> tirx.PrimFunc:
    """Return the kernel whose body ``write(w, *params)`` writes."""
    w = CudaWriter(blocks, threads)
    write(w, *params)
    return w.prim_func(params, {"global_symbol": "k", "tirx.noalias": True})


def emulator(funcs: Mapping[str, tirx.PrimFunc], arch: str = "sm_80") -> Emulator:
    """Return kernels compiled for this CPU."""
    return Emulator(funcs, resolve_cuda_target(arch))


def tiled_matmul(
    shape: tuple[int, int, int], *, barrier: bool = True, wait: bool = True
) -> tirx.PrimFunc:
    """Return ``c[M, N] = x[M, K] @ w[N, K]ᵀ`` by 64 x 64 tiles, steps of 32 and one stage.

    Without ``barrier`` a tile is overwritten while others read it; without ``wait`` it is read
    before its copies need have come.
    """
    m, n, k = shape
    x, wt, c = words("x", m * k, "int8"), words("w", n * k, "int8"), words("c", m * n)
    w = CudaWriter((n // 64, m // 64), 128)
    tiles = [w.shared("tile", 64 * 48, "int8") for _ in range(2)]
    acc, left, right = w.registers("acc", 32), w.registers("left", 4), w.registers("right", 2)
    with w.loop("i", 32, "unrolled") as i:
        w.store(acc, const(0, "int32"), i)
    row, half = tirx.floordiv(w.thread, const(2, "int32")), w.thread % 2
    with w.loop("step", k // 32) as step:
        for tile, source, block in zip(tiles, (x, wt), reversed(w.block), strict=True):
            w.call("vitq_copy16", pointer(tile, row * 48 + half * 16),
                   pointer(source, (block * 64 + row) * k + step * 32 + half * 16), TRUE)
        w.call("vitq_copy_commit")
        if wait:
            w.call("vitq_copy_wait0")
        w.barrier()
        at = (w.warp * 16 + w.lane % 16) * 48 + tirx.floordiv(w.lane, const(16, "int32")) * 16
        w.call("vitq_ldmatrix4", pointer(left, 0), pointer(tiles[0], at))
        for column in range(8):
            at = (column * 8 + w.lane % 8) * 48 + tirx.floordiv(w.lane % 16, const(8, "int32")) * 16
            w.call("vitq_ldmatrix2", pointer(right, 0), pointer(tiles[1], at))
            w.call("vitq_mma_s8_s8", pointer(acc, 4 * column), pointer(left, 0), pointer(right, 0))
        if barrier:
            w.barrier()
    group, pair = tirx.floordiv(w.lane, const(4, "int32")), w.lane % 4
    for column in range(8):
        for i in range(4):
            out = (w.block[1] * 64 + w.warp * 16 + group + 8 * (i // 2)) * n
            out += w.block[0] * 64 + column * 8 + 2 * pair + i % 2
            w.store(c, load(acc, 4 * column + i), out)
    return w.prim_func([x, wt, c], {"global_symbol": "k", "tirx.noalias": True})


def matmul_data(shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return operands, flat, and the result of :func:`tiled_matmul`."""
    m, n, k = shape
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (m, k), dtype=np.int8)
    w = rng.integers(-128, 128, (n, k), dtype=np.int8)
    return x.ravel(), w.ravel(), (x.astype(np.int32) @ w.astype(np.int32).T).ravel()


