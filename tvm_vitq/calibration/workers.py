"""Runs independent pieces of torch work at once, one processor core each.

Calibration is thousands of operators on tensors of a few megabytes. Two cores gain little inside
one of them (and nothing while other processes want the cores, since they meet after every
operator), but nearly everything on two different images or candidates: every piece of work runs on
one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

__all__ = ["spread"]

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="vitq")


def spread(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return ``[function(item) for item in items]``, computed by all of torch's threads.

    Parameters
    ----------
    function : callable
        Torch work that changes nothing outside of the item and its result. It runs in the caller's
        grad mode.
    items : iterable
    """
    work, threads = list(items), torch.get_num_threads()
    if threads == 1 or not work:
        return [function(item) for item in work]
    grad = torch.is_grad_enabled()

    def alone(item: Item) -> Result:
        with torch.set_grad_enabled(grad):
            return function(item)

    torch.set_num_threads(1)  # the workers take it over when they first run an operator
    try:
        return list(_pool(threads).map(alone, work))
    finally:
        torch.set_num_threads(threads)
