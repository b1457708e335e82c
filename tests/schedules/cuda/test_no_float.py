"""Machine code of kernels that divide: no float instruction, as there is in ptxas' own division."""

from __future__ import annotations

import re

import pytest
from tvm import tirx

from schedules.builder import load
from schedules.cuda.attention import attention
from schedules.cuda.compile import cuda_source, sass
from schedules.cuda.target import resolve_cuda_target
from tests.helpers.attention import Shape, make
from tests.helpers.cuda import kernel, needs_nvdisasm, words
from tests.schedules.cuda.test_rows import built

FLOAT = re.compile(r"\b(?:[FDH](?:ADD|MUL|FMA|SETP|SET|MNMX|SEL|SWZ)2?|MUFU|[IU]2F|F2[IFU]|I2FP)\b")


def floats(funcs: dict[str, tirx.PrimFunc], arch: str) -> set[str]:
    """Return the floating-point instructions in the kernels' machine code."""
    code = sass(cuda_source(funcs, resolve_cuda_target(arch)), arch)
    assert len(code) == len(funcs)
    return {name for text in code.values() for name in FLOAT.findall(text)}


@needs_nvdisasm
def test_a_division_of_c_is_seen() -> None:
    func = kernel(lambda w, a, b, c: w.store(
        c, tirx.floordiv(load(a, w.thread), load(b, w.thread)), w.thread),
        [words(name, 32) for name in "abc"])
    assert "MUFU" in floats({"k": func}, "sm_80")


@needs_nvdisasm
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_none(arch: str) -> None:
    """Attention and softmax of every family, LayerNorm, and GELUs."""
    methods = ("shift", "poly", "table")
    names = ["layer_norm", *(f"{kind}_{m}" for kind in ("softmax", "gelu") for m in methods)]
    funcs = {name: built(name)[1] for name in names}
    for method in methods:
        shape = Shape(1, 3, 50, 50, 64, q="int16", method=method)
        func = attention(*make(shape).members)
        assert func is not None
        funcs[f"attention_{method}"] = func
    assert floats(funcs, arch) == set()
