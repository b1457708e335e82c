"""Row and elementwise operators scheduled for AArch64 equal the int64 reference, under qemu."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, te

from relay_passes.dialect.exponent import METHODS
from relay_passes.dialect.gelu import gelu
from relay_passes.dialect.layer_norm import layer_norm
from relay_passes.dialect.softmax import softmax
from schedules.apply import ApplySchedules, schedule_function
from schedules.isa import isa_for, resolve_target
from tests.helpers.arm import COMPILER, LEVELS, different, emulator, needs_qemu
from tests.helpers.dialect import module
from tests.helpers.kernels import Case
from tests.helpers.nonlinear import hard_rows
from tvm_vitq.reference.interpreter import Interpreter

BuildOnce = Callable[..., Path]
LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


def look_up(shape: tuple[int, ...], dtype: str, out: str, target: str) -> Case:
    rng = np.random.default_rng(len(shape))
    low, high = LIMITS[dtype]
    codes = rng.integers(low, high + 1, shape).astype(dtype)
    codes.flat[: min(codes.size, 256)] = np.arange(low, high + 1)[: codes.size]
    table = rng.permutation(256).astype("uint8").view(out)
    x, t = (te.placeholder(v.shape, str(v.dtype), name=n) for n, v in (("x", codes), ("t", table)))
    result = te.compute(shape, lambda *i: t(x(*i).astype("int32") - low), name="gelu")
    where = resolve_target(target)
    func = schedule_function(te.create_prim_func([x, t, result]), isa_for(where))
    expected = table[codes.astype(int) - low]
    return Case(func, [codes, table, np.zeros_like(expected)], expected, where)


@needs_qemu
def test_table(tmp_path: Path, build_once: BuildOnce) -> None:
    cases: dict[str, Any] = {
        f"{dtype}_{out}_{i}": look_up(shape, dtype, out, "aarch64")
        for dtype in LIMITS for out in LIMITS
        for i, shape in enumerate([(1, 33, 50), (16,), (7,), (1, 1000), (3, 1024)])
    }
    counts = different(cases, tmp_path, emulator(build_once, LEVELS["aarch64"]))
    assert counts == dict.fromkeys(cases, 0)


def _operators() -> dict[str, tuple[np.ndarray, Any]]:
    """Return every nonlinear operator on rows that try the ends of the range."""
    rng = np.random.default_rng(0)
    gamma, beta = 1 + rng.standard_normal(50), rng.standard_normal(50)
    gamma[:4] = 0.0, 1e-12, -1.0, 30.0
    byte, word = (0.03, 5, -128, 127, "int8"), (2.0**-10, 0, -32767, 32767, "int16")
    found: dict[str, tuple[np.ndarray, Any]] = {}
    for dtype in ("int8", "uint8", "int16"):
        x = hard_rows(50, dtype)
        scale = 0.06 if dtype != "int16" else 2.0**-11
        for method in METHODS:
            found[f"softmax_{method}_{dtype}"] = x, partial(
                softmax, in_scale=scale, out_scale=2.0**-15, qmax=32767, out_dtype="int16",
                method=method)
            found[f"gelu_{method}_{dtype}"] = x, lambda v, s=scale, m=method: gelu(
                v, s, 0, *byte, m)
            found[f"gelu16_{method}_{dtype}"] = x, lambda v, s=scale, m=method: gelu(
                v, s, 0, *word, m, gamma[4:5])
        found[f"norm_{dtype}"] = x, lambda v: layer_norm(v, 0.004, gamma, beta, 1e-6, *byte)
        found[f"norm16_{dtype}"] = x, lambda v: layer_norm(v, 0.004, gamma, beta, 1e-6, *word)
    return found


@needs_qemu
@pytest.mark.parametrize("target", ["aarch64", "aarch64+dotprod"])
def test_nonlinear_operators(target: str, tmp_path: Path, build_once: BuildOnce) -> None:
    """All in one library: extreme rows, three families, three dtypes."""
    cases = _operators()
    functions, expected = {}, {}
    for name, (x, body) in cases.items():
        mod = module([x], body)
        expected[name] = Interpreter(mod).evaluate(x)
        functions[name] = mod["main"].with_attr("global_symbol", name)
    where = resolve_target(target)
    passes = [relax.transform.LegalizeOps(), ApplySchedules(isa_for(where))]
    kernels = tvm.transform.Sequential(passes)(tvm.IRModule(functions))
    path = tmp_path / "operators.so"
    tvm.compile(kernels, where).export_library(str(path), cc=COMPILER)
    runner = emulator(build_once, LEVELS[target])
    found = runner.call(path, [(name, [x]) for name, (x, _) in cases.items()])
    wrong = {name: int(np.sum(value != expected[name]))
             for name, value in zip(cases, found, strict=True)}
    assert wrong == dict.fromkeys(cases, 0)


@pytest.mark.parametrize("target", LEVELS)
def test_a_table_is_tbl(target: str) -> None:
    asm = look_up((1, 33, 50), "int8", "int8", target).build().asm
    assert asm.count("\ttbl\t") >= 1 and asm.count("\ttbx\t") == 3 * asm.count("\ttbl\t")
