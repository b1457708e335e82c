"""What a dot sequence can do at best on this machine, measured on the spot.

A small kernel made of the same TIR as the matmuls: activations in registers, accumulators in
registers, one panel of weights that never leaves the first-level cache.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from schedules.builder import Writer, const, load, vector_type
from schedules.x86.intrinsics import DOTS

__all__ = ["PeakKernel", "peak_kernel", "register_peak"]


@dataclass(frozen=True)
class PeakKernel:
    """A built kernel that does nothing but ``macs`` multiply-adds, its arguments."""

    function: Any
    arguments: list[Any]
    macs: int

    def rate(self) -> float:
        """Run it once; return 10^9 multiply-adds a second."""
        start = time.perf_counter()
        self.function(*self.arguments)
        return self.macs / (time.perf_counter() - start) / 1e9


def register_peak(
    name: str, target: tvm.target.Target, registers: int, chain: int = 1, seconds: float = 0.3
) -> float:
    """Return the highest rate of :func:`peak_kernel` within ``seconds``."""
    kernel = peak_kernel(name, target, registers, chain)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = max(best, kernel.rate())
    return best


def peak_kernel(
    name: str, target: tvm.target.Target, registers: int, chain: int = 1
) -> PeakKernel:
    """Build the kernel that shows the rate of a dot sequence on one core; about a millisecond.

    Parameters
    ----------
    name
        Key of :data:`schedules.x86.intrinsics.DOTS`.
    target
        This machine's.
    registers
        Vector registers of its instruction set.
    chain
        Groups of K that the sequence adds before it widens.
    """
    dot = DOTS[name]
    rows, vectors, steps, rounds = (8 if registers == 32 else 4), 2, 64, 4000
    width, lanes = dot.lanes * dot.kv, dot.lanes
    w = Writer()
    a = tirx.decl_buffer((rows * chain * dot.kv,), dot.operand, "a")
    b = tirx.decl_buffer((steps * chain * vectors * width,), dot.weight, "b")
    out = tirx.decl_buffer((rows * vectors * lanes,), "int32", "out")
    acc = w.alloc("acc", (rows * vectors * lanes,), "int32")
    for i in range(rows * vectors):
        w.store(acc, const(0, vector_type("int32", lanes)), i * lanes, lanes=lanes)
    groups = [
        [w.bind("g", dot.spread(
            tirx.reinterpret(dot.word, load(a, (r * chain + u) * dot.kv, lanes=dot.kv))))
         for u in range(chain)]
        for r in range(rows)
    ]  # fmt: skip
    with w.loop("round", rounds), w.loop("k", steps) as k:
        columns = [
            [w.bind("w", load(b, ((k * chain + u) * vectors + v) * width, lanes=width))
             for u in range(chain)]
            for v in range(vectors)
        ]  # fmt: skip
        for v in range(vectors):
            for r in range(rows):
                at = (r * vectors + v) * lanes
                total = dot.step(load(acc, at, lanes=lanes), groups[r], columns[v])
                w.store(acc, total, at, lanes=lanes)
    for i in range(rows * vectors):
        w.store(out, load(acc, i * lanes, lanes=lanes), i * lanes, lanes=lanes)
    func = w.prim_func([a, b, out], {"global_symbol": "main", "tirx.noalias": True, "s_tir": True})
    run = tvm.compile(func, target=target)["main"]
    args = [tvm.runtime.tensor(np.ones([int(s) for s in p.shape], str(p.dtype)))
            for p in (a, b, out)]  # fmt: skip
    return PeakKernel(run, args, rows * vectors * width * steps * rounds * chain)
