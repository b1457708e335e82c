"""The register peak of every sequence that this processor has."""

from __future__ import annotations

import pytest

from schedules.isa import isa_for, resolve_target
from tvm_vitq.bench.peaks import register_peak


def test_peak_is_a_rate() -> None:
    target = resolve_target("native", threads=1)
    isa = isa_for(target)
    if not isa.has_kernels:
        pytest.skip("no hand-made kernels for this processor")
    rate = register_peak(isa.dot16, target, isa.registers, seconds=0.05)
    assert 1 < rate < 10_000


def test_chains_are_measured_too() -> None:
    if not isa_for(resolve_target("native", threads=1)).has_kernels:
        pytest.skip("this processor may lack AVX2")
    target = resolve_target("x86-64-v3", threads=1)
    isa = isa_for(target)
    assert register_peak(isa.proved8, target, isa.registers, chain=2, seconds=0.05) > 1
