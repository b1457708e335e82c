"""Device functions, emulated, equal NumPy: the fragments of mma and ldmatrix, copies, shuffles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tvm import tirx

from schedules.builder import const, load
from schedules.cuda.emulate import HEADER, Emulator
from schedules.cuda.functions import FUNCTIONS
from schedules.cuda.writer import CudaWriter, pointer
from tests.helpers.cuda import emulator, kernel, words

DTYPES = {"s8": np.int8, "u8": np.uint8}
few = settings(max_examples=25, deadline=None)


def codes(dtype: type, shape: tuple[int, ...]) -> Any:
    """Return a strategy of arrays that prefers the extremes."""
    info = np.iinfo(dtype)
    edge = st.sampled_from([info.min, info.min + 1, 0, info.max - 1, info.max])
    return arrays(dtype, shape, elements=edge | st.integers(int(info.min), int(info.max)),
                  fill=edge)


def write_mma(name: str) -> Callable[..., None]:
    """Load fragments as the module's docstring says, from plain matrices in global memory."""
    def write(w: CudaWriter, a: Any, b: Any, c: Any) -> None:
        left, right, acc = w.registers("l", 4), w.registers("r", 2), w.registers("acc", 4)
        group, pair = tirx.floordiv(w.lane, const(4, "int32")), w.lane % 4
        for i in range(4):  # words of 4 codes; a row of K has 8
            w.store(left, load(a, (group + 8 * (i % 2)) * 8 + 4 * (i // 2) + pair), i)
            at = (group + 8 * (i // 2)) * 8 + 2 * pair + i % 2
            w.store(acc, load(c, at), i)
        for i in range(2):
            w.store(right, load(b, group * 8 + 4 * i + pair), i)
        w.call(name, pointer(acc, 0), pointer(left, 0), pointer(right, 0))
        for i in range(4):
            w.store(c, load(acc, i), (group + 8 * (i // 2)) * 8 + 2 * pair + i % 2)
    return write


def write_ldmatrix(count: int) -> Callable[..., None]:
    def write(w: CudaWriter, at: Any, x: Any, y: Any) -> None:
        shared, d = w.shared("s", 512, "int32"), w.registers("d", count)
        with w.loop("i", 16) as i:
            w.store(shared, load(x, i * 32 + w.lane), i * 32 + w.lane)
        w.barrier()
        w.call(f"vitq_ldmatrix{count}", pointer(d, 0), pointer(shared, load(at, w.lane)))
        for i in range(count):
            w.store(y, load(d, i), w.lane * count + i)
    return write


def write_copies(size: int) -> Callable[..., None]:
    """Copy where the number is odd, in two groups, and wait for one, then for both."""
    each = size // 4

    def write(w: CudaWriter, valid: Any, x: Any, y: Any) -> None:
        shared = w.shared("s", 64 * each, "int32")
        for part in range(2):
            at = (part * 32 + w.thread) * each
            w.call(f"vitq_copy{size}", pointer(shared, at), pointer(x, at),
                   tirx.EQ(load(valid, part * 32 + w.thread) % 2, const(1, "int32")))
            w.call("vitq_copy_commit")
        for part in range(2):
            w.call(f"vitq_copy_wait{1 - part}")
            with w.loop("i", each, "unrolled") as i:
                at = (part * 32 + w.thread) * each + i
                w.store(y, load(shared, at), at)
    return write


def write_words(w: CudaWriter, x: Any, y: Any) -> None:
    held = w.registers("d", 4)
    for size, first in ((4, 0), (8, 32), (16, 96)):
        at = first + w.thread * (size // 4)
        w.call(f"vitq_load{size}", pointer(held, 0), pointer(x, at))
        w.call(f"vitq_store{size}", pointer(y, at), pointer(held, 0))


BINARY = {"vitq_dot4": 3, "vitq_high": 2, "vitq_bytes": 3, "vitq_pack_s8": 4, "vitq_pack_u8": 4,
          "vitq_pack_s16": 2, "vitq_divide": 2, "vitq_abs": 1, "vitq_ramp": 2}


def write_scalar(name: str) -> Callable[..., None]:
    def write(w: CudaWriter, x: Any, y: Any) -> None:
        operands = [load(x, i * 32 + w.thread) for i in range(BINARY[name])]
        w.store(y, w.value(name, *operands), w.thread)
    return write


def write_shuffles(w: CudaWriter, x: Any, y: Any) -> None:
    for bit in range(5):
        w.store(y, w.value("vitq_shuffle_xor", load(x, w.lane), 1 << bit), bit * 32 + w.lane)


@pytest.fixture(scope="module")
def device() -> Emulator:
    funcs = {}
    for a in DTYPES:
        for b in DTYPES:
            funcs[f"mma_{a}_{b}"] = kernel(write_mma(f"vitq_mma_{a}_{b}"), [
                words("a", 128), words("b", 64), words("c", 128)])
    for count in (1, 2, 4):
        funcs[f"ldmatrix{count}"] = kernel(write_ldmatrix(count), [
            words("at", 32), words("x", 512), words("y", 32 * count)])
    for size in (4, 8, 16):
        funcs[f"copy{size}"] = kernel(write_copies(size), [
            words("valid", 64), words("x", 16 * size), words("y", 16 * size)])
    for name, count in BINARY.items():
        funcs[name] = kernel(write_scalar(name), [words("x", 32 * count), words("y", 32)])
    funcs["words"] = kernel(write_words, [words("x", 224), words("y", 224)])
    funcs["shuffle"] = kernel(write_shuffles, [words("x", 32), words("y", 160)])
    return emulator(funcs)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_ramp_and_magnitude(arch: str) -> None:
    """Both forms of the ramp; at the ends of int32, too."""
    ready = emulator({name: kernel(write_scalar(name), [
        words("x", 32 * BINARY[name]), words("y", 32)]) for name in ("vitq_abs", "vitq_ramp")},
        arch)
    rng = np.random.default_rng(0)
    x = rng.integers(-(2**31) + 1, 2**31, 32).astype(np.int32)
    x[:4] = -(2**31) + 1, 2**31 - 1, 0, -1
    end = np.abs(rng.integers(-(2**31) + 1, 2**31, 32) >> rng.integers(0, 31, 32)).astype(np.int32)
    end[4:6] = 0, 2**31 - 1
    y = np.zeros(32, np.int32)
    ready.run("vitq_abs", x, y)
    assert (y == np.abs(x.astype(np.int64))).all()
    ready.run("vitq_ramp", np.concatenate([x, end]), y)
    assert (y == np.minimum(np.maximum(x, 0), end)).all()


def test_every_function_with_assembly_is_emulated() -> None:
    known = HEADER.read_text()
    for name, function in FUNCTIONS.items():
        if "asm" in function.source:
            assert f"#define {name}(" in known


@pytest.mark.parametrize("a", DTYPES)
@pytest.mark.parametrize("b", DTYPES)
def test_mma(device: Emulator, a: str, b: str) -> None:
    @few
    @given(codes(DTYPES[a], (16, 32)), codes(DTYPES[b], (8, 32)), codes(np.int32, (16, 8)),
           st.integers(0, 9))
    def check(left: np.ndarray, right: np.ndarray, acc: np.ndarray, seed: int) -> None:
        expected = acc.astype(np.int64) + left.astype(np.int64) @ right.astype(np.int64).T
        result = acc.ravel().copy()
        device.run(f"mma_{a}_{b}", left.view(np.int32).ravel(), right.view(np.int32).ravel(),
                   result, seed=seed)
        assert (result.reshape(16, 8) == expected.astype(np.int32)).all()  # modulo 2**32

    check()


@pytest.mark.parametrize("count", [1, 2, 4])
@given(rows=arrays(np.int32, 32, elements=st.integers(0, 127)), seed=st.integers(0, 9))
@few
def test_ldmatrix(device: Emulator, count: int, rows: np.ndarray, seed: int) -> None:
    x, y = np.arange(512, dtype=np.int32) * 77777, np.zeros(32 * count, np.int32)
    counts = device.run(f"ldmatrix{count}", rows * 4, x, y, seed=seed)
    for matrix in range(count):
        loaded = x.reshape(128, 4)[rows[8 * matrix:8 * matrix + 8]].ravel()  # lane 4 r + c
        assert (y.reshape(32, count)[:, matrix] == loaded).all()
    used = rows[:8 * count].reshape(count, 8) % 8
    passes = sum(int(np.bincount(matrix).max()) for matrix in used)
    assert (counts.ldmatrix, counts.conflicts) == (1, passes - count)


@pytest.mark.parametrize("size", [4, 8, 16])
@given(valid=arrays(np.int32, 64, elements=st.integers(0, 1)), seed=st.integers(0, 99))
@few
def test_copies(device: Emulator, size: int, valid: np.ndarray, seed: int) -> None:
    x = np.arange(16 * size, dtype=np.int32) - 1000
    y = np.full_like(x, 5)
    assert device.run(f"copy{size}", valid, x, y, seed=seed).copies == 64
    assert (y.reshape(64, -1) == x.reshape(64, -1) * valid[:, None]).all()


def test_words(device: Emulator) -> None:
    x, y = np.arange(224, dtype=np.int32), np.zeros(224, np.int32)
    device.run("words", x, y)
    assert (x == y).all()


@given(x=codes(np.int32, (4, 32)), select=arrays(np.uint8, (32, 4), elements=st.integers(0, 7)))
@settings(max_examples=60, deadline=None)
def test_scalars(device: Emulator, x: np.ndarray, select: np.ndarray) -> None:
    def run(name: str, *operands: np.ndarray) -> np.ndarray:
        out = np.zeros(32, np.int32)
        device.run(name, np.concatenate(operands), out)
        return out

    a, b, c, _ = x
    bytes_a, bytes_b = (v.view(np.int8).reshape(32, 4).astype(np.int64) for v in (a, b))
    dot = (c + (bytes_a * bytes_b).sum(axis=1)).astype(np.int32)
    assert (run("vitq_dot4", a, b, c) == dot).all()
    assert (run("vitq_high", a, b) == (a.astype(np.int64) * b >> 32)).all()
    both = np.concatenate([a.view(np.uint8).reshape(32, 4), b.view(np.uint8).reshape(32, 4)], 1)
    chosen = np.take_along_axis(both, select.astype(np.int64), 1)
    selector = (select.astype(np.int32) << np.arange(0, 16, 4)).sum(axis=1).astype(np.int32)
    assert (run("vitq_bytes", a, b, selector) == chosen.copy().view(np.int32).ravel()).all()
    for name, dtype in (("s8", np.int8), ("u8", np.uint8)):
        info = np.iinfo(dtype)
        packed = np.clip(x, info.min, info.max).astype(dtype).T.copy().view(np.int32).ravel()
        assert (run(f"vitq_pack_{name}", *x) == packed).all()
    packed = np.clip(x[:2], -32768, 32767).astype(np.int16).T.copy().view(np.int32).ravel()
    assert (run("vitq_pack_s16", a, b) == packed).all()


def test_shuffles(device: Emulator) -> None:
    x, y = np.arange(32, dtype=np.int32) * 3, np.zeros(160, np.int32)
    device.run("shuffle", x, y, seed=3)
    lanes = np.arange(32)
    for bit in range(5):
        assert (y[32 * bit:32 * bit + 32] == x[lanes ^ (1 << bit)]).all()


@few
@given(codes(np.int32, (32,)), codes(np.int32, (32,)))
def test_divide(device: Emulator, a: np.ndarray, b: np.ndarray) -> None:
    """The floor of a quotient by a positive number, whatever the sign of the dividend."""
    divisor = np.where(b == np.iinfo(np.int32).min, 1, np.maximum(np.abs(b), 1)).astype(np.int32)
    found = np.zeros(32, np.int32)
    device.run("vitq_divide", np.concatenate([a, divisor]), found)
    np.testing.assert_array_equal(found, a.astype(np.int64) // divisor)
