"""Packing keeps every weight; the fast requantisation is taken only where it is exact."""

from __future__ import annotations

import numpy as np
import pytest

from schedules.dot import dot_named
from schedules.gemm import Epilogue, GemmSpec, row_tiles
from schedules.packing import narrow_form, pack, pad_columns, unpack
from tests.helpers.kernels import rq


@pytest.mark.parametrize("shape", [(5, 7), (64, 32), (1, 1), (33, 100)], ids=str)
@pytest.mark.parametrize("nt,kv", [(16, 2), (32, 4), (8, 4)])
def test_pack_round_trip(shape: tuple[int, int], nt: int, kv: int) -> None:
    w = np.random.default_rng(0).integers(-127, 128, shape).astype("int8")
    packed = pack(w, nt, kv)
    assert packed.dtype == np.int8
    assert packed.size == -(-shape[0] // kv) * kv * -(-shape[1] // nt) * nt
    assert int(np.abs(packed.astype(int)).sum()) == int(np.abs(w.astype(int)).sum())
    np.testing.assert_array_equal(unpack(packed, *shape), w)


@pytest.mark.parametrize("name", ["mma8", "mma16"])
@pytest.mark.parametrize("shape", [(5, 7), (64, 32), (33, 100)], ids=str)
def test_pack_in_the_slots_of_a_sequence(shape: tuple[int, int], name: str) -> None:
    dot = dot_named(name)
    w = np.random.default_rng(0).integers(-127, 128, shape).astype("int8")
    packed = pack(w, 32, 16, dot)
    np.testing.assert_array_equal(unpack(packed, *shape, dot), w)
    k, n = shape[0] - 1, shape[1] - 1
    place = n // 32, k // 16, dot.column_slot(n % 32), dot.channel_slot(k % 16)
    assert packed[place] == w[k, n]
    assert sorted(dot.column_slot(np.arange(32))) == list(range(32))
    assert sorted(dot.channel_slot(np.arange(16))) == list(range(16))


def test_pad_columns() -> None:
    np.testing.assert_array_equal(pad_columns(np.array([1, 2, 3]), 4, 9), [1, 2, 3, 9])


@pytest.mark.parametrize("seed", range(20))
def test_narrow_form_says_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bound = int(2 ** rng.uniform(1, 31))
    mult = rng.integers(-(2**31) + 1, 2**31, 50)
    mult[::7] = 0
    shift = rng.integers(1, 63, 50) if seed % 2 else rng.integers(30, 50, 50)
    new_mult, new_shift, flags = narrow_form(mult, shift, bound, 3)
    for value in (-bound, -1, 0, 1, bound - 1):
        np.testing.assert_array_equal(rq(value, mult, shift), rq(value, new_mult, new_shift))
    if flags["narrow"]:
        assert (new_shift + flags["lift"] >= 32).all() and (new_shift + flags["lift"] <= 62).all()
        assert bound << flags["lift"] < 2**31


@pytest.mark.parametrize("total", [1, 5, 7, 13, 49, 64, 196, 197, 1000])
@pytest.mark.parametrize("most", [1, 3, 6, 12, 24])
def test_row_tiles_cover_every_row(total: int, most: int) -> None:
    rows: set[int] = set()
    for start, count, height in row_tiles(total, most):
        assert height <= most
        for tile in range(count):
            first = min(start + tile * height, total - height)
            rows |= set(range(first, first + height))
    assert rows == set(range(total))


def test_spec_travels_as_text() -> None:
    spec = GemmSpec("linear", Epilogue("requant", 3, -128, 127, "int8"), "vpmaddwd256", 2)
    assert GemmSpec.from_json(spec.to_json()) == spec
