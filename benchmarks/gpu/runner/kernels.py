"""Time kernel by kernel, as the device's own profiler (CUPTI, through PyTorch) tells it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["LARGE", "device_times", "rows_of"]

LARGE = 1_000_000_000
"""Multiply-accumulates from which on a matmul counts as large."""

_SUFFIX = re.compile(r"_kernel(_\d+)?$")


def device_times(run: Callable[[int], Any], sets: int, passes: int) -> list[tuple[str, float]]:
    """Return ``(kernel, microseconds)`` of everything the device ran in ``passes`` runs."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    run(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(passes):
            run(i % sets)
        torch.cuda.synchronize()
    return [
        (event.name, float(event.time_range.elapsed_us()))
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def rows_of(
    times: Iterable[tuple[str, float]], passes: int, kernels: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Add up the times by PrimFunc.

    Parameters
    ----------
    times
        ``(kernel, microseconds)`` of every launch.
    passes
        Runs of the network that they come from.
    kernels
        The artefact's description: symbol to ``op``, for matmuls ``shape`` and ``macs``.

    Returns
    -------
    dict
        ``launches`` of one run; ``rows``, longest first: ``symbol, op, shape, calls, us`` (of all
        calls in one run) and for matmuls ``tops``; ``large``: the matmuls by weights of at least
        :data:`LARGE` multiply-accumulates together: ``tops``, ``worst_tops`` and ``us``.
    """
    found: dict[str, dict[str, Any]] = {}
    launches = 0
    for name, microseconds in times:
        symbol = _SUFFIX.sub("", name)
        launches += 0 if name.startswith("Mem") else 1
        row = found.setdefault(symbol, {"symbol": symbol, "calls": 0, "us": 0.0})
        row["calls"] += 1
        row["us"] += microseconds
    large: list[tuple[float, float]] = []
    for symbol, row in found.items():
        row["calls"] /= passes
        row["us"] = round(row["us"] / passes, 3)
        told = kernels.get(symbol, {})
        row.update({key: told[key] for key in ("op", "shape") if key in told})
        macs = told.get("macs")
        if macs and row["us"]:
            operations = 2 * macs * row["calls"]
            row["tops"] = round(operations / row["us"] / 1e6, 2)
            if macs >= LARGE and "linear" in told["op"]:
                large.append((operations, row["us"]))
    result: dict[str, Any] = {
        "launches": launches / passes,
        "rows": sorted(found.values(), key=lambda row: -row["us"]),
    }
    if large:
        total = sum(us for _, us in large)
        result["large"] = {
            "tops": round(sum(operations for operations, _ in large) / total / 1e6, 2),
            "worst_tops": round(min(operations / us for operations, us in large) / 1e6, 2),
            "us": round(total, 3),
        }
    return result
