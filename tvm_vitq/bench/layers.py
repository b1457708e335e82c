"""Where the time goes: kernel by kernel, through the instrument of the Relax virtual machine.

Kernels run in place, in their order, with the caches as they are in a whole run. The instrument
itself costs a few microseconds a call; its cost is measured on the spot, on calls that do nothing,
and taken off. What a processor can do changes from second to second (clock, neighbours), so the
peaks of the dot sequences are measured between the runs; medians are compared with medians.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from .compiled import Compiled

__all__ = ["group", "profile", "summary"]


def profile(path: str | Path, threads: int, runs: int) -> dict[str, Any]:
    """Time the kernels of an artefact.

    Parameters
    ----------
    path
        The artefact.
    threads
        Of the kernels; must be what the process runs with.
    runs
        Runs that the medians are taken of.

    Returns
    -------
    dict
        See :func:`summary`.
    """
    compiled = Compiled(path, threads)
    kernels = compiled.kernels
    peaks = _Peaks({_key(dot) for kernel in kernels.values() for dot in kernel.get("dots") or []})
    plain = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        compiled.run()
        plain.append(time.perf_counter() - start)
    calls = _instrumented(compiled, runs, peaks)
    return summary(calls, kernels, peaks.medians(), threads, statistics.median(plain[3:]))


def _key(dot: dict[str, Any]) -> tuple[str, int]:
    return dot["dot"], int(dot.get("chain", 1))


class _Peaks:
    """The peaks of the sequences that were used, measured again and again."""

    def __init__(self, used: set[tuple[str, int]]) -> None:
        from schedules.isa import isa_for, resolve_target

        from .peaks import peak_kernel

        target = resolve_target("native", threads=1)
        registers = isa_for(target).registers
        self.kernels = {(name, chain): peak_kernel(name, target, registers, chain)
                        for name, chain in sorted(used)}  # fmt: skip
        self.rates: dict[tuple[str, int], list[float]] = defaultdict(list)

    def measure(self) -> None:
        for key, kernel in self.kernels.items():
            self.rates[key].append(kernel.rate())

    def medians(self) -> dict[tuple[str, int], float]:
        return {key: statistics.median(rates) for key, rates in self.rates.items()}


def _instrumented(compiled: Compiled, runs: int, peaks: _Peaks) -> list[tuple[str, float]]:
    """Return (symbol, seconds) of every kernel call of a run, medians over ``runs``."""
    clock = time.perf_counter_ns
    spans: list[tuple[str, int]] = []
    opened: list[int] = []

    def before() -> None:
        opened.append(clock())

    def after(symbol: str) -> None:
        end = clock()
        spans.append((symbol, end - opened.pop()))

    compiled.instrument(before, after)
    records: list[list[tuple[str, int]]] = []
    for _ in range(runs + 2):
        spans.clear()
        compiled.run()
        records.append(list(spans))
        peaks.measure()
    records = records[2:]
    names = [symbol for symbol, _ in records[0]]
    medians = [statistics.median(r[i][1] for r in records) * 1e-9 for i in range(len(names))]
    pairs = list(zip(names, medians, strict=True))
    # Calls of the machine's own, which do next to nothing, cost what the instrument costs.
    cost = min((s for name, s in pairs if name.startswith("vm.builtin.")), default=0.0)
    known = compiled.kernels
    return [(name, max(s - cost, 0.0)) for name, s in pairs
            if name in known or not (known or name.startswith("vm.builtin."))]  # fmt: skip


def group(calls: list[tuple[str, float]], kernels: dict[str, Any]) -> list[dict[str, Any]]:
    """Add up the calls of the same operator and shape.

    Returns
    -------
    list of dict
        ``op, shape, calls, ms, macs, dots``, longest first.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in calls:
        kernel = kernels.get(name) or {"op": name}
        dots = kernel.get("dots") or []
        key = f"{kernel['op'] or name} {kernel.get('shape')} {[_key(d) for d in dots]}"
        row = rows.setdefault(key, {"op": kernel["op"] or name, "shape": kernel.get("shape"),
                                    "calls": 0, "ms": 0.0, "macs": 0, "dots": dots})  # fmt: skip
        row["calls"] += 1
        row["ms"] += seconds * 1e3
        row["macs"] += kernel.get("macs", 0)
    return sorted(rows.values(), key=lambda row: -row["ms"])


