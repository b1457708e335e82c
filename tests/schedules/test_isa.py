"""Targets are resolved by name, instruction sets by feature."""

from __future__ import annotations

import pytest
import tvm
import tvm_ffi

from schedules.isa import (
    AVX2,
    AVX512BW,
    AVX512VNNI,
    AVXVNNI,
    DOTPROD,
    GENERIC,
    I8MM,
    ISA,
    NEON,
    architecture_of,
    cuda_isa,
    isa_for,
    resolve_target,
)

X86 = [("x86-64-v3", AVX2), ("znver3", AVX2), ("x86-64-v4", AVX512BW), ("alderlake", AVXVNNI),
       ("icelake-server", AVX512VNNI), ("x86-64", GENERIC)]
ARM = [("aarch64", NEON), ("aarch64+dotprod", DOTPROD), ("aarch64+i8mm", I8MM),
       ("cortex-a53", NEON), ("cortex-a72", NEON), ("cortex-a76", DOTPROD),
       ("neoverse-n1", DOTPROD), ("apple-m1", DOTPROD), ("neoverse-v1", I8MM),
       ("neoverse-n2", I8MM), ("cortex-a710", I8MM)]


@pytest.mark.parametrize("name,isa", X86 + ARM)
def test_features_decide(name: str, isa: ISA) -> None:
    assert isa_for(resolve_target(name)) == isa


@pytest.mark.parametrize("name,architecture", [
    ("x86-64-v3", "x86_64"), ("aarch64", "aarch64"), ("cortex-a76", "aarch64")])
def test_architecture(name: str, architecture: str) -> None:
    assert architecture_of(resolve_target(name)) == architecture


def test_plain_aarch64_is_armv8_0() -> None:
    has = tvm_ffi.get_global_func("target.target_has_feature")
    target = resolve_target("aarch64")
    assert has("neon", target)
    assert not any(has(name, target) for name in ("crc", "aes", "sha2", "v8.1a", "lse", "rdm"))


@pytest.mark.parametrize("name", ["pentium5", "aarch64+sme9", "cortex-a76+dotprod"])
def test_unknown_target_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="unknown target") as error:
        resolve_target(name)
    assert "\n" not in str(error.value) and "aarch64+dotprod" in str(error.value)


def test_native_runs_here() -> None:
    assert resolve_target("native").attrs["mcpu"]


@pytest.mark.parametrize(("arch", "base"), [
    ("sm_75", "sm_75"), ("sm_90", "sm_90"), ("sm_90a", "sm_90a"), ("sm_100", "sm_80"),
    ("sm_120a", "sm_80")])  # fmt: skip
def test_gpus_that_are_not_listed(arch: str, base: str) -> None:
    assert cuda_isa(arch).name == base and cuda_isa(arch).gpu
    assert isa_for(tvm.target.Target({"kind": "cuda", "arch": arch})).name == base


def test_gpus_without_tensor_cores() -> None:
    with pytest.raises(ValueError, match="sm_70 has no int8 tensor cores"):
        cuda_isa("sm_70")
