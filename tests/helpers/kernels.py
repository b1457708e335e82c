"""Build one matmul kernel and its int64 truth, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import te

from schedules.apply import schedule_function
from schedules.gemm import Epilogue, Tile
from schedules.isa import isa_for, resolve_target
from schedules.matmul import matmul_te, packed_linear_te
from schedules.packing import narrow_form, pack, pad_columns, plan_linear, scalar_form

LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-2000, 2000)}
CODES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32767, 32767),
         "int32": (-(2**31), 2**31 - 1)}


def rq(value: Any, mult: Any, shift: Any) -> np.ndarray:
    """The contract's requantisation on int64."""
    value, mult, shift = (np.asarray(v, dtype=np.int64) for v in (value, mult, shift))
    return (value * mult + (np.int64(1) << (shift - 1))) >> shift


@dataclass
class Kernel:
    """A built kernel, its arguments (output last) and what the output must be."""

    lib: Any
    args: list[Any]
    expected: np.ndarray
    plan: Any = None

    def run(self) -> np.ndarray:
        self.lib["main"](*self.args)
        return self.args[-1].numpy()

    @property
    def asm(self) -> str:
        return self.lib.mod.inspect_source("asm")


@dataclass
class Case:
    """A scheduled kernel that isn't built yet, its arguments (output last), its expected output."""

    func: Any
    values: list[np.ndarray]
    expected: np.ndarray
    target: Any
    plan: Any = None

    def build(self) -> Kernel:
        args = [tvm.runtime.tensor(v) for v in self.values]
        return Kernel(tvm.compile(self.func, target=self.target), args, self.expected, self.plan)


def make_linear(*args: Any, **options: Any) -> Kernel:
    """Build the kernel of :func:`linear_case`."""
    return linear_case(*args, **options).build()


def make_matmul(*args: Any, **options: Any) -> Kernel:
    """Build the kernel of :func:`matmul_case`."""
    return matmul_case(*args, **options).build()


