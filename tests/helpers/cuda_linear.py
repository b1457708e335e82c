"""Weight matmuls for GPU kernels: random operands, their PrimFunc, the expected result by int64."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from relay_passes.dialect.gelu import gelu
from schedules.apply import gemm_spec
from schedules.cuda.emulate import Emulator
from schedules.cuda.linear import packed_linear
from schedules.cuda.tile import CudaTile
from schedules.gemm import Epilogue
from schedules.isa import CUDA
from schedules.matmul import packed_linear_te
from schedules.packing import narrow_form, pack, pad_columns, plan_linear
from tests.helpers.dialect import module
from tests.helpers.kernels import CODES, LIMITS, rq
from tvm_vitq.reference.interpreter import Interpreter

__all__ = ["LinearCase", "check", "gelu_tail", "linear_case", "main_loop", "scheduled"]


@dataclass
class LinearCase:
    """An unscheduled PrimFunc, its inputs and its result."""

    func: tirx.PrimFunc
    inputs: list[np.ndarray]
    expected: np.ndarray


def linear_case(
    dtype: str = "int8",
    rows: int = 5,
    columns: int = 40,
    depth: int = 70,
    kind: str = "requant",
    out_dtype: str = "int8",
    *,
    shifts: tuple[int, int] = (32, 50),
    res_dtype: str = "int16",
    res: tuple[int, int] = (1500000001, 31),
    zero_point: int = 3,
    clamp: tuple[int, int] | None = None,
    gather: str = "",
    pieces: int = 1,
    extreme: bool = False,
    share: Sequence[np.ndarray] = (),
    seed: int = 0,
) -> LinearCase:
    """Return a case; with ``share``, of the rows (and the table) of another one.

    ``extreme`` draws only the ends of the codes' intervals, -128 for all weights.
    """
    rng = np.random.default_rng(seed)
    low, high = LIMITS[dtype]
    if dtype == "int8":
        low = -128

    def pick(lo: int, hi: int, shape: tuple[int, ...]) -> np.ndarray:
        if extreme:
            return np.where(rng.integers(0, 4, shape) > 0, lo, hi)
        return rng.integers(lo, hi + 1, shape)

    plan = plan_linear(CUDA, dtype, rows, np.zeros((depth, columns), "int8"))
    assert plan is not None and plan.offset == 0
    x = share[0] if share else pick(low, high, (rows, depth)).astype(dtype)
    w = (np.full((depth, columns), -128) if extreme
         else rng.integers(-128, 128, (depth, columns))).astype("int8")
    bias = rng.integers(-(10**5), 10**5, columns).astype("int32")
    mult = rng.integers(-(2**31) + 1, 2**31, columns).astype("int32")
    shift = rng.integers(*shifts, columns).astype("int32")
    bound = int(np.abs(w.astype("int64")).sum(0).max()) * max(-low, high) + 10**5
    fitted_mult, fitted_shift, flags = narrow_form(mult, shift, bound, zero_point,
                                                    plan.dot.least_shift)
    qmin, qmax = clamp or CODES[out_dtype]
    epilogue = Epilogue() if kind == "acc" else Epilogue(
        kind, zero_point, qmin, qmax, out_dtype,
        *(res if kind == "requant_add" else (0, 0)), **flags)
    inputs = {"x": x, "w": pack(w, plan.nt, plan.dot.kv, plan.dot),
              "bias": pad_columns(bias, plan.nt, 0)}
    source, count, table = x, rows, None
    if gather:
        inputs["x"] = x = x.reshape(-1, depth // pieces)
        count = share[1].shape[0] if share else max(1, rows - 2)
        shape = (count, pieces) if pieces > 1 else (count,)
        table = share[1] if share else rng.integers(0, len(x), shape).astype("int32")
        if gather == "residual":
            inputs["x"] = source = x[:count]
        else:
            source = x[table].reshape(count, depth)
    total = source.astype("int64") @ w.astype("int64") + bias
    if kind != "acc":
        inputs |= {"mult": pad_columns(fitted_mult, plan.nt, 0),
                   "shift": pad_columns(fitted_shift, plan.nt, plan.dot.least_shift)}
        total = rq(total, mult, shift)
    if kind == "requant_add":
        held = count if gather in ("", "x") else len(x)
        ends = np.iinfo(res_dtype)
        added = pick(int(ends.min), int(ends.max), (held, columns)).astype(res_dtype)
        inputs["residual"] = added
        total = total + rq(added if gather in ("", "x") else added[table], *res)
    if kind != "acc":
        total = np.clip(total + zero_point, qmin, qmax)
    if table is not None:
        inputs["rows"] = table
    tensors: dict[str, Any] = {name: te.placeholder(value.shape, str(value.dtype), name=name)
                               for name, value in inputs.items()}
    out = packed_linear_te(
        tensors["x"], tensors["w"], tensors["bias"], columns, epilogue, plan.dot.name,
        plan.dot.lanes, mult=tensors.get("mult"), shift=tensors.get("shift"),
        residual=tensors.get("residual"), rows=tensors.get("rows"), gather=gather)
    return LinearCase(te.create_prim_func([*tensors.values(), out]), list(inputs.values()),
                      total.astype("int32" if kind == "acc" else out_dtype))


def scheduled(case: LinearCase, tile: CudaTile | None) -> tirx.PrimFunc:
    """Return a case's kernel."""
    spec = gemm_spec(case.func)
    assert spec is not None
    return packed_linear(list(case.func.params), spec, {"tirx.noalias": True}, tile)