def summary(
    calls: list[tuple[str, float]],
    kernels: dict[str, Any],
    peaks: dict[tuple[str, int], float],
    threads: int,
    plain: float,
) -> dict[str, Any]:
    """Put times, operators and peaks together.

    Returns
    -------
    dict
        ``total_ms`` (kernels), ``run_ms`` (a run without the instrument), ``peaks`` (GMAC/s of one
        core), ``outside_matmuls`` (share of time), ``operators`` (``op, calls, ms, share``),
        ``kernels`` (also ``shape``, ``gmacs`` (GMAC/s), ``dots``, ``of_peak``) and ``weights`` of
        the weight matmuls: ``of_peak``, by time, and ``work``, the share of their
        multiply-accumulates on each sequence.
    """
    total = sum(seconds for _, seconds in calls) * 1e3 or float("nan")
    rows = group(calls, kernels)
    operators: dict[str, dict[str, Any]] = defaultdict(lambda: {"calls": 0, "ms": 0.0})
    for row in rows:
        row["share"] = round(row["ms"] / total, 4)
        rate = row["macs"] / row["ms"] / 1e6 if row["macs"] and row["ms"] else None
        peak = _peak(row["dots"], peaks)
        row["gmacs"] = None if rate is None else round(rate, 2)
        row["of_peak"] = round(rate / peak / threads, 4) if rate and peak else None
        operators[row["op"]]["calls"] += row["calls"]
        operators[row["op"]]["ms"] += row["ms"]
    for row in rows:
        row["ms"] = round(row["ms"], 5)
    listed = [
        {"op": op, "calls": v["calls"], "ms": round(v["ms"], 5), "share": round(v["ms"] / total, 4)}
        for op, v in sorted(operators.items(), key=lambda item: -item[1]["ms"])
    ]
    inside = sum(row["share"] for row in rows if row["macs"])
    return {
        "total_ms": round(total, 4),
        "run_ms": round(plain * 1e3, 4),
        "peaks": {_spell(*key): round(peak, 2) for key, peak in peaks.items()},
        "outside_matmuls": round(1 - inside, 4),
        "operators": listed,
        "kernels": rows,
        "weights": _weights(rows),
    }


def _weights(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the matmuls with weights."""
    linear = [row for row in rows if row["macs"] and row["dots"] and "linear" in row["op"]]
    work: dict[str, float] = defaultdict(float)
    for row in linear:
        columns = [float(dot.get("columns", 1)) for dot in row["dots"]]
        for dot, part in zip(row["dots"], columns, strict=True):
            work[_spell(*_key(dot))] += row["macs"] * part / sum(columns)
    total = sum(work.values())
    known = [row for row in linear if row["of_peak"] is not None]
    time = sum(row["ms"] for row in known)
    return {
        "of_peak": round(sum(r["ms"] * r["of_peak"] for r in known) / time, 4) if time else None,
        "work": {name: round(part / total, 4)
                 for name, part in sorted(work.items(), key=lambda item: -item[1])},
    }  # fmt: skip


def _spell(name: str, chain: int) -> str:
    return name if chain == 1 else f"{name} x{chain}"


def _peak(dots: list[dict[str, Any]], peaks: dict[tuple[str, int], float]) -> float | None:
    """Return the peak of a kernel whose columns may have several sequences: the harmonic mean."""
    if not dots or any(_key(dot) not in peaks for dot in dots):
        return None
    columns = [float(dot.get("columns", 1)) for dot in dots]
    time_of_all = sum(n / peaks[_key(dot)] for n, dot in zip(columns, dots, strict=True))
    return sum(columns) / time_of_all
