"""What nvcc makes of the attention kernel: tensor-core products, nothing in local memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedules.cuda.attention import AttentionTile, attention
from schedules.cuda.compile import compile_cuda, cuda_source, ptx
from schedules.cuda.target import resolve_cuda_target
from tests.helpers.attention import Shape, make
from tests.helpers.cuda import needs_nvcc

DEIT = Shape(1, 3, 197, 197, 64)
CASES = {
    "deit": (DEIT, AttentionTile(4, 1)),
    "deit16": (replace(DEIT, q="int16", k="int16", v="int16", out="int16"), AttentionTile(4, 1)),
    "shared_rows": (DEIT, AttentionTile(1, 4)),
    "swin": (Shape(8, 3, 49, 49, 32, bias=True, masks=1), AttentionTile(4, 1)),
}


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("name", CASES)
def test_resources(name: str, arch: str) -> None:
    """20 warps fit a multiprocessor's 65536 registers."""
    shape, tile = CASES[name]
    func = attention(*make(shape, "narrow").members, tile=tile)
    assert func is not None
    source = cuda_source({"attention": func}, resolve_cuda_target(arch))
    _, resources = compile_cuda(source, arch)
    (found,) = resources.values()
    assert found.spill_stores == found.spill_loads == found.stack == 0
    assert found.registers <= 96
    (text,) = ptx(source, arch).values()
    assert ("mma.sync.aligned.m16n8k32" if arch != "sm_75" else "mma.sync.aligned.m8n8k16") in text
    assert not any(f".{kind} " in text for kind in ("f32", "f64", "f16", "local"))
