"""How many threads kernels may use: TVM starts as many as it is told, thousands too, and hangs."""

from __future__ import annotations

import os

from relay_passes.errors import VitqError

__all__ = ["check_threads", "most_threads", "set_threads"]


def most_threads(cpus: int | None) -> int:
    """Return the largest number of threads that is let through, as ``vitq.hpp`` does."""
    return 1024 if cpus is None else max(16, 4 * cpus)


def check_threads(threads: int, cpus: int | None, place: str = "this machine") -> None:
    """Refuse a number of threads that a machine has no use for.

    Parameters
    ----------
    threads
        The number.
    cpus
        CPUs of the machine; None if they are not known.
    place
        The machine, for the error.

    Raises
    ------
    VitqError
        If it is less than 1, or more than :func:`most_threads`.
    """
    if threads < 1:
        raise VitqError(f"the number of threads must be at least 1, got {threads}")
    most = most_threads(cpus)
    if threads > most:
        known = f"has {cpus} CPUs" if cpus else "does not say how many CPUs it has"
        raise VitqError(
            f"{threads} threads are too many: {place} {known}; give --threads 1 to {most}"
        )


def set_threads(threads: int) -> None:
    """Set how many threads the kernels of this process use.

    Raises
    ------
    VitqError
        As :func:`check_threads`.
    """
    check_threads(threads, os.cpu_count())
    # The pool reads the variable when it starts; a running pool is configured directly.
    os.environ["TVM_NUM_THREADS"] = str(threads)
    import tvm_ffi

    configure = tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True)
    if configure is not None:
        configure(1, threads)
