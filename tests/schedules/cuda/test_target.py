"""Names of CUDA targets."""

from __future__ import annotations

import pytest

from schedules.cuda.target import ARCHITECTURES, is_cuda_name
from schedules.host import host_architecture
from schedules.isa import resolve_target


@pytest.mark.parametrize(("name", "arch"), [
    ("cuda", "sm_80"), ("cuda+sm_75", "sm_75"), ("cuda+sm_90", "sm_90"),
    ("CUDA", "sm_80"), ("SM_86", "sm_86"), ("sm75", "sm_75"), ("cuda+sm89", "sm_89"),
    *((arch, arch) for arch in ARCHITECTURES)])
def test_names(name: str, arch: str) -> None:
    target = resolve_target(name)
    assert target.kind.name == "cuda"
    assert target.attrs["arch"] == arch
    assert int(target.attrs["thread_warp_size"]) == 32
    assert int(target.attrs["max_threads_per_block"]) == 1024
    assert int(target.attrs["max_shared_memory_per_block"]) == ARCHITECTURES[arch]
    assert target.host.kind.name == "llvm"
    assert str(target.host.attrs["mtriple"]).startswith(host_architecture())


def test_code_runs_on_what_it_is_said_to() -> None:
    """No kernel for sm_80 takes more shared memory than sm_86 and sm_89 have, which run it too."""
    names = [name for name in ARCHITECTURES if name.startswith("sm_8")]
    assert {ARCHITECTURES[name] for name in names} == {101376}
    assert ARCHITECTURES["sm_75"] <= ARCHITECTURES["sm_80"] <= ARCHITECTURES["sm_90"]


@pytest.mark.parametrize("name", [
    "sm_70", "sm_", "cuda+", "cuda+70", "cuda+sm_61", "sm_90+cuda", "sm_100", "sm_80a"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown CUDA target .*: use cuda .* sm_75") as error:
        resolve_target(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_other_names_are_not_ours() -> None:
    assert not any(map(is_cuda_name, ["native", "x86-64-v3", "aarch64+i8mm", "cudax", "small"]))
