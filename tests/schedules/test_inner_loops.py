"""What LLVM's machine models say of the inner loops of x86, most of which cannot run here."""

from __future__ import annotations

import pytest

from benchmarks.mca import SHORT, mca, measure


@pytest.mark.skipif(not mca(), reason="no llvm-mca of LLVM 16 or newer (Debian: llvm-19)")
@pytest.mark.parametrize("cpu,dtype,dot,share", [
    ("znver3", SHORT, "vpmaddubsw256", 0.95),
    ("icelake-server", "int8", "vpdpbusd512", 0.85),
    # Additions share the two ports of the multiplications.
    ("skylake-avx512", SHORT, "vpmaddubsw512", 0.6),
])
def test_multiply_issue_limit(cpu: str, dtype: str, dot: str, share: float) -> None:
    loop = measure(cpu, dtype, mca())
    assert loop.dot == dot
    assert loop.share >= share
