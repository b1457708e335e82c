"""How kernels are timed: on the processor by the clock, on a GPU by events around a CUDA graph.

A kernel of a few microseconds takes less than its launch from here, so on a GPU the calls of a
sample are recorded once as a graph, which the device then runs without the host.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .worker import Loaded

__all__ = ["Clock", "GpuClock", "ProcessorClock", "clock_of", "gpu_peak"]

MACS_PER_CLOCK = {75: 1024, 80: 2048, 86: 1024, 87: 2048, 89: 1024, 90: 4096}
"""Dense 8-bit multiply-accumulates of a multiprocessor in a cycle, by compute capability (NVIDIA's
architecture white papers)."""
_RELAXED = 2
"""``cudaStreamCaptureModeRelaxed``: other streams may do what a capture forbids."""


class Clock(Protocol):
    """A device, and how calls are timed there."""

    device: Any

    def sample(self, kernel: Loaded, calls: int) -> tuple[float, float]:
        """Return seconds a call, and the share of the time that the kernel had the device."""
        ...


class ProcessorClock:
    """The processor of this machine."""

    def __init__(self) -> None:
        import tvm

        self.device = tvm.cpu()

    def sample(self, kernel: Loaded, calls: int) -> tuple[float, float]:
        """Call the kernel; the share is processor time over wall time."""
        run, sets = kernel.run, kernel.sets
        cpu, start = time.process_time(), time.perf_counter()
        for i in range(calls):
            run(*sets[i % len(sets)])
        wall, used = time.perf_counter() - start, time.process_time() - cpu
        return wall / calls, used / wall


class GpuClock:
    """The first GPU of this machine.

    Raises
    ------
    OSError
        If there is no CUDA runtime.
    """

    def __init__(self) -> None:
        import tvm

        self.device = tvm.cuda(0)
        self._cuda = ctypes.CDLL("libcudart.so.13")
        self._stream = self._new("cudaStreamCreate")
        self.device.set_raw_stream(self._stream.value)
        self._begin, self._end = self._new("cudaEventCreate"), self._new("cudaEventCreate")
        self._graphs: dict[Loaded, tuple[int, ctypes.c_void_p]] = {}  # of so many calls

    def _do(self, function: str, *arguments: Any) -> None:
        status = getattr(self._cuda, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} gives error {status}")

    def _new(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._do(function, ctypes.byref(made), *arguments)
        return made

    def sample(self, kernel: Loaded, calls: int) -> tuple[float, float]:
        """Run the recorded calls once; a GPU has no share to tell."""
        graph = self._graph(kernel, calls)
        self._do("cudaEventRecord", self._begin, self._stream)
        self._do("cudaGraphLaunch", graph, self._stream)
        self._do("cudaEventRecord", self._end, self._stream)
        self._do("cudaEventSynchronize", self._end)
        taken = ctypes.c_float()
        self._do("cudaEventElapsedTime", ctypes.byref(taken), self._begin, self._end)
        return max(taken.value, 1e-6) / 1e3 / calls, 1.0

    def _graph(self, kernel: Loaded, calls: int) -> ctypes.c_void_p:
        """Return the graph of so many calls; a kernel's last one is kept."""
        held = self._graphs.get(kernel)
        if held is not None and held[0] == calls:
            return held[1]
        many = len(self._graphs) > 3
        for other in [other for other in self._graphs if many or other is kernel]:
            self._do("cudaGraphExecDestroy", self._graphs.pop(other)[1])
        self._do("cudaStreamSynchronize", self._stream)
        self._do("cudaStreamBeginCapture", self._stream, _RELAXED)
        graph = ctypes.c_void_p()
        try:
            for i in range(calls):
                kernel.run(*kernel.sets[i % len(kernel.sets)])
        finally:
            self._do("cudaStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            made = self._new("cudaGraphInstantiate", graph, ctypes.c_ulonglong(0))
        finally:
            self._do("cudaGraphDestroy", graph)
        self._graphs[kernel] = calls, made
        self._do("cudaGraphLaunch", made, self._stream)  # untimed
        return made


def clock_of(target: Any) -> Clock:
    """Return how kernels of a target are timed."""
    return GpuClock() if target.kind.name == "cuda" else ProcessorClock()


def gpu_peak(dot: str) -> float | None:
    """Return what this machine's GPU does at most with a dot sequence, in GMAC/s.

    From the number of multiprocessors, their highest clock and :data:`MACS_PER_CLOCK`; activations
    of 16 bits are multiplied as two planes. None for a GPU that is not listed.
    """
    import tvm

    device = tvm.cuda(0)
    number = int(str(device.compute_version).replace(".", ""))
    if number not in MACS_PER_CLOCK:
        return None
    rate = MACS_PER_CLOCK[number] * device.multi_processor_count * device.max_clock_rate / 1e6
    return float(rate / 2 if dot == "mma16" else rate)
