"""Attentions for tests of the CUDA kernel: the members, their arguments, what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from relay_passes.dialect.checking import as_const
from relay_passes.dialect.registry import call
from relay_passes.dialect.softmax import softmax
from tests.helpers.dialect import module
from tvm_vitq.reference.interpreter import Interpreter

__all__ = ["Attention", "Shape", "codes", "make"]

CODES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32767, 32767)}


@dataclass(frozen=True)
class Shape:
    """Extents, dtypes and forms of one attention.

    ``heads`` lie inside the rows of q, k, v and of the result if ``folded``. ``bias`` adds a
    position bias shared by the windows, ``masks`` elementwise sums whose other operand is shared by
    the heads.
    """

    batch: int
    heads: int
    rows: int
    keys: int
    depth: int
    columns: int = 0
    q: str = "int8"
    k: str = "int8"
    scores: str = "int16"
    p: str = "int16"
    v: str = "int8"
    out: str = "int8"
    method: str = "poly"
    folded: bool = True
    bias: bool = False
    masks: int = 0
    zero_point: int = 0
    in_scale: float = 0.002
    shift: int = 0
    out_shift: int = 0
    mult: int = 1500000001
    res_mult: int = 2**30
    res_shift: int = 30


@dataclass
class Attention:
    """Members as unscheduled PrimFuncs, arguments in the grouped kernel's order, the result."""

    scores: tirx.PrimFunc
    between: list[tirx.PrimFunc]
    softmax: tirx.PrimFunc
    context: tirx.PrimFunc
    arguments: list[np.ndarray]
    expected: np.ndarray

    @property
    def members(self) -> tuple[Any, ...]:
        """The arguments of ``schedules.cuda.attention.attention``."""
        return self.scores, self.between, self.softmax, self.context


def codes(rng: np.random.Generator, shape: Sequence[int], dtype: str, how: str) -> np.ndarray:
    """Return random codes, or only the ends of their range (``how = "extreme"``)."""
    low, high = CODES[dtype]
    if how == "extreme":
        return np.where(rng.integers(0, 2, shape), low, high).astype(dtype)
    if dtype == "int16" and how == "narrow":
        low, high = -3000, 3000
    return rng.integers(low, high + 1, shape).astype(dtype)


def _bits(dtype: str) -> int:
    return {"int8": 7, "uint8": 8, "int16": 15}[dtype]


