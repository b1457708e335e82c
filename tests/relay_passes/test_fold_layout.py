"""Layout operators become index maps of the kernels beside them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from relay_passes.dialect.layer_norm import layer_norm
from relay_passes.dialect.linear import linear_requant, linear_requant_add
from relay_passes.dialect.matmul import matmul_requant
from relay_passes.dialect.registry import call, is_vitq_call
from relay_passes.dialect.requantize import requantize
from relay_passes.fold_layout import FoldLayout, Moved
from relay_passes.pack import PackWeights
from schedules.apply import ApplySchedules
from schedules.isa import AVX2, GENERIC, isa_for, resolve_target
from tests.helpers.qdq import build
from tvm_vitq.reference.interpreter import Interpreter

RNG = np.random.default_rng(5)
C = 16
W = RNG.integers(-127, 128, (C, C)).astype("int8")
B = RNG.integers(-999, 999, C).astype("int32")
M = np.full(C, 1 << 30, "int32")
E = np.full(C, 38, "int32")
OUT = (0, -127, 127, "int8")
WIDE = (0, -32767, 32767, "int16")


def dense(bb, x):
    return bb.emit(linear_requant(x, W, B, M, E, *OUT))


def residual(bb, x, r):
    return bb.emit(linear_requant_add(x, W, B, M, E, r, 1 << 30, 30, *WIDE))


def norm(bb, x, channels=C):
    ones = np.ones(channels)
    return bb.emit(layer_norm(x, 1e-2, ones, 0 * ones, 1e-6, 0.03, *OUT))


def reshape(bb, x, *shape):
    return bb.emit(relax.op.reshape(x, shape))


def permute(bb, x, *axes):
    return bb.emit(relax.op.permute_dims(x, axes))


def roll(bb, x, axis, by):
    extent = int(x.ty.shape[axis])
    parts = [bb.emit(relax.op.strided_slice(x, [axis], [lo], [hi]))
             for lo, hi in ((by, extent), (0, by))]
    return bb.emit(relax.op.concat(parts, axis))


def partition(bb, x):
    """[1, 4, 4, C] to four windows of 2 x 2: [4, 4, C]."""
    split = reshape(bb, x, 2, 2, 2, 2, C)
    return reshape(bb, permute(bb, split, 0, 2, 1, 3, 4), 4, 4, C)


def reverse(bb, x):
    split = reshape(bb, x, 1, 2, 2, 2, 2, C)
    return reshape(bb, permute(bb, split, 0, 1, 3, 2, 4, 5), 1, 4, 4, C)


def heads(bb, x):
    return permute(bb, reshape(bb, x, 4, 4, 2, C // 2), 0, 2, 1, 3)


def rows_of(*maps):
    """Return what ``maps`` do to the rows of a [1, 4, 4, C] tensor."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 4, 4, C), "int32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            y = x
            for step in maps:
                y = step(bb, y)
            out = bb.emit_output(y)
        bb.emit_func_output(out)
    codes = np.arange(16 * C, dtype="int32").reshape(1, 4, 4, C)
    return (Interpreter(bb.get())(codes).reshape(16, C)[:, 0] // C).astype("int32")


def calls_of(func):
    """Return the calls of a function, in order."""
    return [b.value for block in func.body.blocks for b in block.bindings
            if isinstance(b.value, relax.Call)]


def moving(func):
    """Return the operators of a function that move elements."""
    names = sorted(c.op.name for c in calls_of(func))
    return [n for n in names if not n.startswith("vitq.") and n != "relax.reshape"]


def folded(module):
    return FoldLayout(AVX2)(PackWeights(AVX2)(module))


def check(before, expected, shape=(1, 4, 4, C)):
    """Compare; ``expected`` is in packed form save for what packing does."""
    after = relax.transform.CanonicalizeBindings()(folded(build(shape, before, "int8")))
    wanted = relax.transform.CanonicalizeBindings()(build(shape, expected, "int8"))
    tvm.ir.assert_structural_equal(after["main"], wanted["main"])


def packed(bb, node, x, res=None, rows=None, gather=""):
    """Emit the packed form of a linear call on other rows."""
    bb.normalize(node)
    form = PackWeights(AVX2)(build(
        [int(e) for e in node.args[0].ty.shape], lambda inner, y: inner.emit(relax.Call(
            node.op, [y, *node.args[1:5]] + ([y_res(inner, node)] if res is not None else []),
            node.attrs)), str(node.args[0].ty.dtype)))
    (found,) = calls_of(form["main"])
    attrs = {key: found.attrs[key] for key in found.attrs.keys()}  # noqa: SIM118
    args = [x, *found.args[1:5]] + ([res] if res is not None else [])
    if gather:
        attrs["gather"] = gather
        args.append(relax.const(rows))
    return bb.emit(call(found.op.name.removeprefix("vitq."), *args, **attrs))


def y_res(bb, node):
    """A stand-in of the residual's type."""
    ty = node.args[5].ty
    return relax.const(np.zeros([int(e) for e in ty.shape], str(ty.dtype)))


def test_windows_before_and_after():
    def windows(bb, x):
        return partition(bb, roll(bb, roll(bb, x, 1, 1), 2, 1))

    def back(bb, x):
        return roll(bb, roll(bb, reverse(bb, x), 1, 3), 2, 3)

    def before(bb, x):
        r = bb.emit(requantize(x, 3.0, 0, *WIDE))
        n = windows(bb, norm(bb, x))
        return residual(bb, back(bb, norm(bb, n)), r)

    after = folded(build((1, 4, 4, C), before, "int8"))["main"]
    assert moving(after) == []
    first, second = [c for c in calls_of(after) if is_vitq_call(c, "layer_norm")]
    forward = rows_of(windows)
    backward = np.argsort(forward).astype("int32")
    # The second norm's rows are made in image order again, so the projection needs no table.
    np.testing.assert_array_equal(first.args[3].value.numpy(), forward)
    np.testing.assert_array_equal(second.args[3].value.numpy(), backward)


def test_partition():
    def before(bb, x):
        return dense(bb, partition(bb, norm(bb, x)))

    def expected(bb, x):
        call_ = norm_call(reshape(bb, x, 16, C), rows_of(partition))
        y = reshape(bb, bb.emit(call_), 4, 4, C)
        return packed(bb, linear_requant(y, W, B, M, E, *OUT), y)

    check(before, expected)


def norm_call(x, rows):
    ones = np.ones(C)
    node = layer_norm(x, 1e-2, ones, 0 * ones, 1e-6, 0.03, *OUT)
    return relax.Call(node.op, [*node.args, relax.const(rows)], node.attrs)


def test_heads():
    def before(bb, x):
        n = reshape(bb, norm(bb, x), 4, 4, C)
        q, k = heads(bb, dense(bb, n)), heads(bb, dense(bb, n))
        p = bb.emit(matmul_requant(q, k, True, 1 << 30, 34, *OUT))
        v = heads(bb, dense(bb, n))
        o = bb.emit(matmul_requant(p, v, False, 1 << 30, 38, *OUT))
        return dense(bb, reshape(bb, permute(bb, o, 0, 2, 1, 3), 4, 4, C))

    def expected(bb, x):
        def linear(y):
            return packed(bb, linear_requant(y, W, B, M, E, *OUT), y)

        n = reshape(bb, norm(bb, x), 4, 4, C)
        q, k = linear(n), linear(n)
        v = linear(n)
        axes = [0, 2, 1, 3]
        q, k = (reshape(bb, t, 4, 4, 2, C // 2) for t in (q, k))
        same = dict(zip(("zero_point", "qmin", "qmax", "out_dtype"), OUT, strict=True))
        p = bb.emit(call("matmul_requant", q, k, transpose_b=True, mult=1 << 30, shift=34,
                         a_axes=axes, b_axes=axes, **same))
        v = reshape(bb, v, 4, 4, 2, C // 2)
        o = bb.emit(call("matmul_requant", p, v, transpose_b=False, mult=1 << 30, shift=38,
                         b_axes=axes, out_axes=axes, **same))
        return linear(reshape(bb, o, 4, 4, C))

    after = folded(build((1, 4, 4, C), before, "int8"))
    wanted = build((1, 4, 4, C), expected, "int8")
    # The order of independent bindings is not compared, only the calls.
    found, right = (sorted(str(c.attrs) + str(c.ty) for c in calls_of(mod["main"])
                           if is_vitq_call(c)) for mod in (after, wanted))
    assert found == right and moving(after["main"]) == []


def test_merging():
    def merge(bb, x):
        split = reshape(bb, x, 1, 2, 2, 2, 2, C)
        return reshape(bb, permute(bb, split, 0, 1, 3, 4, 2, 5), 1, 2, 2, 4 * C)

    def before(bb, x):
        r = bb.emit(requantize(x, 3.0, 0, *WIDE))
        return norm(bb, merge(bb, residual(bb, x, r)), 4 * C)

    def expected(bb, x):
        r = bb.emit(requantize(x, 3.0, 0, *WIDE))
        node = linear_requant_add(x, W, B, M, E, r, 1 << 30, 30, *WIDE)
        y = packed(bb, node, reshape(bb, x, 16, C), reshape(bb, r, 16, C), rows_of(merge), "both")
        return norm(bb, reshape(bb, y, 1, 2, 2, 4 * C), 4 * C)

    check(before, expected)


def test_slice_of_a_residual():
    """As in the last block of a class-token model, of which one row is read."""
    def one(bb, x):
        return bb.emit(relax.op.strided_slice(x, [1], [1], [2]))

    def before(bb, x):
        r = bb.emit(requantize(x, 3.0, 0, *WIDE))
        return residual(bb, norm(bb, one(bb, norm(bb, x))), one(bb, r))

    def expected(bb, x):
        r = bb.emit(requantize(x, 3.0, 0, *WIDE))
        rows = np.array([1, 5, 9, 13], "int32")
        n = bb.emit(norm_call(reshape(bb, norm(bb, x), 16, C), rows))
        stand_in = relax.Var("r", relax.TensorType((4, C), "int16"))
        node = linear_requant_add(n, W, B, M, E, stand_in, 1 << 30, 30, *WIDE)
        r = reshape(bb, r, 16, C)
        y = packed(bb, node, reshape(bb, reshape(bb, n, 4, 1, C), 4, C), r, rows, "residual")
        return reshape(bb, y, 4, 1, C)

    check(before, expected, (4, 4, C))


def test_patches():
    def before(bb, x):
        split = reshape(bb, x, 2, 2, 2, 2, 4)
        return dense(bb, reshape(bb, permute(bb, split, 1, 3, 0, 2, 4), 4, C))

    def expected(bb, x):
        # Four pieces of four, one from every channel and row of the patch.
        pieces = np.arange(16).reshape(2, 2, 2, 2).transpose(1, 3, 0, 2).reshape(4, 4)
        stand_in = relax.Var("y", relax.TensorType((4, C), "int8"))
        node = linear_requant(stand_in, W, B, M, E, *OUT)
        return packed(bb, node, reshape(bb, x, 16, 4), rows=pieces.astype("int32"), gather="x")

    check(before, expected, (2, 4, 8))


@pytest.mark.parametrize("step", [lambda bb, x: permute(bb, x, 0, 1, 3, 2),
                                  lambda bb, x: roll(bb, x, 3, 5)], ids=["swap", "roll"])
def test_what_moves_channels_stays(step):
    def before(bb, x):
        y = reshape(bb, norm(bb, x), 1, 1, C, C)
        return dense(bb, step(bb, y))

    module = PackWeights(AVX2)(build((1, 4, 4, C), before, "int8"))
    after = FoldLayout(AVX2)(module)

    assert moving(after["main"]) == moving(module["main"]) != []


def test_two_orders_keep_the_operators():
    """Readers that want different orders of one result take it through tables of their own."""
    def before(bb, x):
        n = norm(bb, x)
        r = bb.emit(requantize(roll(bb, n, 2, 1), 3.0, 0, *WIDE))
        return residual(bb, roll(bb, n, 1, 1), r)

    after = folded(build((1, 4, 4, C), before, "int8"))["main"]
    (found,) = [c for c in calls_of(after) if is_vitq_call(c, "packed_linear_requant_add")]
    assert found.attrs["gather"] == "x"
    assert moving(after).count("relax.concat") == 1


def test_without_kernels_nothing_changes():
    module = build((1, 4, 4, C), lambda bb, x: dense(bb, partition(bb, norm(bb, x))), "int8")
    tvm.ir.assert_structural_equal(FoldLayout(GENERIC)(module)["main"], module["main"])


@given(st.data())
def test_permutations_are_found(data):
    rank = data.draw(st.integers(2, 5))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    axes = [*data.draw(st.permutations(range(rank - 1))), rank - 1]
    var = relax.Var("x", relax.TensorType(shape, "int8"))
    index = np.arange(np.prod(shape)).reshape(shape).transpose(axes)
    found = Moved(var, index).permutation()
    if found is None:
        assert shape[-1] == 1  # a last axis of one element may not be the innermost
        return
    extents, order = found
    flat = np.arange(np.prod(shape)).reshape(extents).transpose(order)
    np.testing.assert_array_equal(flat, index)


@given(st.data())
def test_rows_are_found(data):
    rows, width = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 5))
    table = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=12))
    var = relax.Var("x", relax.TensorType((rows, width), "int8"))
    index = np.arange(rows * width).reshape(rows, width)[table]
    np.testing.assert_array_equal(Moved(var, index).rows(width), table)
    assert Moved(var, index[:, ::-1]).rows(width) is None


