"""A tracker and four servers, one killed and one hung in mid-run: nothing is lost."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from schedules.isa import isa_for, resolve_target
from schedules.records import RecordFile
from tests.helpers.rpc import Running, native_server, tracker
from tvm_vitq.remote import connect, connect_tracker
from tvm_vitq.remote.server import PROGRAM, package_server
from tvm_vitq.remote.tracker import summary
from tvm_vitq.saved import load_quantized
from tvm_vitq.tuning.board import Boards
from tvm_vitq.tuning.job import TuneJob, describe
from tvm_vitq.tuning.runner import RunnerFault
from tvm_vitq.tuning.tune import Limits

KEY = "farm"
ISA = isa_for(resolve_target("native"))


@pytest.fixture(scope="session")
def program(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return ``vitq_rpc_server`` for this machine."""
    made = build_once("rpc_server", lambda f: package_server(f / "server") and None)
    return made / "server" / PROGRAM


def test_one_killed_and_one_hung(tiny: Path, program: Path, tmp_path: Path) -> None:
    pytest.importorskip("tornado", reason="TVM's tracker needs tornado (pip install .[test])")
    with ExitStack() as stack:
        farm: Running = stack.enter_context(tracker(tmp_path / "tracker"))
        servers = [stack.enter_context(native_server(program, tmp_path / f"s{i}", KEY, "--tracker",
                                                     farm.address)) for i in range(4)]
        end = time.monotonic() + 30
        while len(summary("127.0.0.1", farm.port, 5)) != 4:
            assert time.monotonic() < end
            time.sleep(0.1)
        job = TuneJob(
            load_quantized(tiny), "native", tmp_path / "records", Limits(60, batch=2),
            open_session=lambda: connect_tracker(farm.address, KEY, timeout=3, connect_timeout=2),
            boards=4)  # fmt: skip
        tuning = job.prepare()
        done = threading.Event()

        def disturb() -> None:
            if tuning.trials >= 12 and not done.is_set():
                done.set()
                servers[0].signal(signal.SIGKILL)
                servers[1].signal(signal.SIGSTOP)

        tuning.report = disturb
        job.run(tuning)
    document = describe(tuning)
    assert done.is_set() and document["trials"] == 60
    records = RecordFile.of(tmp_path / "records", ISA).read()
    trials = [(r.of.key, json.dumps(r.point, sort_keys=True)) for r in records
              if r.what == "trial"]  # fmt: skip
    rejected = sum(task["rejected"] for task in document["tasks"])
    assert len(trials) == 60 - rejected and max(Counter(trials).values()) == 1
    assert rejected == 0
    assert all(task["tuned"] for task in document["tasks"])
    notes = " ".join(document["notes"])
    assert "no answer within 3 s" in notes and ("lost" in notes or "ended" in notes), notes


def test_a_board_that_fails_again_is_left_out(program: Path, tmp_path: Path) -> None:
    with native_server(program, tmp_path / "s", KEY) as server:
        boards = Boards(lambda: connect(server.address, KEY, connect_timeout=0.3), patience=1)
        boards.runner().close()
        for _ in range(2):
            assert boards.left_out == []
            boards.fault(server.address)
        assert boards.left_out == [server.address]
        with pytest.raises(RunnerFault, match="failed 2 times"):
            boards.runner()
    nobody = Boards(lambda: connect("127.0.0.1:1", KEY, connect_timeout=0.2), patience=0.5)
    with pytest.raises(RunnerFault):
        nobody.runner()
