"""Golden inputs: 16-bit codes on a grid of 256 values, 8-bit codes as they are."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_vitq.artifact.golden import expand, on_grid, shrink


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_8_bit_codes_are_stored_as_they_are(dtype):
    info = np.iinfo(dtype)
    codes = np.arange(info.min, info.max + 1).astype(dtype)
    stored, shift = shrink(on_grid(codes, int(info.min), int(info.max)))
    assert shift == 0
    np.testing.assert_array_equal(expand(stored, shift, dtype), codes)


@pytest.mark.parametrize("limit", [3, 127, 128, 1000, 32767])
def test_16_bit_codes_take_one_byte_and_stay_in_range(limit):
    codes = np.linspace(-limit, limit, 999).astype("int16")
    grid = on_grid(codes, -limit, limit)
    stored, shift = shrink(grid)
    assert stored.dtype.itemsize == 1 or shift == 0
    np.testing.assert_array_equal(expand(stored, shift, "int16"), grid)
    assert np.abs(grid.astype(int)).max() <= limit
    assert np.abs(grid.astype(int) - codes).max() <= max(0, (2 << max(limit.bit_length() - 8, 0)))