def check(ready: Emulator, name: str, case: LinearCase, seeds: int = 2) -> None:
    """Run a kernel on a case's inputs, in several orders of threads."""
    for seed in range(seeds):
        out = np.full_like(case.expected, 77)
        counts = ready.run(name, *case.inputs, out, seed=seed)
        np.testing.assert_array_equal(out, case.expected)
        assert counts.conflicts == 0


def main_loop(code: str, most: str) -> list[str]:
    """Return the instructions' names of the loop that holds the most of one of them."""
    names: list[str] = []
    labels: dict[str, int] = {}
    best: list[str] = []
    for line in code.splitlines():
        label = re.match(r"\s*\.(L_x_\d+):", line)
        if label:
            labels[label[1]] = len(names)
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)(.*)", line)
        if not found:
            continue
        names.append(found[1])
        goal = re.search(r"\.(L_x_\d+)", found[2])
        if found[1] == "BRA" and goal and goal[1] in labels:
            body = names[labels[goal[1]] :]
            best = max(best, body, key=lambda part: part.count(most))
    return best


def gelu_tail(
    codes: np.ndarray, method: str, out_dtype: str = "int8", channels: bool = False,
    clamp: tuple[int, int] | None = None,
) -> tuple[Any, list[np.ndarray], np.ndarray]:
    """Return GELU of codes as a tail: its PrimFunc, its constants, its result."""
    columns = codes.shape[-1]
    scale = np.linspace(0.5, 2.0, columns) if channels else None
    info = np.iinfo(out_dtype)
    low, high = clamp or (int(info.min), int(info.max))
    mod = module([codes], lambda x: gelu(
        x, 3e-4 if codes.dtype == np.int16 else 0.03, 0, 0.02, -3 if low < 0 else 9, low, high,
        out_dtype, method, channel_scale=scale))
    expected = Interpreter(mod).evaluate(codes)
    lowered = relax.transform.LegalizeOps()(mod)
    (func,) = [f for _, f in lowered.functions_items() if isinstance(f, tirx.PrimFunc)]
    call = lowered["main"].body.blocks[0].bindings[0].value
    constants = [arg.value if hasattr(arg, "value") else arg.data
                 for arg in list(call.args[1].fields)[1:]]
    return func, [np.ascontiguousarray(c.numpy()) for c in constants], expected
