"""Launches that overlap: the tag that makes them so, and what they may read before the wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tvm_ffi
from tvm import relax, tirx

from relay_passes.check_launches import check_launches
from relay_passes.errors import VitqError
from schedules.cuda.emulate import EmulationError, Emulator
from schedules.cuda.lower import lower
from schedules.cuda.overlap import TAG, overlapping
from schedules.cuda.target import resolve_cuda_target
from schedules.cuda.tile import CudaTile
from schedules.cuda.writer import EARLY
from tests.helpers.cuda import emulator
from tests.helpers.cuda_linear import LinearCase, check, linear_case, scheduled

TARGET = resolve_cuda_target("sm_90a")


def text(value: bytes) -> bytes:
    return len(value).to_bytes(8, "little") + value


def function(name: bytes, tags: Sequence[bytes]) -> bytes:
    parameters = (2).to_bytes(8, "little") + b"\x03\x40\x01\x00" * 2
    numbers = (1).to_bytes(8, "little") + b"\x05\x00\x00\x00"
    return (text(name) * 2 + parameters + len(tags).to_bytes(8, "little")
            + b"".join(map(text, tags)) + numbers)


def test_each_kernel_gets_the_tag() -> None:
    """Before what must be the last; everything else stays."""
    dynamic = b"tirx.use_dyn_shared_memory"
    kernels = [(b"a", [b"blockIdx.x", b"threadIdx.x", dynamic]), (b"bb", [b"threadIdx.x"]),
               (b"", [])]
    count = len(kernels).to_bytes(8, "little")
    found = overlapping(count + b"".join(function(*kernel) for kernel in kernels))
    assert found == count + b"".join([
        function(b"a", [b"blockIdx.x", b"threadIdx.x", TAG, dynamic]),
        function(b"bb", [b"threadIdx.x", TAG]), function(b"", [TAG])])
    with pytest.raises(ValueError, match="not as TVM"):
        overlapping(found + b"\x00")


def linear() -> tuple[LinearCase, tirx.PrimFunc]:
    case = linear_case(rows=70, columns=64, depth=200, kind="requant_add", out_dtype="int16",
                       gather="both")
    return case, scheduled(case, CudaTile(64, 64, 64, 4, 1, 3, wgmma=True))


def test_constants_are_read_early() -> None:
    case, func = linear()
    names = [str(param.name) for param in func.params]
    assert [names[i] for i in func.attrs[EARLY]] == ["w", "bias", "mult", "shift", "rows"]
    _, kernels = lower({"k": func}, TARGET)
    assert kernels["k"].early == tuple(func.attrs[EARLY])
    check(emulator({"k": func}, "sm_90a"), "k", case)


WAIT = "  vitq_wait_for_launches();\n"


@pytest.mark.parametrize("instead,error", [
    ("", "before the wait"),  # none waits
    ("  if (threadIdx.x >= 32) vitq_wait_for_launches();\n", "while others|before the wait"),
    ("  static_cast<void>(*(volatile signed char*)x_ptr);\n" + WAIT, "x is accessed before"),
    ("  *(volatile short*)out_ptr = 0;\n" + WAIT, "out is accessed before the wait")])
def test_what_is_read_too_early_shows(instead: str, error: str) -> None:
    case, func = linear()
    source, kernels = lower({"k": func}, TARGET)
    assert source.count(WAIT) == 1
    # That kernels of a text wait at all is seen by its words.
    changed = source.replace(WAIT, instead) + "// vitq_wait_for_launches();\n"
    ready = Emulator.of_source(changed, kernels, "sm_90a")
    with pytest.raises(EmulationError, match=error):
        ready.run("k", *case.inputs, np.zeros_like(case.expected))


def test_what_is_read_early_must_be_constant() -> None:
    _, func = linear()
    for constant in (True, False):
        builder = relax.BlockBuilder()
        kernel = builder.add_func(func.with_attr("global_symbol", "k"), "k")
        shapes = [([int(e) for e in p.shape], str(p.dtype)) for p in func.params]
        given = [relax.Var(f"v{i}", relax.TensorType(*shape))
                 for i, shape in enumerate(shapes[:-1])]
        arguments = [relax.const(np.zeros(*shapes[i])) if constant and i in func.attrs[EARLY]
                     else var for i, var in enumerate(given)]
        with builder.function("main", given):
            with builder.dataflow():
                call = relax.call_tir(kernel, arguments, out_ty=relax.TensorType(*shapes[-1]))
                out = builder.emit_output(call)
            builder.emit_func_output(out)
        mod = builder.get()
        if constant:
            assert tvm_ffi.structural_equal(check_launches()(mod), mod)
        else:
            with pytest.raises(VitqError, match="k reads w while earlier launches may run"):
                check_launches()(mod)