def make(s: Shape, how: str = "random", seed: int = 0,
         operands: Sequence[np.ndarray] | None = None) -> Attention:
    """Return an attention with random (or extreme) operands, or with ``operands``: q, k, v."""
    rng = np.random.default_rng(seed)
    columns = s.columns or s.depth

    def operand(length: int, width: int, dtype: str) -> np.ndarray:
        middle = (length, s.heads) if s.folded else (s.heads, length)
        return codes(rng, (s.batch, *middle, width), dtype, how)

    arrays = list(operands or (operand(s.rows, s.depth, s.q), operand(s.keys, s.depth, s.k),
                               operand(s.keys, columns, s.v)))
    if s.bias:
        arrays.append(codes(rng, (1, s.heads, s.rows, s.keys), "int16", how))
    masks = [codes(rng, (1, s.batch, 1, s.rows, s.keys), "int16", how) for _ in range(s.masks)]
    # Shifts that use most of the range of codes, without a clamp everywhere.
    deep = int(np.ceil(np.log2(s.depth) / 2))
    first = 31 + _bits(s.q) + _bits(s.k) + deep - _bits(s.scores) - 1
    second = 31 + _bits(s.p) + _bits(s.v) - _bits(s.out) - 2
    axes = {"a_axes": [0, 2, 1, 3], "b_axes": [0, 2, 1, 3]} if s.folded else {}
    numbers = {"mult": s.mult, "zero_point": 0, "transpose_b": True}
    low, high = CODES[s.scores]

    def body(q: Any, k: Any, v: Any, *more: Any) -> relax.Expr:
        bb = relax.BlockBuilder.current()
        extra = {"res_mult": s.res_mult, "res_shift": s.res_shift} if s.bias else {}
        added = [more[0]] if s.bias else []
        x = bb.emit(call("matmul_requant_add" if s.bias else "matmul_requant", q, k, *added,
                         **numbers, shift=s.shift or first, qmin=low, qmax=high, **axes,
                         out_dtype=s.scores, **extra))
        whole = (s.batch, s.heads, s.rows, s.keys)
        for mask in masks:
            x = bb.emit(relax.op.reshape(x, (1, *whole)))
            x = bb.emit(call("add", x, as_const(mask, "int16"), a_mult=1864801805, a_shift=31,
                             a_zero_point=0, b_mult=2**30, b_shift=30, b_zero_point=0,
                             qmin=low, qmax=high, out_dtype=s.scores, zero_point=0))
            x = bb.emit(relax.op.reshape(x, whole))
        top = CODES[s.p][1]
        x = bb.emit(softmax(x, s.in_scale, 2.0**-_bits(s.p), top, s.p, s.method))
        stored = {"b_axes": [0, 2, 1, 3], "out_axes": [0, 2, 1, 3]} if s.folded else {}
        qmin, qmax = CODES[s.out]
        return call("matmul_requant", x, v, **{**numbers, "transpose_b": False,
                                               "zero_point": s.zero_point},
                    shift=s.out_shift or second, qmin=qmin, qmax=qmax, out_dtype=s.out, **stored)

    mod = module(arrays, body)
    legal = relax.transform.LegalizeOps()(mod)
    kernels = [b.value for block in legal["main"].body.blocks for b in block.bindings
               if isinstance(b.value, relax.Call)
               and b.value.op.same_as(tvm.ir.Op.get("relax.call_tir"))
               and "reshape" not in b.value.args[0].name_hint]
    names = {f"p{i}": array for i, array in enumerate(arrays)}
    arguments = []
    for kernel in kernels:
        for arg in kernel.args[1].fields:
            if isinstance(arg, relax.Var):
                if arg.name in names:
                    arguments.append(names[arg.name])
            else:
                arguments.append(arg.value.numpy())
    funcs = [legal[kernel.args[0]] for kernel in kernels]
    return Attention(funcs[0], funcs[1:-2], funcs[-2], funcs[-1], arguments,
                     _expected(s, arrays, masks, mod))


def _expected(s: Shape, arrays: Sequence[np.ndarray], masks: Sequence[np.ndarray],
              mod: tvm.IRModule) -> np.ndarray:
    """Return the result by int64 NumPy; the softmax, an operator of its own, by its reference."""
    calls = [b.value for block in mod["main"].body.blocks for b in block.bindings
             if isinstance(b.value, relax.Call) and b.value.op.name.startswith("vitq.")]
    q, k, v = (a.astype(np.int64) for a in arrays[:3])
    if s.folded:
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    first, last = calls[0].attrs, calls[-1].attrs

    def rq(value: np.ndarray, mult: int, shift: int) -> np.ndarray:
        return (value * mult + (1 << (shift - 1))) >> shift

    def wrapped(value: np.ndarray) -> np.ndarray:
        assert np.abs(value).max(initial=0) < 2**31, "the case overflows"
        return value

    x = rq(wrapped(q @ k.swapaxes(-1, -2)), first["mult"], first["shift"])
    if s.bias:
        x = x + rq(arrays[3].astype(np.int64), first["res_mult"], first["res_shift"])
    x = np.clip(x, *CODES[s.scores])
    for mask in masks:
        x = rq(x, 1864801805, 31) + mask.astype(np.int64)[0]
        x = np.clip(x, *CODES[s.scores])
    soft = calls[-2]
    alone = module([x.astype(s.scores)], lambda x: relax.Call(soft.op, [x, *soft.args[1:]],
                                                              soft.attrs))
    p = Interpreter(alone).evaluate(x.astype(s.scores)).astype(np.int64)
    out = rq(wrapped(p @ v), last["mult"], last["shift"]) + s.zero_point
    out = np.clip(out, *CODES[s.out]).astype(s.out)
    return out.transpose(0, 2, 1, 3) if s.folded else out
