"""Launches of a GPU cut out of a legalised module, as modules of their own."""

from __future__ import annotations

import tvm
from tvm import relax

from relay_passes.group_kernels import GroupKernels
from relay_passes.kernel_slices import kernel_slices
from tests.relay_passes.test_group_kernels import TOKENS, C, block, calls, dense, legalised

LINEAR, MATMUL = "vitq.packed_linear_requant", "vitq.matmul_requant"


def test_before_and_expected() -> None:
    """Of ``h = linear(x, …); y = linear(h, …)``: ``y = linear(x0, …)`` alone."""
    before = legalised(lambda bb, x: dense(bb, dense(bb, x), 2 * C))
    first, second = before["main"].body.blocks[0].bindings[:2]
    gvar = second.value.args[0]
    bb = relax.BlockBuilder()
    x0 = relax.Var("x0", first.var.ty)
    with bb.function("main", [x0]):
        with bb.dataflow():
            constants = list(second.value.args[1].fields)[1:]
            made = bb.emit(relax.call_tir(gvar, [x0, *constants], second.value.ty_args[0]))
            out = bb.emit_output(made)
        bb.emit_func_output(out)
    expected = tvm.IRModule({gvar: before[gvar]})
    expected["main"] = bb.get()["main"]
    slices = list(kernel_slices(before, "main"))
    assert [[var.name for var in variables] for _, variables in slices] == [
        ["x"], [first.var.name]]  # fmt: skip
    tvm.ir.assert_structural_equal(slices[1][0], expected, map_free_vars=True)


def test_each_slice_is_one_launch() -> None:
    """Views inside of an attention come along; views of what is read from outside do not."""
    whole = legalised(block)
    slices = list(kernel_slices(whole, "main"))
    launched = [calls(GroupKernels()(mod)) for mod, _ in slices]
    assert sorted(launched) == sorted([[one] for one in calls(GroupKernels()(whole))])
    inputs = {tuple(calls(mod)): len(mod["main"].params) for mod, _ in slices}
    assert inputs == {(LINEAR,) * 3: 1, (MATMUL, "vitq.softmax", MATMUL): 3,
                      (LINEAR, "vitq.gelu"): 1}  # fmt: skip
    results = [mod["main"].ret_ty for mod, _ in slices]
    shapes = sorted(len(ty.fields) if isinstance(ty, relax.TupleType) else 1 for ty in results)
    assert shapes == [1, 1, 3]
    for mod, variables in slices:
        for param, var in zip(mod["main"].params, variables, strict=True):
            assert [int(e) for e in param.ty.shape.values] == [int(e) for e in var.ty.shape.values]
            assert TOKENS in [int(extent) for extent in param.ty.shape.values]
