"""Independent pieces of work on all of torch's threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tvm_vitq.calibration.workers import spread


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_keep_the_order_of_the_items(threads: int) -> None:
    assert spread(lambda i: i * i, range(20)) == [i * i for i in range(20)]
    assert spread(lambda i: i, []) == []
    assert torch.get_num_threads() == threads


def test_work_runs_on_one_thread_in_the_mode_of_the_caller() -> None:
    def modes(_: int) -> tuple[int, bool]:
        torch.ones(3).add(1)
        return torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        assert set(spread(modes, range(4))) == {(1, False)}
    assert set(spread(modes, range(4))) == {(1, True)}


def test_work_may_spread_work_itself() -> None:
    assert spread(lambda i: spread(lambda j: i + j, range(3)), range(3)) == [
        [0, 1, 2], [1, 2, 3], [2, 3, 4]
    ]


def test_a_failure_reaches_the_caller_and_threads_are_restored(threads: int) -> None:
    def fail(i: int) -> int:
        raise ValueError(f"piece {i}")

    with pytest.raises(ValueError, match="piece 0"):
        spread(fail, range(4))
    assert torch.get_num_threads() == threads
