"""The device: what it is, how it is clocked, how fast it multiplies and copies at best."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from importlib import metadata
from typing import Any

__all__ = ["clocks", "describe", "peaks", "why_not"]

_STATE = {
    "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "clocks.max.sm": "sm_max_mhz",
    "temperature.gpu": "celsius", "power.draw": "watt", "power.limit": "watt_limit",
    "clocks_event_reasons.active": "throttled_by",
}  # fmt: skip


_MAJOR, _MINOR = 75, 76
"""The driver's numbers of the two parts of the compute capability."""


def why_not(arch: str) -> str:
    """Return why code for ``sm_XX`` cannot run on the first GPU, ``""`` if it can.

    Asks the driver alone, so it takes no PyTorch and no CUDA runtime.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as why:
        return f"no CUDA device: {why}"
    status = driver.cuInit(0)
    if status:
        return f"no CUDA device: the driver's cuInit gives error {status}"
    count, device = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if not count.value:
        return "no CUDA device: the driver finds none"
    driver.cuDeviceGet(ctypes.byref(device), 0)
    parts = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        parts.append(value.value)
    here, wanted = 10 * parts[0] + parts[1], int("".join(filter(str.isdigit, arch)) or 0)
    if arch[-1:].isalpha() and here > wanted:  # code for sm_90a, say, runs there and nowhere else
        return (f"the artefacts are for {arch} alone, and this device is sm_{here}: make a bundle "
                f"with --arch {arch[:-1]}")
    return "" if here >= wanted else f"the artefacts are for {arch}, and this device is sm_{here}"


def _nvidia_smi(fields: list[str]) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return [part.strip() for part in done.stdout.splitlines()[0].split(",")]
    return []


def clocks() -> dict[str, Any]:
    """Return clocks, temperature and power now; empty where ``nvidia-smi`` does not tell."""
    found: dict[str, Any] = {}
    for key, text in zip(_STATE.values(), _nvidia_smi(list(_STATE)), strict=False):
        try:
            found[key] = float(text)
        except ValueError:
            found[key] = text
    return found


def describe(device: str) -> dict[str, Any]:
    """Return the device's name and size, the driver, and the versions of what is installed.

    PyTorch is asked for the name only where ``nvidia-smi`` does not tell it: importing it takes
    seconds. The name is empty where neither can tell it.
    """
    found: dict[str, Any] = {"kind": device, "python": platform.python_version()}
    for package in ("torch", "triton", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if device != "cuda":
        return {**found, "name": platform.processor() or platform.machine()}
    told = _nvidia_smi(["name", "driver_version", "memory.total", "compute_cap"])
    if told:
        return {**found, **dict(zip(("name", "driver", "memory_mib", "capability"), told,
                                    strict=True))}  # fmt: skip
    name = ""
    with contextlib.suppress(ImportError, RuntimeError, AssertionError):
        import torch

        name = torch.cuda.get_device_name(0)
    return {**found, "name": name}


def peaks(sizes: tuple[int, ...], device: str, runs: int = 20) -> dict[str, Any]:
    """Measure what the device does at best.

    Parameters
    ----------
    sizes
        Edges of the square matrices of random int8 codes.
    device
        ``cuda``, or ``cpu`` for a trial of the code.
    runs
        Products timed one by one, after three untimed ones; their median counts.

    Returns
    -------
    dict
        ``int8_tops`` by size and ``int8_peak_tops``, the largest (``torch._int_mm``); the same of
        bf16; ``copy_gb_per_s``, bytes read and written; on a GPU its ``multiprocessors`` and
        ``l2_bytes``. An operation is an addition or a product.
    """
    import torch

    def tops(size: int, make: Callable[[], Any], multiply: Callable[[Any, Any], Any]) -> float:
        a, b = make(), make().t()
        seconds = _median(lambda: multiply(a, b), device, runs)
        return round(2 * size**3 / seconds / 1e12, 3)

    found: dict[str, Any] = {"int8_tops": {}, "bf16_tops": {}}
    for size in sizes:
        found["int8_tops"][str(size)] = tops(
            size, lambda: torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device),  # noqa: B023
            torch._int_mm)  # fmt: skip
        found["bf16_tops"][str(size)] = tops(
            size, lambda: torch.randn(size, size, dtype=torch.bfloat16, device=device),  # noqa: B023
            torch.matmul)  # fmt: skip
    found["int8_peak_tops"] = max(found["int8_tops"].values())
    found["bf16_peak_tops"] = max(found["bf16_tops"].values())
    bytes_ = (1 << 30) if device == "cuda" else (1 << 24)
    source = torch.randint(0, 255, (bytes_,), dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    seconds = _median(lambda: goal.copy_(source), device, runs)
    found["copy_gb_per_s"] = round(2 * bytes_ / seconds / 1e9, 1)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = getattr(properties, "L2_cache_size", None)
    return found


def _median(action: Callable[[], Any], device: str, runs: int) -> float:
    from .timing import Clock

    clock = Clock(device)
    clock.seconds(lambda _: action(), 3, 1)
    return statistics.median(clock.seconds(lambda _: action(), 1, 1) for _ in range(runs))
