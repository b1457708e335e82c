"""nvcc: reports, PTX and SASS of kernels, and what is said where it is missing or refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from schedules.cuda.compile import (
    Resources,
    compile_cuda,
    cuda_source,
    find_nvcc,
    ptx,
    resource_report,
    sass,
)
from schedules.cuda.target import ARCHITECTURES, resolve_cuda_target
from tests.helpers.cuda import needs_nvcc, needs_nvdisasm, tiled_matmul

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'b_kernel' for 'sm_90'
ptxas info    : Function properties for b_kernel
    208 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 4.000 ms
ptxas info    : Compiling entry function 'a_kernel' for 'sm_90'
ptxas info    : Function properties for a_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""

LOCAL = """
extern "C" __global__ void indexed(int* x, int n) {
  int held[64];
  for (int i = 0; i < 64; ++i) held[(i * n) & 63] = x[i];
  x[0] = held[n & 63];
}
"""


def source(arch: str) -> str:
    return cuda_source({"matmul": tiled_matmul((64, 64, 64))}, resolve_cuda_target(arch))


def test_report() -> None:
    report = resource_report(REPORT)
    assert report == {"b_kernel": Resources(255, 208, 12, 16, 1024),
                      "a_kernel": Resources(40, 0, 0, 0, 0)}
    remark = "ptxas info : (C7511) Potential Performance Loss: wgmma.mma_async instructions are "
    told = resource_report(f"{remark}serialized due to … in the function 'a_kernel'\n{REPORT}")
    assert told["a_kernel"].serialized and not told["b_kernel"].serialized
    assert report["b_kernel"].spills
    assert not report["a_kernel"].spills


def test_source_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert 'extern "C" __global__ void __launch_bounds__(128) matmul_kernel(' in source("sm_75")


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schedules.cuda.nvcc._toolkit", lambda name: None)
    with pytest.raises(ValueError, match=r"needs nvcc, .* tvm-vitq\[cuda\]") as error:
        compile_cuda("", "sm_80")
    assert "\n" not in str(error.value)


def test_found_in_cuda_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert find_nvcc() == str(program)
    with pytest.raises(ValueError, match=r"nvcc .* failed: no message"):
        compile_cuda("", "sm_80")


@needs_nvcc
def test_refused() -> None:
    with pytest.raises(ValueError, match=r'failed: kernels.cu\(1\): error: .*"nothing"') as error:
        compile_cuda("int x = nothing;", "sm_80")
    assert "\n" not in str(error.value)


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_matmul_uses_tensor_cores_and_registers(arch: str) -> None:
    text = source(arch)
    binary, resources = compile_cuda(text, arch)
    assert len(binary) > 1000
    assert set(resources) == {"matmul_kernel"}
    assert not resources["matmul_kernel"].spills
    assert resources["matmul_kernel"].shared == 0  # all is dynamic
    assert 32 < resources["matmul_kernel"].registers <= 255
    instructions = ptx(text, arch)["matmul_kernel"]
    small, large = (f"mma.sync.aligned.{shape}.row.col.s32.s8.s8.s32"
                    for shape in ("m8n8k16", "m16n8k32"))
    wanted, unwanted = (small, large) if arch == "sm_75" else (large, small)
    assert wanted in instructions
    assert unwanted not in instructions
    assert "ldmatrix.sync.aligned.m8n8.x4" in instructions
    assert ("cp.async" in instructions) == (arch != "sm_75")
    assert ".local" not in instructions
    assert ".f32" not in instructions


@needs_nvcc
def test_local_memory_is_reported() -> None:
    _, resources = compile_cuda(LOCAL, "sm_80")
    assert resources["indexed"].stack >= 256
    assert resources["indexed"].spills


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch: str) -> None:
    assert not compile_cuda(source(arch), arch)[1]["matmul_kernel"].spills


@needs_nvdisasm
@pytest.mark.parametrize(("arch", "shape"), [("sm_75", "8816"), ("sm_80", "16832")])
def test_machine_code(arch: str, shape: str) -> None:
    text = sass(source(arch), arch)["matmul_kernel"]
    assert text.count(f"IMMA.{shape}.S8.S8") >= 8
    assert "LDSM" in text
    assert not any(name in text for name in ("STL", "LDL", "FMUL", "FADD"))
