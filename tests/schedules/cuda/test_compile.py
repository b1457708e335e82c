"""Libraries with GPU code hold machine code, on a machine with a driver and on one without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tvm
import tvm_ffi
from tvm import relax

from schedules.cuda.compile import CudaBuild, cuda_build, cuda_source
from schedules.cuda.target import resolve_cuda_target
from tests.helpers.cuda import needs_nvcc, tiled_matmul

LOADER = "ffi.Module.load_from_bytes.cuda"
CREATOR = "ffi.Module.create.cuda"


@pytest.fixture
def loaded() -> Iterator[list[bytes]]:
    """Take the place of TVM's loader of CUDA modules; yields what it is given."""
    seen: list[bytes] = []

    def load(data: bytes) -> tvm.runtime.Module:
        seen.append(bytes(data))
        return tvm_ffi.system_lib("vitq_test_no_kernels_")

    before = tvm_ffi.get_global_func(LOADER, allow_missing=True)
    tvm_ffi.register_global_func(LOADER, load, override=True)
    yield seen
    if before is None:
        tvm_ffi.registry.remove_global_func(LOADER)
    else:
        tvm_ffi.register_global_func(LOADER, before, override=True)


def module() -> tvm.IRModule:
    builder = relax.BlockBuilder()
    func = tiled_matmul((64, 64, 64)).with_attr("global_symbol", "matmul")
    kernel = builder.add_func(func, "matmul")
    x, w = (relax.Var(name, relax.TensorType((4096,), "int8")) for name in "xw")
    with builder.function("main", [x, w]):
        with builder.dataflow():
            out = relax.call_tir(kernel, [x, w], out_ty=relax.TensorType((4096,), "int32"))
            result = builder.emit_output(out)
        builder.emit_func_output(result)
    return builder.get()


def strings(data: bytes) -> list[bytes]:
    """Return a serialized module's format and code (its first and last field)."""
    length = int.from_bytes(data[:8], "little")
    return [data[8:8 + length], data]


@needs_nvcc
def test_library_holds_machine_code(tmp_path: Path, loaded: list[bytes]) -> None:
    target = resolve_cuda_target("sm_80")
    path = tmp_path / "model.so"
    with cuda_build(target) as build, target:
        executable = relax.build(module(), target)
        executable.export_library(str(path), fpack_imports=build.pack)
    assert "__global__" in build.source
    assert set(build.resources) == {"matmul_kernel"}
    library = tvm.runtime.load_module(str(path))
    (data,) = loaded
    kind, payload = strings(data)
    assert kind == b"fatbin"
    assert b"matmul_kernel" in payload
    assert b"tirx.use_dyn_shared_memory" in payload
    assert b"__global__" not in payload
    binary = payload[payload.index((0xBA55ED50).to_bytes(4, "little")):]  # a fat binary's magic
    length = int.from_bytes(payload[-len(binary) - 8:-len(binary)], "little")
    assert length == len(binary)
    assert library.implements_function("vm_load_executable")


def test_a_driver_changes_nothing() -> None:
    """Where there is a driver TVM would make a module of machine code by this function."""
    funcs = {"matmul": tiled_matmul((64, 64, 64))}
    target = resolve_cuda_target("sm_80")
    before = tvm_ffi.get_global_func(CREATOR, allow_missing=True)

    def create(*_: object) -> None:
        raise AssertionError("compiled for the GPU that is here")

    tvm_ffi.register_global_func(CREATOR, create, override=True)
    try:
        assert "__global__" in cuda_source(funcs, target)
        with cuda_build(target), target:
            relax.build(module(), target)
        with pytest.raises(AssertionError, match="GPU that is here"), target:
            relax.build(module(), target)
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(CREATOR)
        else:
            tvm_ffi.register_global_func(CREATOR, before, override=True)


def test_nothing_is_left_behind() -> None:
    before = os.environ.get("TVM_COMPILE_FORCE_FALLBACK")
    target = resolve_cuda_target("sm_80")

    def interrupted() -> CudaBuild:
        with cuda_build(target) as build:
            assert os.environ["TVM_COMPILE_FORCE_FALLBACK"] == "1"
            raise KeyError(build)

    with pytest.raises(KeyError):
        interrupted()
    assert os.environ.get("TVM_COMPILE_FORCE_FALLBACK") == before


def test_an_order_of_functions_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def compile_cuda(source: str, _arch: str) -> tuple[bytes, dict[str, object]]:
        given.append(source)
        return str(len(given)).encode(), {}

    monkeypatch.setattr("schedules.cuda.compile.compile_cuda", compile_cuda)
    build = CudaBuild("sm_90")
    one, other = ("int one() {\n  return 1;\n}\n", "int other() {\n  return 2;\n}\n")
    kernels = 'extern "C" __global__ void a() {}\nextern "C" __global__ void b() {}\n'
    assert build.compile(one + other + kernels) == build.compile(other + one + kernels) == b"1"
    assert build.compile(one + other + kernels.replace("b()", "c()")) == b"2"


def test_the_same_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order of functions and kernels, which TVM writes at times, is the same text."""
    asked: list[str] = []

    def compile_cuda(source: str, _arch: str) -> tuple[bytes, dict[str, object]]:
        asked.append(source)
        return bytes([len(asked)]), {}

    monkeypatch.setattr("schedules.cuda.compile.compile_cuda", compile_cuda)
    start = 'extern "C" __global__ '
    build = CudaBuild("sm_80")
    assert build.compile(f"int f;\nint g;\n{start}a;\n{start}b;\n\n") == b"\x01"
    assert build.compile(f"int g;\nint f;\n{start}b;\n{start}a;\n\n") == b"\x01"
    assert build.compile(f"int g;\nint f;\n{start}b;\n{start}c;\n\n") == b"\x02"
