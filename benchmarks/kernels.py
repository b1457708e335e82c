"""Kernel by kernel: rate, share of the sequence's register peak, ratio to MKL's fp32 matmul.

Run: ``python -m benchmarks.kernels [--target native] [--pairs 30] [--json FILE]``. One thread. A
kernel and ``torch.mm`` of the same shape run turn about in one process; the ratio is the median of
the pairs' ratios, rates come from the fastest run. The peak of a dot sequence is measured with the
activations in registers and one small panel of weights in the first-level cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import torch
import tvm
from tvm import tirx

from schedules.builder import Writer, const, load, vector_type
from schedules.isa import isa_for, resolve_target
from schedules.x86.intrinsics import DOTS
from tests.helpers.kernels import make_linear, make_matmul

LINEAR = [(197, 192, 192), (197, 768, 192), (197, 192, 768), (196, 192, 768), (197, 384, 384),
          (197, 1536, 384), (197, 384, 1536), (3136, 96, 96), (784, 768, 192), (49, 3072, 768)]
ATTENTION = [((3, 197, 197, 64), True), ((3, 197, 64, 197), False), ((192, 49, 49, 32), True),
             ((192, 49, 32, 49), False)]


def fastest(run: Callable[[], Any], seconds: float = 0.3) -> float:
    """Return the shortest time of one call."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def register_peak(
    name: str, target: tvm.target.Target, registers: int, chain: int = 1
) -> float:
    """Return the rate of a dot sequence without its memory traffic, in GMAC/s."""
    dot = DOTS[name]
    rows, vectors, steps, rounds = (8 if registers == 32 else 4), 2, 64, 4000
    width = dot.lanes * dot.kv
    w = Writer()
    a = tirx.decl_buffer((rows * chain * dot.kv,), dot.operand, "a")
    b = tirx.decl_buffer((steps * chain * vectors * width,), dot.weight, "b")
    out = tirx.decl_buffer((rows * vectors * dot.lanes,), "int32", "out")
    lanes = dot.lanes
    acc = w.alloc("acc", (rows * vectors * lanes,), "int32")
    for i in range(rows * vectors):
        w.store(acc, const(0, vector_type("int32", lanes)), i * lanes, lanes=lanes)
    groups = [[w.bind("g", tirx.reinterpret(
        "int32", load(a, (r * chain + u) * dot.kv, lanes=dot.kv))) for u in range(chain)]
        for r in range(rows)]
    with w.loop("round", rounds), w.loop("k", steps) as k:
        columns = [[w.bind("w", load(b, ((k * chain + u) * vectors + v) * width, lanes=width))
                    for u in range(chain)] for v in range(vectors)]
        for v in range(vectors):
            for r in range(rows):
                at = (r * vectors + v) * lanes
                total = dot.step(load(acc, at, lanes=lanes), groups[r], columns[v])
                w.store(acc, total, at, lanes=lanes)
    for i in range(rows * vectors):
        w.store(out, load(acc, i * lanes, lanes=lanes), i * lanes, lanes=lanes)
    func = w.prim_func([a, b, out], {"global_symbol": "main", "tirx.noalias": True, "s_tir": True})
    lib = tvm.compile(func, target=target)
    args = [tvm.runtime.tensor(np.ones([int(s) for s in p.shape], str(p.dtype)))
            for p in (a, b, out)]
    macs = rows * vectors * width * steps * rounds * chain
    return macs / fastest(lambda: lib["main"](*args), 1.0) / 1e9


def against_mkl(run: Callable[[], Any], rows: int, columns: int, depth: int, batch: int,
                pairs: int) -> tuple[float, float]:
    """Return (fastest time of ``run``, median of MKL's time over ours), run turn about."""
    x, y = torch.randn(batch, rows, depth), torch.randn(batch, depth, columns)
    peer = (lambda: torch.bmm(x, y)) if batch > 1 else (lambda: torch.mm(x[0], y[0]))
    ours, ratios = float("inf"), []
    for _ in range(3):
        run(), peer()
    for _ in range(pairs):
        start = time.perf_counter()
        run()
        middle = time.perf_counter()
        peer()
        end = time.perf_counter()
        ours = min(ours, middle - start)
        ratios.append((end - middle) / (middle - start))
    return ours, statistics.median(ratios)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="native")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = resolve_target(options.target, threads=1)
    isa = isa_for(target)
    peaks = {name: register_peak(name, target, isa.registers)
             for name in dict.fromkeys((isa.dot8, isa.dot16))}
    print(f"{options.target}: {isa.name}; register peaks in GMAC/s: "
          + ", ".join(f"{name} {peak:.1f}" for name, peak in peaks.items()))
    results = []
    print(f"{'kernel':38s} {'GMAC/s':>8s} {'of peak':>8s} {'x MKL fp32':>10s}")

    def report(name: str, dot: str, run: Callable[[], Any], shape: tuple[int, int, int],
               batch: int = 1) -> None:
        seconds, ratio = against_mkl(run, *shape, batch, options.pairs)
        rate = batch * shape[0] * shape[1] * shape[2] / seconds / 1e9
        share = rate / peaks[dot]
        results.append({"kernel": name, "dot": dot, "gmacs": rate, "of_peak": share,
                        "against_mkl": ratio})
        print(f"{name:38s} {rate:8.1f} {share:8.1%} {ratio:10.2f}", flush=True)

    for shape in LINEAR:
        for kind, out_dtype, dtype in (("acc", "int32", "int8"), ("requant", "int8", "int8"),
                                       ("requant_add", "int16", "int8"),
                                       ("requant", "int16", "int16")):
            kernel = make_linear(*shape, options.target, kind, dtype, out_dtype, shifts=(36, 44))
            assert np.array_equal(kernel.run(), kernel.expected)
            dot = isa.dot16 if dtype == "int16" else isa.dot8
            run = kernel.lib["main"]
            report(f"linear {shape} {dtype} {kind}", dot,
                   lambda r=run, k=kernel: r(*k.args), shape)
    for (batch, *rest), transposed in ATTENTION:
        dtypes = ("int8", "int8") if transposed else ("int16", "int8")
        kernel = make_matmul((batch, *rest), options.target, transposed, dtypes)
        assert np.array_equal(kernel.run(), kernel.expected)
        dot = isa.dot8 if transposed else isa.dot16
        name = "q_kt" if transposed else "p_v"
        run = kernel.lib["main"]
        report(f"{name} {(batch, *rest)}", dot, lambda r=run, k=kernel: r(*k.args), tuple(rest),
               batch)
    if options.json:
        options.json.write_text(json.dumps({"target": options.target, "peaks": peaks,
                                            "results": results}, indent=1))


if __name__ == "__main__":
    main()
