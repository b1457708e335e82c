"""Row and elementwise operators scheduled for x86 equal their plain definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from schedules.apply import schedule_function
from schedules.isa import isa_for, resolve_target

TARGETS = ["x86-64-v3", "native"]


def _run(func: Any, target: tvm.target.Target, x: np.ndarray, out: np.ndarray) -> np.ndarray:
    args = [tvm.runtime.tensor(v) for v in (x, np.zeros_like(out))]
    tvm.compile(func, target=target)["main"](*args)
    return args[-1].numpy()


def _compare(
    shape: tuple[int, ...], make: Callable[[te.Tensor], te.Tensor], name: str, expect: str = ""
) -> None:
    x = te.placeholder(shape, "int16", name="x")
    out = make(x)
    func = te.create_prim_func([x, out])
    codes = np.random.default_rng(0).integers(-32768, 32768, shape).astype("int16")
    codes.flat[:2] = -32768, 32767
    result = np.zeros([int(n) for n in out.shape], str(out.dtype))
    target = resolve_target(name)
    scheduled = schedule_function(func, isa_for(target))
    text = scheduled.script()
    assert "int16x" in text and expect in text
    np.testing.assert_array_equal(
        _run(scheduled, target, codes, result), _run(func, target, codes, result))


def _centre(x: te.Tensor) -> te.Tensor:
    """Softmax's shape of stages: row maximum, row sum, a division a row, an element stage."""
    *rows, n = x.shape
    k, j = te.reduce_axis((0, n), "k"), te.reduce_axis((0, n), "j")
    top = te.compute(rows, lambda *i: te.max(x(*i, k), axis=k), name="top")
    gap = te.compute(
        x.shape,
        lambda *i: te.min(top(*i[:-1]).astype("int32") - x(*i).astype("int32"), 1000) + 1,
        name="gap")
    total = te.compute(rows, lambda *i: te.sum(gap(*i, j), axis=j), name="total")
    factor = te.compute(rows, lambda *i: te.floordiv(tirx.const(2**24, "int32"), total(*i)),
                        name="factor")
    return te.compute(x.shape, lambda *i: (gap(*i) * factor(*i[:-1]) >> 10).astype("int16"),
                      name="out")


def _squares(x: te.Tensor) -> te.Tensor:
    """LayerNorm's: a 64-bit sum, high halves of products."""
    *rows, n = x.shape
    k = te.reduce_axis((0, n), "k")
    total = te.compute(
        rows,
        lambda *i: te.sum((x(*i, k).astype("int32") * x(*i, k).astype("int32")).astype("int64"),
                          axis=k), name="total")
    root = te.compute(rows, lambda *i: (total(*i) >> 20).astype("int32"), name="root")
    return te.compute(
        x.shape,
        lambda *i: ((x(*i).astype("int64") * 65536 * root(*i[:-1]).astype("int64")) >> 32
                    ).astype("int32"),
        name="out")


def _cubic(x: te.Tensor) -> te.Tensor:
    """GELU's: 15-bit fractions, whose rounded products are one instruction."""
    def element(*i: Any) -> Any:
        w = te.min(te.max(x(*i).astype("int32"), 0 - x(*i).astype("int32")), 32767)
        inner = ((w * 15985 + 16384) >> 15) - 26923
        return te.max(te.min(((w * inner + 16384) >> 15) + 300, 127), -128).astype("int8")

    return te.compute(x.shape, element, name="out")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(3, 7, 197), (1, 19, 5), (2, 33, 64)], ids=str)
@pytest.mark.parametrize("make", [_centre, _squares], ids=["softmax", "layer_norm"])
def test_rows(target: str, shape: tuple[int, ...], make: Any) -> None:
    _compare(shape, make, target)


@pytest.mark.parametrize("target", TARGETS)
def test_rounded_products_are_one_instruction(target: str) -> None:
    _compare((2, 40, 96), _cubic, target, "pmul.hr.sw")
