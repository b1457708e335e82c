"""Row and elementwise operators scheduled for AArch64 equal the int64 reference, under qemu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import te

from schedules.apply import schedule_function
from schedules.isa import isa_for, resolve_target
from tests.helpers.arm import LEVELS, different, emulator, needs_qemu
from tests.helpers.kernels import Case

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


@pytest.mark.parametrize("target", LEVELS)
def test_a_table_is_tbl(target: str) -> None:
    asm = look_up((1, 33, 50), "int8", "int8", target).build().asm
    assert asm.count("\ttbl\t") >= 1 and asm.count("\ttbx\t") == 3 * asm.count("\ttbl\t")
