"""The census counts arithmetic on floats, in every function, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import tvm
from tvm import relax, te

from relay_passes.errors import VitqError
from tvm_vitq.artifact.disassemble import count_float_instructions, is_float_arithmetic

FLOAT = """
addps vaddps subsd vmulss vdivps sqrtss vsqrtpd minps vmaxss roundps vroundss vrndscaleps
vfnmadd213ss vfmsub132pd vfmaddsub213ps cvtsi2ss vcvtdq2ps vcvttps2dq cvtps2pd vcvtph2ps ucomiss
vcomisd cmpps vcmpltps vcmpnltps haddps vdpps rsqrtss vrcp14ps vaddsubps vaddph vreduceps vrangeps
vgetexpps vscalefps vdpbf16ps fadd fld fmulp fildll fsqrt
"""
INTEGER = """
movaps vmovups movss vmovd vxorps andps vandnps orps vshufps vpermilps vunpcklps vblendps vblendvps
vinsertps vextractps vbroadcastss vperm2f128 vextractf128 vinsertf32x4 vpermpd vmaskmovps vmovlhps
vgatherdps vmovmskps vpaddd vpmaddwd vpdpbusd vpdpwssd vpmulld imul idiv cmp sets sub add vpsubd
vpmaxsd vpminsd vpsrad vpackssdw nopw ret call comiset fxsave64 fnop cmpxchg vcompressps vexpandps
vpmovsxbw vpsadbw vpcmpgtd vpabsd prefetcht0 subl addq mulx divl
"""
FLOAT_ARM = "fadd fmul fmla fmadd fdiv fcvtzs scvtf ucvtf fcmp fsqrt frintm fmax bfdot bfmmla"
FLOAT_ARM += " bfcvtn"
INTEGER_ARM = "fmov add sdot smmla sqrdmulh mul ldr str dup scvt saddw fcsel fneg bfi bfc bfm bfxil"
INTEGER_ARM += " srshl usmmla tbl"


@pytest.mark.parametrize("mnemonic", FLOAT.split())
def test_float(mnemonic: str) -> None:
    assert is_float_arithmetic(mnemonic)


@pytest.mark.parametrize("mnemonic", INTEGER.split())
def test_not_float(mnemonic: str) -> None:
    assert not is_float_arithmetic(mnemonic)


def test_aarch64() -> None:
    assert all(is_float_arithmetic(m, "aarch64") for m in FLOAT_ARM.split())
    assert not any(is_float_arithmetic(m, "aarch64") for m in INTEGER_ARM.split())


def library(path: Path, parallel: bool) -> Path:
    """Build three kernels: boundary, an integer one and one that cheats with a float product."""
    from tvm.s_tir import Schedule

    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4096,), "float32"))

    def to_codes(a: te.Tensor) -> te.Tensor:
        return te.compute(a.shape, lambda i: (a[i] * 3.0).astype("int32"), name="out")

    def honest(a: te.Tensor) -> te.Tensor:
        return te.compute(a.shape, lambda i: a[i] * 5 + 3, name="out")

    def cheat(a: te.Tensor) -> te.Tensor:
        return te.compute(
            a.shape, lambda i: (a[i].astype("float32") * 0.3).astype("int32"), name="out"
        )

    with bb.function("main", [x]):
        with bb.dataflow():
            q = bb.emit(bb.call_te(to_codes, x, primfunc_name_hint="vitq_quantize"))
            h = bb.emit(bb.call_te(honest, q, primfunc_name_hint="vitq_honest"))
            c = bb.emit(bb.call_te(cheat, h, primfunc_name_hint="vitq_requantize"))
            out = bb.emit_output(c)
        bb.emit_func_output(out)
    mod = bb.get()
    if parallel:
        schedule = Schedule(mod)
        for name in ("vitq_quantize", "vitq_honest", "vitq_requantize"):
            (loop,) = schedule.get_loops(schedule.get_sblock("out", name))
            outer, _ = schedule.split(loop, [16, None])
            schedule.parallel(outer)
        mod = schedule.mod
    tvm.compile(mod, "llvm").export_library(str(path))
    return path


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
def test_finds_the_kernel_that_cheats(tmp_path: Path, parallel: bool) -> None:
    """The body of a parallel loop is counted to its kernel, though it has no symbol."""
    census = count_float_instructions(library(tmp_path / "x.so", parallel))
    assert set(census.boundary) == {"vitq_quantize"}
    assert set(census.elsewhere) == {"vitq_requantize"}
    assert census.total == sum(census.elsewhere["vitq_requantize"].values()) > 0


def test_a_stripped_library_proves_nothing(tmp_path: Path, toy: Path) -> None:
    copy = tmp_path / "stripped.so"
    shutil.copyfile(toy, copy)
    subprocess.run(["strip", str(copy)], check=True)
    with pytest.raises(VitqError, match="stripped"):
        count_float_instructions(copy)


def test_no_disassembler(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm_vitq

    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(VitqError, match="binutils"):
        count_float_instructions(toy)
    report = tvm_vitq.load(toy).inspect()
    assert report["float_instructions"] is None
    assert "binutils" in report["float_instructions_missing"]
