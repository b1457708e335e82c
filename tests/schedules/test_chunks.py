"""Rows cut into parts: the same results, whatever the order of the pieces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.gemm import GemmSpec, Tile, row_chunks
from tests.helpers.kernels import make_linear, make_matmul

TARGETS = ["x86-64-v3", "native"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("rows,chunks", [(197, 4), (50, 7), (9, 3), (3, 8)])
def test_linear(target: str, by_rows: bool, rows: int, chunks: int) -> None:
    tile = Tile(4, 3, expand=True, chunks=chunks, by_rows=by_rows)
    for gather in ("", "both"):
        kernel = make_linear(rows, 100, 66, target, "requant_add", out_dtype="int16", tile=tile,
                             gather=gather, extreme=True)
        np.testing.assert_array_equal(kernel.run(), kernel.expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["acc", "requant_add"])
def test_matmul(target: str, kind: str) -> None:
    kernel = make_matmul((3, 29, 37, 40), target, True, kind=kind, tile=Tile(4, 2, chunks=3),
                         axes=((1, 0, 2), (1, 0, 2), (1, 0, 2)))
    np.testing.assert_array_equal(kernel.run(), kernel.expected)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 12), st.integers(1, 64))
def test_parts_cover_all_rows(total: int, rows: int, chunks: int) -> None:
    count, part = row_chunks(total, Tile(rows, 2, chunks=chunks))
    assert 1 <= count <= chunks and part <= total
    assert (count - 1) * part < total <= count * part


def test_a_spec_without_a_tile_says_nothing_of_it() -> None:
    from schedules.gemm import Epilogue

    plain = GemmSpec("packed_linear", Epilogue())
    assert "tile" not in plain.to_json()
    tiled = GemmSpec("packed_linear", Epilogue(), tile=Tile(3, 2, chunks=4, by_rows=True))
    assert GemmSpec.from_json(tiled.to_json()) == tiled
    assert GemmSpec.from_json(plain.to_json()) == plain
