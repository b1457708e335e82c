"""Targets are resolved by name, instruction sets by feature."""

from __future__ import annotations

import pytest
import tvm

from schedules.isa import AVX2, AVX512BW, AVX512VNNI, AVXVNNI, GENERIC, ISA, isa_for, resolve_target


@pytest.mark.parametrize("name,isa", [
    ("x86-64-v3", AVX2), ("znver3", AVX2), ("x86-64-v4", AVX512BW), ("alderlake", AVXVNNI),
    ("icelake-server", AVX512VNNI), ("x86-64", GENERIC)])
def test_features_decide(name: str, isa: ISA) -> None:
    assert isa_for(resolve_target(name)) == isa


def test_other_architecture_has_no_x86_kernels() -> None:
    target = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu"})
    assert isa_for(target) == GENERIC


def test_native_runs_here() -> None:
    assert resolve_target("native").attrs["mcpu"]


def test_unknown_target_is_one_line() -> None:
    with pytest.raises(ValueError, match="unknown target 'pentium5'") as error:
        resolve_target("pentium5")
    assert "\n" not in str(error.value)
