"""TVM's passes leave the memory of kernels as the writer laid it out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx

from schedules.builder import const, load
from schedules.cuda.lower import lower
from schedules.cuda.target import resolve_cuda_target
from schedules.cuda.writer import CudaWriter, pointer
from tests.helpers.cuda import TRUE, emulator, kernel, tiled_matmul, words

TARGET = resolve_cuda_target("sm_90")


def by_address_only(w: CudaWriter, x: Any, y: Any) -> None:
    """Two tiles, one after the other, that are touched through addresses; so are registers."""
    tiles = [w.shared("tile", 1000, "int8") for _ in range(2)]
    held = [w.registers("held", 4) for _ in range(2)]
    for tile in tiles:
        w.call("vitq_copy16", pointer(tile, w.thread * 16), pointer(x, w.thread * 4), TRUE)
        w.call("vitq_copy_commit")
    w.call("vitq_copy_wait0")
    w.barrier()
    for tile, registers in zip(tiles, held, strict=True):
        w.call("vitq_ldmatrix4", pointer(registers, 0), pointer(tile, w.lane * 16))
    for registers in held:
        w.call("vitq_store16", pointer(y, w.thread * 4), pointer(registers, 0))


def words_only(w: CudaWriter, x: Any, y: Any) -> None:
    shared = [w.shared("s", 64, "int32") for _ in range(3)]
    for i, buffer in enumerate(shared):
        w.store(buffer, load(x, w.thread) + i, w.thread)
    w.barrier()
    total = const(0, "int32")
    for buffer in shared:
        total = total + load(buffer, 31 - w.thread)
    w.store(y, total, w.thread)


def vectors_only(w: CudaWriter, x: Any, y: Any) -> None:
    shared = [w.shared("s", 512, "int32") for _ in range(2)]
    for buffer in shared:
        w.store(buffer, load(x, w.thread * 4, lanes=4), w.thread * 4, lanes=4)
    w.barrier()
    for buffer in shared:
        w.store(y, load(buffer, w.thread * 4, lanes=4), w.thread * 4, lanes=4)


def mixed(w: CudaWriter, x: Any, y: Any) -> None:
    small, wide, tiny = (w.shared("s", 32, dtype) for dtype in ("int8", "int64", "int16"))
    w.store(small, tirx.Cast("int8", load(x, w.thread)), w.thread)
    w.store(wide, tirx.Cast("int64", load(x, w.thread)) * 1000, w.thread)
    w.store(tiny, tirx.Cast("int16", load(x, w.thread)), w.thread)
    w.barrier()
    at = 31 - w.thread
    sums = tirx.Cast("int64", load(small, at)) + load(wide, at) + tirx.Cast("int64", load(tiny, at))
    w.store(y, tirx.Cast("int32", sums), w.thread)


KERNELS = {"addresses": by_address_only, "words": words_only, "vectors": vectors_only,
           "mixed": mixed}
SIZES = {"addresses": 2 * 1024, "words": 3 * 256, "vectors": 2 * 2048, "mixed": 128 + 256 + 128}


@pytest.fixture(scope="module")
def funcs() -> dict[str, tirx.PrimFunc]:
    return {name: kernel(write, [words("x", 128), words("y", 128)])
            for name, write in KERNELS.items()}


def launched_bytes(func: tirx.PrimFunc) -> int:
    """Return the dynamic shared memory that the host asks for."""
    module = tvm.IRModule({"k": func.with_attr("global_symbol", "k")})
    pipeline, _, _ = tirx.get_default_tir_pipeline(TARGET)
    text = pipeline(tirx.transform.BindTarget(TARGET)(module)).script()
    found = re.search(r"call_ffi_kernel\(.*T\.int64\((\d+)\), launch_params", text)
    assert found
    return int(found[1])


@pytest.mark.parametrize("name", KERNELS)
def test_shared_memory_is_what_was_allocated(funcs: dict[str, tirx.PrimFunc], name: str) -> None:
    assert lower({name: funcs[name]}, TARGET)[1][name].shared_bytes == SIZES[name]
    assert launched_bytes(funcs[name]) == SIZES[name]


def test_arrays_keep_their_sizes(funcs: dict[str, tirx.PrimFunc]) -> None:
    source, _ = lower({"k": funcs["addresses"]}, TARGET)
    assert re.findall(r"int held\w*\[(\d+)\];", source) == ["4", "4"]
    # the second tile begins behind the first
    assert "* 16) + 1024)" in source


def test_kernels_see_their_own_memory(funcs: dict[str, tirx.PrimFunc]) -> None:
    device = emulator(funcs)
    x = np.random.default_rng(0).integers(-100, 100, 128).astype(np.int32)
    fragments = x.reshape(4, 32).T.ravel()  # lane i holds word i of each of the four matrices
    expected = {"addresses": fragments, "words": 3 * x[31::-1] + 3, "vectors": x,
                "mixed": 1002 * x[31::-1]}
    for name, values in expected.items():
        for seed in range(4):
            y = np.zeros(128, np.int32)
            device.run(name, x, y, seed=seed)
            assert (y[:len(values)] == values).all(), name


def test_barriers_are_the_kernels_own() -> None:
    source, _ = lower({"k": tiled_matmul((64, 64, 64))}, TARGET)
    assert source.count("__syncthreads();") == 2
