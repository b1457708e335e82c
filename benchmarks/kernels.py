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

from schedules.isa import isa_for, resolve_target
from tests.helpers.kernels import make_linear, make_matmul
from tvm_vitq.bench.peaks import register_peak

LINEAR = [(197, 192, 192), (197, 768, 192), (197, 192, 768), (196, 192, 768), (197, 384, 384),
          (197, 1536, 384), (197, 384, 1536), (3136, 96, 96), (784, 768, 192), (49, 3072, 768)]
ATTENTION = [((3, 197, 197, 64), True), ((3, 197, 64, 197), False), ((192, 49, 49, 32), True),
             ((192, 49, 32, 49), False)]


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
