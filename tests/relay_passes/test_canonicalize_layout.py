"""Layout rules: every chain of reshapes, permutes and slices has one spelling."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.relax import op as R

from relay_passes.canonicalize.layout import Chain, normal_form
from tests.relay_passes.canonical_helpers import assert_canonical_form, const, function


def test_detour_through_merged_axes_disappears() -> None:
    def before(e, x):
        flat = e(R.reshape(x, (10, 6)))
        heads = e(R.permute_dims(e(R.reshape(flat, (1, 10, 2, 3))), [0, 2, 1, 3]))
        merged = e(R.reshape(heads, (2, 10, 3)))
        return e(R.reshape(merged, (1, 2, 10, 3)))

    def expected(e, x):
        return e(R.permute_dims(e(R.reshape(x, (1, 10, 2, 3))), [0, 2, 1, 3]))

    assert_canonical_form(function((1, 10, 6), before), function((1, 10, 6), expected))


def test_chain_that_does_nothing_disappears() -> None:
    def before(e, x):
        y = e(R.expand_dims(e(R.permute_dims(x, [1, 0, 2])), [0]))
        return e(R.nn.softmax(e(R.permute_dims(e(R.squeeze(y, [0])), [1, 0, 2]))))

    assert_canonical_form(
        function((4, 5, 6), before), function((4, 5, 6), lambda e, x: e(R.nn.softmax(x)))
    )


def test_take_of_one_token_is_a_slice() -> None:
    def before(e, x):
        return e(R.take(x, const(0, "int64"), axis=1))

    def expected(e, x):
        return e(R.reshape(e(R.strided_slice(x, [1], [0], [1], [1])), (2, 6)))

    assert_canonical_form(function((2, 5, 6), before), function((2, 5, 6), expected))


def test_negative_index_counts_from_the_end() -> None:
    def before(e, x):
        return e(R.take(x, const(-1, "int64"), axis=1))

    def expected(e, x):
        return e(R.reshape(e(R.strided_slice(x, [1], [4], [5], [1])), (2, 6)))

    assert_canonical_form(function((2, 5, 6), before), function((2, 5, 6), expected))


def test_roll_by_computed_indices_is_two_slices() -> None:
    def before(e, x):
        index = e(R.add(e(R.arange(0, 8, 1, dtype="int64")), const(3, "int64")))
        return e(R.take(x, e(R.mod(index, const(8, "int64"))), axis=1))

    def expected(e, x):
        parts = [
            e(R.strided_slice(x, [1], [3], [8], [1])),
            e(R.strided_slice(x, [1], [0], [3], [1])),
        ]
        return e(R.concat(parts, axis=1))

    assert_canonical_form(function((1, 8, 4), before), function((1, 8, 4), expected))


def test_split_and_concat_in_order_cancel() -> None:
    def before(e, x):
        parts = e(R.split(x, 2, axis=1))
        first, second = e(R.reshape(parts[0], (1, 12))), e(R.reshape(parts[1], (1, 12)))
        return e(R.nn.softmax(e(R.concat([first, second], axis=1))))

    def expected(e, x):
        return e(R.nn.softmax(e(R.reshape(x, (1, 24)))))

    assert_canonical_form(function((1, 4, 6), before), function((1, 4, 6), expected))


def test_slice_inside_one_part_of_a_concat() -> None:
    def before(e, x):
        y = e(R.nn.softmax(x))
        joined = e(R.concat([x, y], axis=1))
        return e(R.strided_slice(joined, [1], [3], [5], [1]))

    def expected(e, x):
        return e(R.strided_slice(e(R.nn.softmax(x)), [1], [0], [2], [1]))

    assert_canonical_form(function((1, 3, 6), before), function((1, 3, 6), expected))


def test_strided_slices_are_slices_of_a_split_axis() -> None:
    """Patch merging spelled x[:, 1::2]."""

    def before(e, x):
        return e(R.strided_slice(x, [1], [1], [8], [2]))

    def expected(e, x):
        pairs = e(R.reshape(x, (1, 4, 2, 4)))
        return e(R.reshape(e(R.strided_slice(pairs, [2], [1], [2], [1])), (1, 4, 4)))

    assert_canonical_form(function((1, 8, 4), before), function((1, 8, 4), expected))


def test_padding_by_nothing_is_dropped_and_zeros_are_constants() -> None:
    def before(e, x):
        same = e(R.nn.pad(x, [0, 0, 0, 0]))
        return e(R.nn.pad(same, [0, 0, 0, 2]))

    def expected(e, x):
        return e(R.concat([x, const(np.zeros((3, 2)))], axis=1))

    assert_canonical_form(function((3, 4), before), function((3, 4), expected))


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]]:
    """A shape and a chain of reshapes (between factorisations of one size) and permutes."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4, 5]), min_size=1, max_size=5))

    def grouped(values: list[int]) -> tuple[int, ...]:
        cuts = sorted(draw(st.sets(st.integers(1, len(values)), max_size=len(values))))
        bounds = [0, *cuts, len(values)]
        return tuple(math.prod(values[a:b]) for a, b in itertools.pairwise(bounds))

    shape = grouped(factors)
    steps: list[tuple[str, tuple[int, ...]]] = []
    current = shape
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            axes = tuple(draw(st.permutations(range(len(current)))))
            steps.append(("permute", axes))
            current = tuple(current[a] for a in axes)
        else:
            split = [f for n in current for f in draw(st.sampled_from([[n], [1, n], _halves(n)]))]
            current = grouped(split)
            steps.append(("reshape", current))
    return shape, steps


def _halves(n: int) -> list[int]:
    return [2, n // 2] if n % 2 == 0 else [n]


def _apply(x: np.ndarray, steps: list[tuple[str, tuple[int, ...]]]) -> np.ndarray:
    for op, arg in steps:
        x = x.transpose(arg) if op == "permute" else x.reshape(arg)
    return x


@given(chains())
@settings(max_examples=300, deadline=None)
def test_normal_form_moves_elements_as_the_chain_does(chain) -> None:
    shape, steps = chain
    traced = Chain(shape)
    if not all(
        traced.permute(arg) if op == "permute" else traced.reshape(arg) for op, arg in steps
    ):
        return
    x = np.arange(math.prod(shape)).reshape(shape)
    form = normal_form(traced)
    assert np.array_equal(_apply(x, form), _apply(x, steps))
    assert len(form) <= 3
    again = Chain(shape)
    for op, arg in form:
        assert again.permute(arg) if op == "permute" else again.reshape(arg)
    assert normal_form(again) == form
