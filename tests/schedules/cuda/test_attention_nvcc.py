"""What nvcc makes of the attention kernel: tensor-core products, nothing in local memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedules.cuda.attention import attention
from schedules.cuda.attention_tile import AttentionTile
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

SHAPES = {
    "digits": (Shape(1, 4, 65, 65, 16), AttentionTile(1, 2)),
    "deit": (DEIT, AttentionTile(4, 1)),
    "deit_one_row": (replace(DEIT, rows=1), AttentionTile(1, 4)),
    "deit_shared": (DEIT, AttentionTile(1, 4)),
    "swin": (Shape(4, 3, 49, 49, 32, bias=True, masks=1), AttentionTile(4, 1)),
    "swin_shared": (Shape(4, 3, 49, 49, 32, bias=True, masks=1), AttentionTile(2, 2)),
    "swin_small": (Shape(4, 2, 16, 16, 32, bias=True), AttentionTile(4, 1)),
}
DTYPES = [("int8", "int8", "int16", "int16"), ("int16", "int8", "int16", "int16"),
          ("int16", "int16", "int16", "int16"), ("int16", "int16", "int16", "int8"),
          ("int8", "int8", "int8", "int16")]
"""q, k, p, v; those that take most registers."""


ARCHS = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"]


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_no_local_memory(arch: str) -> None:
    """Each shape with one mix of dtypes; five architectures go through all five mixes."""
    funcs = {}
    for index, (name, (shape, tile)) in enumerate(SHAPES.items()):
        q, k, p, v = DTYPES[(index + ARCHS.index(arch)) % len(DTYPES)]
        one = replace(shape, q=q, k=k, p=p, v=v, out=v)
        func = attention(*make(one, "narrow").members, tile=tile)
        assert func is not None
        funcs[name] = func
    _, resources = compile_cuda(cuda_source(funcs, resolve_cuda_target(arch)), arch)
    assert len(resources) == len(funcs)
    assert [name for name, found in resources.items() if found.spills] == []


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("name", CASES)
def test_resources(name: str, arch: str) -> None:
    """20 warps fit a multiprocessor's 65536 registers, 16 where q, k and v are of 16 bits."""
    shape, tile = CASES[name]
    func = attention(*make(shape, "narrow").members, tile=tile)
    assert func is not None
    source = cuda_source({"attention": func}, resolve_cuda_target(arch))
    _, resources = compile_cuda(source, arch)
    (found,) = resources.values()
    assert found.spill_stores == found.spill_loads == found.stack == 0
    assert found.registers <= (128 if name == "deit16" else 96)
    (text,) = ptx(source, arch).values()
    assert ("mma.sync.aligned.m16n8k32" if arch != "sm_75" else "mma.sync.aligned.m8n8k16") in text
    assert not any(f".{kind} " in text for kind in ("f32", "f64", "f16", "local"))
