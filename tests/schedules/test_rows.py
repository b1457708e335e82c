"""Row and elementwise operators scheduled for x86 equal their plain definitions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx

from relay_passes.dialect.gelu import gelu
from relay_passes.dialect.layer_norm import layer_norm
from relay_passes.dialect.softmax import softmax
from schedules.apply import ApplySchedules, schedule_function
from schedules.isa import isa_for, resolve_target
from tests.helpers.dialect import module

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


def _built(x: np.ndarray, body: Callable[..., Any], name: str) -> tuple[str, str]:
    """Return (TIR, machine code) of the kernel of a one-operator module."""
    target = resolve_target(name)
    passes = [relax.transform.LegalizeOps(), ApplySchedules(isa_for(target))]
    mod = tvm.transform.Sequential(passes)(module([x], body))
    (kernel,) = [f for f in mod.functions.values() if isinstance(f, tirx.PrimFunc)]
    library = tvm.compile(kernel.with_attr("global_symbol", "main"), target=target)
    return kernel.script(), library.mod.inspect_source("asm")


def _loops(asm: str, instruction: str) -> list[Counter[str]]:
    """Return the instructions of the innermost loops that hold ``instruction``, by mnemonic."""
    found = []
    for block in re.finditer(r"^(\.LBB\w+):((?:(?!^\.LBB).)*?)^\tj\w+\t\1$", asm, re.M | re.S):
        lines = [line.split() for line in block[2].splitlines() if line.startswith("\t")]
        names = Counter(line[0] for line in lines if not line[0].startswith("."))
        if names[instruction]:
            found.append(names)
    return found


def test_gelu_stays_in_words() -> None:
    """A vector of 16 codes: 13 products, no 32-bit lane, a saturating pack."""
    x = np.zeros([1, 12, 768], "int16")
    _, asm = _built(x, lambda v: gelu(v, 5e-4, 0, 0.02, -108, -128, 127, "int8", "poly"),
                    "x86-64-v3")
    (loop,) = _loops(asm, "vpmulhrsw")
    products = sum(loop[name] for name in ("vpmulhrsw", "vpmullw", "vpmulhuw"))
    assert (loop["vpmulhrsw"], products, loop["vpacksswb"]) == (9, 13, 1)
    assert not any(name.endswith(("d", "dq")) and name.startswith(("vpmul", "vpadd"))
                   for name in loop)


def test_softmax_exponentials_stay_in_words() -> None:
    x = np.zeros([1, 12, 197], "int16")
    _, asm = _built(x, lambda v: softmax(v, 1 / 1500, 2.0**-15, 32767, "int16", "poly"),
                    "x86-64-v3")
    (loop,) = _loops(asm, "vpshufb")
    assert (loop["vpmulhuw"], loop["vpmullw"], loop["vpmulhrsw"], loop["vpmaddwd"]) == (1, 1, 4, 1)
    assert not loop["vpmulld"] and not loop["vpmuldq"] and not loop["vpsrlvd"]


def test_layer_norm_takes_high_halves_by_one_instruction_each() -> None:
    """Two vectors of 8 columns, two high products, even and odd lanes: 8 ``vpmuldq``."""
    x = np.zeros([1, 12, 192], "int16")
    ones = np.ones(192)
    _, asm = _built(x, lambda v: layer_norm(v, 1e-3, ones, ones, 1e-6, 0.03, 5, -128, 127, "int8"),
                    "x86-64-v3")
    (loop,) = [loop for loop in _loops(asm, "vpmuldq") if loop["vpacksswb"]]
    assert loop["vpmuldq"] == 8 and not loop["vpmuludq"]


@pytest.mark.parametrize("scales", [(1e-3, 0.02), (2e-3, 0.01)], ids=str)
def test_kernels_do_not_depend_on_scales(scales: tuple[float, float]) -> None:
    """Layers of one shape share their code: what differs are constant arguments."""
    step, out = scales
    x, first = np.zeros([1, 12, 64], "int16"), (5e-4, 0.03)
    for body in (
        lambda v, s, o: gelu(v, s, 0, o, -100, -128, 127, "int8", "poly"),
        lambda v, s, _: softmax(v, s, 2.0**-15, 32767, "int16", "poly"),
    ):
        other, same = (_built(x, lambda v, b=body, p=p: b(v, *p), "native")[0]
                       for p in (first, (step, out)))
        assert other == same


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("length", [7, 33, 197])
def test_sums_of_squares_at_their_largest(target: str, length: int) -> None:
    """Two squares of -2^15 are 2^31 in one 32-bit lane, which is taken as unsigned."""
    x = te.placeholder((3, length), "int16", name="x")
    func = te.create_prim_func([x, _squares(x)])
    codes = np.full((3, length), -32768, "int16")
    codes[1, ::2] = 32767
    where = resolve_target(target)
    result = np.zeros((3, length), "int32")
    np.testing.assert_array_equal(
        _run(schedule_function(func, isa_for(where)), where, codes, result),
        _run(func, where, codes, result))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("length", [8, 40, 197])
def test_word_operations_at_every_code(target: str, length: int) -> None:
    """High words, powers of two, magnitudes and sums modulo 2^16 equal their plain definitions."""
    def element(x: te.Tensor, *i: Any) -> Any:
        code = x(*i).astype("int32")
        size = te.max(code, 0 - code).astype("uint16")
        wide = size.astype("uint32") * tirx.const(65535, "uint32")
        high = (wide >> tirx.const(16, "uint32")).astype("int32")
        power = tirx.const(-(2**15), "int32") >> ((high >> 11) & 15)
        rounded = ((te.max(code, -32767) * power + 2**14) >> 15)
        return ((code * 3 - rounded).astype("uint16").astype("int32") - high).astype("int32")

    rows = -(-65536 // length)
    x = te.placeholder((rows, length), "int16", name="x")
    out = te.compute(x.shape, lambda *i: element(x, *i), name="out")
    func = te.create_prim_func([x, out])
    codes = np.resize(np.arange(-32768, 32768), (rows, length)).astype("int16")
    where = resolve_target(target)
    result = np.zeros((rows, length), "int32")
    scheduled = schedule_function(func, isa_for(where))
    assert "pmulhu" in scheduled.script()
    np.testing.assert_array_equal(
        _run(scheduled, where, codes, result), _run(func, where, codes, result))
