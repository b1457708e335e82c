"""The attention kernel, emulated, equals int64 NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.cuda.attention import attention, problem_of
from schedules.cuda.attention_expression import NotTaken
from schedules.cuda.attention_tile import AttentionTile, default_tile
from schedules.cuda.emulate import Counts, Emulator
from schedules.cuda.target import resolve_cuda_target
from tests.helpers.attention import Attention, Shape, make
from tests.helpers.dialect import extreme

DEIT = Shape(1, 2, 197, 197, 64)
SWIN = Shape(3, 2, 49, 49, 32, bias=True)
SMALL = Shape(2, 1, 17, 45, 32)


def emulator(case: Attention, tile: AttentionTile | None = None, arch: str = "sm_80",
             positions: list[int] | None = None) -> Emulator:
    func = attention(*case.members, tile=tile, positions=positions)
    assert func is not None
    return Emulator({"attention": func}, resolve_cuda_target(arch))


def run(kernel: Emulator, case: Attention, seed: int = 0) -> Counts:
    out = np.full(case.expected.shape, 77, case.expected.dtype)
    arguments = [np.ascontiguousarray(array) for array in case.arguments]
    counts = kernel.run("attention", *arguments, out, seed=seed)
    np.testing.assert_array_equal(out, case.expected)
    assert len(np.unique(out)) > 2 or out.size < 100
    return counts


def check(shape: Shape, how: str = "random", tile: AttentionTile | None = None,
          arch: str = "sm_80") -> Counts:
    case = make(shape, how)
    return run(emulator(case, tile, arch), case)


@pytest.mark.parametrize("change", [
    {}, {"q": "int16"}, {"k": "int16"}, {"v": "int16", "out": "int16"},
    {"q": "int16", "k": "int16", "v": "int16", "out": "int16"}, {"p": "uint8"},
    {"p": "uint8", "scores": "int8", "v": "int16"}, {"q": "uint8", "v": "uint8", "p": "int8"},
], ids=str)
def test_deit(change: dict[str, str]) -> None:
    """Every mix of codes that the recipes make, heads inside the rows."""
    check(replace(DEIT, **change), "narrow")


@pytest.mark.parametrize("change", [
    {}, {"masks": 1}, {"masks": 2, "v": "int16", "out": "int16"},
    {"res_mult": 1431655765, "res_shift": 31}, {"res_shift": 32},
    {"folded": False, "zero_point": -5}, {"scores": "int8", "in_scale": 0.1},
], ids=str)
def test_swin(change: dict[str, object]) -> None:
    """Windows with position bias and masks."""
    check(replace(SWIN, **change))


@pytest.mark.parametrize("method", ["shift", "poly", "table"])
@pytest.mark.parametrize("scale", [0.0005, 0.3], ids=["flat", "steep"])
def test_softmax_families(method: str, scale: float) -> None:
    """The expressions are the operator's own."""
    check(replace(SMALL, method=method, in_scale=scale))


@pytest.mark.parametrize("depth,columns", [(6, 10), (20, 12), (32, 40), (80, 80), (128, 64)])
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_channels(depth: int, columns: int, dtype: str) -> None:
    """Also rows that no word is aligned in."""
    check(replace(SMALL, heads=2, depth=depth, columns=columns, q=dtype, k=dtype, v=dtype,
                  out=dtype), "narrow")


@pytest.mark.parametrize("keys", [1, 8, 31, 32, 50, 256, 257, 577])
def test_keys(keys: int) -> None:
    check(replace(SMALL, rows=9, keys=keys))


@pytest.mark.parametrize("rows", [1, 16])
def test_few_rows(rows: int) -> None:
    """Class attention, and only the rows that are read."""
    check(replace(SMALL, heads=3, rows=rows, keys=197, depth=64, folded=False))


@pytest.mark.parametrize("tile", [AttentionTile(1, 1), AttentionTile(3, 1), AttentionTile(2, 2),
                                  AttentionTile(1, 4), AttentionTile(2, 8)], ids=str)
@pytest.mark.parametrize("keys", [20, 96, 197])
def test_tiles_change_no_bit(tile: AttentionTile, keys: int) -> None:
    """Also warps without keys, and blocks with more rows than there are."""
    check(replace(SMALL, batch=3, keys=keys, depth=64, v="int16", out="int16"), "narrow", tile)


@pytest.mark.parametrize("shift,out_shift", [(18, 20), (31, 40), (45, 33), (40, 60)])
def test_any_shift(shift: int, out_shift: int) -> None:
    case = make(replace(SMALL, shift=shift, out_shift=out_shift, out="int16"))
    kernel = emulator(case)
    out = np.zeros(case.expected.shape, case.expected.dtype)
    kernel.run("attention", *(np.ascontiguousarray(a) for a in case.arguments), out)
    np.testing.assert_array_equal(out, case.expected)


def test_oldest_architecture() -> None:
    check(replace(SMALL, q="int16"), "narrow", arch="sm_75")


HARD = Shape(2, 2, 3, 37, 32, bias=True, masks=1, in_scale=0.001)


@pytest.fixture(scope="module")
def hard() -> Emulator:
    return emulator(make(HARD))


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(["random", "extreme"]), st.integers(0, 2**16))
def test_extreme_codes(hard: Emulator, data: st.DataObject, how: str, seed: int) -> None:
    operands = [data.draw(extreme((2, length, 2, 32), "int8")) for length in (3, 37, 37)]
    case = make(HARD, how, 0, operands)
    out = np.zeros(case.expected.shape, case.expected.dtype)
    hard.run("attention", *(np.ascontiguousarray(a) for a in case.arguments), out, seed=seed)
    np.testing.assert_array_equal(out, case.expected)


def test_products_are_counted() -> None:
    """Two steps of 32 channels for each tile of keys; two planes of P for each tile of V."""
    counts = check(DEIT, tile=AttentionTile(1, 1))
    groups = 2 * 13
    assert counts.mma == groups * (25 * 2 + 7 * 8 * 2)
    assert counts.ldmatrix == counts.copies == 0


@pytest.mark.parametrize("seed", range(3))
def test_order_of_threads(seed: int) -> None:
    """Warps that share rows exchange what they have behind barriers."""
    case = make(replace(SMALL, rows=33, keys=130, depth=64))
    run(emulator(case, AttentionTile(2, 4)), case, seed)


def test_default_tile() -> None:
    assert default_tile(3 * 13, 197) == AttentionTile(1, 4)
    assert default_tile(6 * 64 * 13, 197) == AttentionTile(4, 1)
    assert default_tile(12, 577).split == 8
    assert all(default_tile(groups, keys).shared(keys) <= 64 * 1024
               for groups in (1, 100, 10000) for keys in (1, 49, 197, 577, 1024, 1500))


def test_what_is_not_taken() -> None:
    """Members stay apart where there is no form for them."""
    good = make(SMALL)
    assert attention(*make(replace(SMALL, keys=2500)).members) is None
    assert attention(good.scores, [good.softmax], good.softmax, good.context) is None
    one_head = make(replace(SMALL, heads=1, masks=1))
    assert attention(*one_head.members) is None
    run(emulator(one_head, positions=[0]), one_head)
    with pytest.raises(NotTaken, match="context"):
        problem_of(good.scores, [], good.softmax, good.scores)
