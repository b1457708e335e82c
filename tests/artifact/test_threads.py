"""Numbers of threads that no machine has a use for are refused before TVM starts them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tvm_vitq
from relay_passes.errors import VitqError
from tvm_vitq.artifact.threads import check_threads, most_threads, set_threads


def test_limits() -> None:
    assert [most_threads(cpus) for cpus in (1, 4, 5, 64)] == [16, 16, 20, 256]
    for cpus in (1, 2, 64, None):
        check_threads(1, cpus)
        check_threads(most_threads(cpus), cpus)
        with pytest.raises(VitqError, match=f"give --threads 1 to {most_threads(cpus)}$"):
            check_threads(most_threads(cpus) + 1, cpus)
    with pytest.raises(VitqError, match="1000 threads are too many: the board b:1 has 4 CPUs"):
        check_threads(1000, 4, "the board b:1")
    with pytest.raises(VitqError, match="b:1 does not say how many CPUs it has"):
        check_threads(100_000, None, "the board b:1")
    with pytest.raises(VitqError, match="at least 1, got 0"):
        check_threads(0, 4)


def test_of_this_process(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    with pytest.raises(VitqError, match=f"this machine has {os.cpu_count()} CPUs"):
        set_threads(100_000)
    with pytest.raises(VitqError, match="100000 threads are too many"):
        tvm_vitq.load(toy, threads=100_000)
    assert "TVM_NUM_THREADS" not in os.environ