def linear_case(
    rows: int,
    columns: int,
    depth: int,
    target: str,
    kind: str = "requant",
    dtype: str = "int8",
    out_dtype: str = "int8",
    extreme: bool = False,
    shifts: tuple[int, int] = (32, 44),
    res_shift: int = 30,
    tile: Tile | None = None,
    seed: int = 0,
    codes: tuple[int, int] | None = None,
    largest_weight: int | np.ndarray = 127,
    gather: str = "",
    pieces: int = 1,
    point: dict[str, Any] | None = None,
) -> Case:
    """Return a packed linear kernel with random (or extreme) codes.

    ``codes`` narrows the activations' interval, ``largest_weight`` (of all columns, or of each) the
    weights. With ``gather``, the result has some of the rows in random order; with ``pieces``, the
    rows are put together from that many random ones. ``point`` is one of the linear's space.
    """
    where = resolve_target(target)
    isa = isa_for(where)
    rng = np.random.default_rng(seed)
    low, high = codes or LIMITS[dtype]
    pick = (lambda lo, hi, s: np.where(rng.integers(0, 2, s), lo, hi)) if extreme else (
        lambda lo, hi, s: rng.integers(lo, hi + 1, s))
    x = pick(low, high, (1, rows, depth)).astype(dtype)
    most = np.broadcast_to(largest_weight, (depth, columns))
    w = pick(-most, most, (depth, columns)).astype("int8")
    plan = plan_linear(isa, dtype, rows, w, codes, lambda _chain: point)
    if point is not None:
        tile = Tile.of(point)
    if tile is not None:
        plan = replace(plan, tile=tile)
    bias = rng.integers(-(10**5), 10**5, columns).astype("int32")
    mult = rng.integers(-(2**31) + 1, 2**31, columns).astype("int32")
    shift = rng.integers(*shifts, columns).astype("int32")
    res = pick(-32767, 32767, (1, rows, columns)).astype("int16")
    qmin, qmax = CODES[out_dtype]
    bound = max(abs(low), high) * 127 * depth + 10**5
    narrow_mult, narrow_shift, flags = narrow_form(mult, shift, bound, 3)
    epilogue = Epilogue() if kind == "acc" else Epilogue(
        kind, 3, qmin, qmax, out_dtype, res_mult=1500000001, res_shift=res_shift,
        **flags)
    folded = (bias - plan.offset * w.astype("int64").sum(0)).astype("int32")
    values = [x, pack(w, plan.nt, plan.dot.kv, plan.dot), pad_columns(folded, plan.nt, 0)]
    names = ["x", "w", "bias"]
    expected = x.astype("int64") @ w.astype("int64") + bias
    added = res
    if gather:
        shape = max(1, rows - 3), *([pieces] if pieces > 1 else [])
        table = rng.integers(0, rows * pieces, shape).astype("int32")
        count = len(table)
        values[0] = x.reshape(rows * pieces, depth // pieces)
        if gather == "residual":
            values[0] = values[0][:count]
        rows_of_x = values[0] if gather == "residual" else values[0][table].reshape(count, depth)
        expected = rows_of_x.astype("int64") @ w.astype("int64") + bias
        res = res[0, :count] if gather == "x" else res[0]
        added = res if gather == "x" else res[table]
    if kind != "acc":
        values += [pad_columns(narrow_mult, plan.nt, 0), pad_columns(narrow_shift, plan.nt, 32)]
        names += ["mult", "shift"]
        expected = rq(expected, mult, shift)
    if kind == "requant_add":
        values.append(res)
        names.append("residual")
        expected = expected + rq(added, 1500000001, res_shift)
    if kind != "acc":
        expected = np.clip(expected + 3, qmin, qmax)
    expected = expected.astype("int32" if kind == "acc" else out_dtype)
    if gather:
        values.append(table)
        names.append("rows")
    tensors = [te.placeholder(v.shape, str(v.dtype), name=n)
               for n, v in zip(names, values, strict=True)]
    extra = dict(zip(names[3:], tensors[3:], strict=True))
    out = packed_linear_te(*tensors[:3], columns, epilogue, plan.dot.name, plan.dot.lanes,
                           plan.offset, plan.chains, plan.fallback, gather=gather, **extra)
    func = te.create_prim_func([*tensors, out])
    scheduled = schedule_function(func, isa, tile)
    return Case(scheduled, [*values, np.zeros_like(expected)], expected, where, plan)


def matmul_case(
    shape: tuple[int, int, int, int],
    target: str,
    transpose_b: bool,
    dtypes: tuple[str, str] = ("int8", "int8"),
    out_dtype: str = "int16",
    kind: str = "requant",
    shift: int = 38,
    extreme: bool = False,
    tile: Tile | None = None,
    zero_point: int = 5,
    axes: Sequence[Sequence[int]] = ((), (), ()),
) -> Case:
    """Return an activation matmul of ``shape`` (batch, M, N, K), tensors permuted by ``axes``."""
    batch, rows, columns, depth = shape
    rng = np.random.default_rng(1)

    def codes(size: tuple[int, ...], dtype: str) -> np.ndarray:
        low, high = LIMITS[dtype]
        value = rng.choice([low, high], size) if extreme else rng.integers(low, high + 1, size)
        return value.astype(dtype)

    a = codes((batch, rows, depth), dtypes[0])
    b = codes((batch, columns, depth) if transpose_b else (batch, depth, columns), dtypes[1])
    right = b.astype("int64").swapaxes(1, 2) if transpose_b else b.astype("int64")
    expected = a.astype("int64") @ right
    qmin, qmax = CODES[out_dtype]
    epilogue = Epilogue()
    shared = codes((1, rows, columns), "int16")
    if kind != "acc":
        flags = scalar_form(shift, zero_point, depth, dtypes)
        epilogue = Epilogue(kind, 0, qmin, qmax, out_dtype, res_mult=1500000001, res_shift=30,
                            **flags)
        added = rq(shared, 1500000001, 30) if kind == "requant_add" else 0
        expected = np.clip(rq(expected, 1234567891, shift) + added + zero_point, qmin, qmax)
    expected = expected.astype(epilogue.out_dtype)
    where = resolve_target(target)
    # An operand is the permutation of what is passed; the result is permuted when it is stored.
    a, b = (v.transpose(np.argsort(order)) if order else v
            for v, order in zip((a, b), axes, strict=False))
    expected = expected.transpose(axes[2] or (0, 1, 2))
    a, b, expected = (np.ascontiguousarray(v) for v in (a, b, expected))
    ta, tb = (te.placeholder(v.shape, str(v.dtype), name=n) for n, v in (("a", a), ("b", b)))
    zero = [zero_point] if zero_point else []
    extra = {"residual": shared} if kind == "requant_add" else {}
    extra |= {} if kind == "acc" else {"scalars": np.array([1234567891, shift, *zero], np.int32)}
    more = {name: te.placeholder(v.shape, str(v.dtype), name=name) for name, v in extra.items()}
    out = matmul_te(ta, tb, transpose_b, epilogue, *axes, **more)
    func = te.create_prim_func([ta, tb, *more.values(), out])
    scheduled = schedule_function(func, isa_for(where), tile)
    return Case(scheduled, [a, b, *extra.values(), np.zeros_like(expected)], expected, where)