@given(st.data())
def test_pieces_are_found(data):
    count, length = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 5))
    each = data.draw(st.integers(1, 4))
    chosen = st.lists(st.integers(0, count - 1), min_size=each, max_size=each)
    table = data.draw(st.lists(chosen, min_size=1, max_size=6))
    var = relax.Var("x", relax.TensorType((count * length,), "int8"))
    index = np.arange(count * length).reshape(count, length)[table].reshape(-1, each * length)
    pieces = Moved(var, index).pieces(each * length)
    found = index.shape[1] // pieces.shape[1]  # neighbours may have joined
    assert found % length == 0
    whole = np.arange(count * length).reshape(-1, found)
    np.testing.assert_array_equal(whole[pieces].reshape(index.shape), index)


@settings(max_examples=12, deadline=None)
@given(st.data())
@pytest.mark.parametrize("target", ["x86-64-v3", "native"])
def test_values_stay(target, data):
    """Random layout operators around every kind of kernel: compiled code keeps every value."""
    def move(bb, x):
        for _ in range(data.draw(st.integers(0, 2))):
            kind = data.draw(st.sampled_from(["roll", "swap", "windows", "back"]))
            if kind == "roll":
                x = roll(bb, x, data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 3)))
            elif kind == "swap":
                x = permute(bb, x, 0, 2, 1, 3)
            else:
                y = partition(bb, x) if kind == "windows" else reverse(bb, x)
                x = reshape(bb, y, 1, 4, 4, C)
        return x

    def body(bb, x):
        r = bb.emit(requantize(x, 3.0, 0, *WIDE))
        n = reshape(bb, move(bb, norm(bb, move(bb, x))), 4, 4, C)
        q, k, v = (heads(bb, dense(bb, n)) for _ in range(3))
        p = bb.emit(matmul_requant(q, k, True, 1 << 30, 34, *OUT))
        o = bb.emit(matmul_requant(p, v, False, 1 << 30, 38, *OUT))
        merged = reshape(bb, permute(bb, o, 0, 2, 1, 3), 1, 4, 4, C)
        y = residual(bb, move(bb, merged), move(bb, r))
        merge = reshape(bb, move(bb, y), 1, 4, 2, 2 * C)
        return norm(bb, permute(bb, merge, 0, 2, 1, 3), 2 * C)

    module = build((1, 4, 4, C), body, "int8")
    where = resolve_target(target, threads=1)
    isa = isa_for(where)
    passes = [PackWeights(isa), FoldLayout(isa), relax.transform.LegalizeOps(), ApplySchedules(isa)]
    vm = relax.VirtualMachine(
        tvm.compile(tvm.transform.Sequential(passes)(module), where), tvm.cpu())
    codes = np.random.default_rng(1).integers(-128, 128, (1, 4, 4, C)).astype("int8")
    np.testing.assert_array_equal(
        vm["main"](tvm.runtime.tensor(codes)).numpy(), Interpreter(module)(codes))
