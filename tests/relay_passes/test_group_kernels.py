"""Kernels that a GPU runs as one launch become one call."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import tvm
from tvm import relax

from relay_passes.capture_graph import CaptureGraph
from relay_passes.dialect.gelu import gelu
from relay_passes.dialect.linear import linear_requant
from relay_passes.dialect.matmul import matmul_requant
from relay_passes.dialect.softmax import softmax
from relay_passes.fold_layout import FoldLayout
from relay_passes.group_kernels import GroupKernels
from relay_passes.pack import PackWeights
from schedules.apply import SCHEDULED
from schedules.cuda.attention import attention
from schedules.cuda.linear import linears
from schedules.isa import CUDA, resolve_target
from tests.helpers.qdq import build

RNG = np.random.default_rng(5)
C, HEADS, TOKENS = 64, 2, 20
OUT = (0, -127, 127, "int8")


def dense(bb: Any, x: relax.Expr, columns: int = C, dtype: str = "int8") -> relax.Var:
    w = RNG.integers(-127, 128, (int(x.ty.shape[-1]), columns)).astype("int8")
    bias = RNG.integers(-999, 999, columns).astype("int32")
    mult, shift = np.full(columns, 1 << 30, "int32"), np.full(columns, 40, "int32")
    limit = 127 if dtype == "int8" else 32767
    return bb.emit(linear_requant(x, w, bias, mult, shift, 0, -limit, limit, dtype))


def heads(bb: Any, x: relax.Expr) -> relax.Var:
    split = bb.emit(relax.op.reshape(x, (1, TOKENS, HEADS, C // HEADS)))
    return bb.emit(relax.op.permute_dims(split, (0, 2, 1, 3)))


def block(bb: Any, x: relax.Expr) -> relax.Expr:
    """Attention and the first half of an MLP."""
    q, k, v = (heads(bb, dense(bb, x)) for _ in range(3))
    scores = bb.emit(matmul_requant(q, k, True, 1 << 30, 38, 0, -32767, 32767, "int16"))
    chances = bb.emit(softmax(scores, 0.001, 2.0**-15, 2**15 - 1, "int16", "poly"))
    mixed = bb.emit(matmul_requant(chances, v, False, 1 << 30, 44, *OUT))
    rows = bb.emit(relax.op.permute_dims(mixed, (0, 2, 1, 3)))
    hidden = dense(bb, bb.emit(relax.op.reshape(rows, (1, TOKENS, C))), 2 * C, "int16")
    return bb.emit(gelu(hidden, 0.001, 0, 0.02, -20, -128, 127, "int8", "poly"))


def legalised(body: Any, shape: tuple[int, ...] = (1, TOKENS, C)) -> tvm.IRModule:
    mod = build(shape, body, "int8")
    return tvm.transform.Sequential([
        PackWeights(CUDA), FoldLayout(CUDA), relax.transform.LegalizeOps(),
        relax.transform.RewriteDataflowReshape(), relax.transform.DeadCodeElimination(),
    ])(mod)


def calls(mod: tvm.IRModule) -> list[str]:
    """Return the operators of the kernels that ``main`` launches, in order."""
    found = []
    for binding in mod["main"].body.blocks[0].bindings:
        value = binding.value
        if isinstance(value, relax.Call) and value.op.name == "relax.call_tir":
            func = mod[value.args[0]]
            found.append(str(func.attrs.get("vitq.op", value.args[0].name_hint)))
    return found


def test_before_and_expected() -> None:
    """``q = linear(x, …); k = linear(x, …)`` becomes ``q, k = linears(x, …)``."""
    before = legalised(lambda bb, x: bb.emit(relax.op.concat([dense(bb, x), dense(bb, x)], 1)))
    first, second, joined = (b.value for b in before["main"].body.blocks[0].bindings[:3])
    func = linears([before[first.args[0]], before[second.args[0]]], [None, None])
    linear = "vitq.packed_linear_requant"
    func = func.with_attrs({"vitq.op": f"{linear}+{linear}", SCHEDULED: True})

    bb = relax.BlockBuilder(tvm.IRModule({joined.args[0]: before[joined.args[0]]}))
    gvar = bb.add_func(func.without_attr("global_symbol"), "vitq_linears")
    x = relax.Var("x", before["main"].params[0].ty)
    with bb.function("main", [x], attrs={"global_symbol": "main"}):
        with bb.dataflow():
            args = [x, *list(first.args[1].fields)[1:], *list(second.args[1].fields)[1:]]
            both = bb.emit(relax.call_tir(gvar, args, [first.ty_args[0], second.ty_args[0]]))
            parts = [bb.emit(relax.TupleGetItem(both, i)) for i in range(2)]
            last = bb.emit(relax.call_tir(joined.args[0], parts, joined.ty_args[0]))
            out = bb.emit_output(last)
        bb.emit_func_output(out)
    after = GroupKernels()(before)
    tvm.ir.assert_structural_equal(after["main"], bb.get()["main"], map_free_vars=True)
    assert calls(after)[0] == f"{linear}+{linear}"


def test_a_block_is_three_launches() -> None:
    after = GroupKernels()(legalised(block))
    linear, matmul = "vitq.packed_linear_requant", "vitq.matmul_requant"
    assert calls(after) == ["+".join([linear] * 3), f"{matmul}+vitq.softmax+{matmul}",
                            f"{linear}+vitq.gelu"]


def test_equal_groups_share_a_kernel() -> None:
    def two(bb: Any, x: relax.Expr) -> relax.Expr:
        once = dense(bb, dense(bb, x), 2 * C, "int16")
        half = dense(bb, bb.emit(gelu(once, 1e-3, 0, 0.02, 0, *OUT[1:], "poly")))
        again = dense(bb, half, 2 * C, "int16")
        return bb.emit(gelu(again, 1e-3, 0, 0.02, 0, *OUT[1:], "poly"))

    after = GroupKernels()(legalised(two))
    names = Counter(b.value.args[0].name_hint for b in after["main"].body.blocks[0].bindings
                    if isinstance(b.value, relax.Call))
    assert names["vitq_linears"] == 2


def test_a_result_that_others_read_is_no_intermediate() -> None:
    def twice(bb: Any, x: relax.Expr) -> relax.Expr:
        hidden = dense(bb, x, C, "int16")
        out = bb.emit(gelu(hidden, 1e-3, 0, 0.02, 0, *OUT[1:], "poly"))
        again = dense(bb, hidden)
        return bb.emit(relax.op.concat([out, again], 1))

    mod = legalised(twice)
    assert calls(GroupKernels()(mod)) == calls(mod)


def test_kernels_take_the_arguments_in_order() -> None:
    mod = legalised(block)
    members = [mod[b.value.args[0]] for b in mod["main"].body.blocks[0].bindings
               if isinstance(b.value, relax.Call) and b.value.op.name == "relax.call_tir"]
    by_operator = {str(f.attrs["vitq.op"]): f for f in members}
    matmuls = [f for f in members if f.attrs["vitq.op"] == "vitq.matmul_requant"]
    func = attention(matmuls[0], [], by_operator["vitq.softmax"], matmuls[1])
    assert func is not None
    after = GroupKernels()(mod)
    for binding in after["main"].body.blocks[0].bindings:
        value = binding.value
        if isinstance(value, relax.Call) and value.op.name == "relax.call_tir":
            kernel = after[value.args[0]]
            given = [(tuple(int(e) for e in a.ty.shape), str(a.ty.dtype))
                     for a in value.args[1].fields]
            taken = [(tuple(int(e) for e in p.shape), str(p.dtype)) for p in kernel.params]
            assert given == taken[: len(given)]


def test_graph_capture_leaves_input_and_output_outside() -> None:
    """Three launches in a row: the one between the first and the last is recorded."""
    mod = legalised(lambda bb, x: dense(bb, dense(bb, dense(bb, x))))
    with resolve_target("sm_80"):
        mod = tvm.transform.Sequential([
            relax.transform.ToNonDataflow(), relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(), relax.transform.StaticPlanBlockMemory(),
            CaptureGraph()])(mod)
    names = {gvar.name_hint for gvar in mod.get_global_vars()}
    assert {"main", "cuda_graph_alloc", "main_cuda_graph_capture"} <= names

    def launches(name: str) -> int:
        found = [b.value for part in mod[name].body.blocks for b in part.bindings]
        return sum(getattr(value, "op", None) in mod.get_global_vars() for value in found)

    assert launches("main_cuda_graph_capture") == 1 and launches("main") == 2
