"""Boards of a tracker: lent to one client at a time, and given again."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.rpc import Running, free_port, native_server, python_server, tracker, wait_for
from tests.remote.conftest import KEY
from tvm_vitq.remote import Unreachable, connect, connect_tracker
from tvm_vitq.remote.artifact import RemoteArtifact
from tvm_vitq.remote.relay import receive
from tvm_vitq.remote.tracker import MAGIC, request_board, summary


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Return a tracker; every test's boards have a key of their own."""
    pytest.importorskip("tornado", reason="TVM's tracker needs tornado (pip install .[rpc])")
    with tracker(tmp_path_factory.mktemp("farm") / "tracker") as made:
        yield made


def registered(farm: Running, key: str, count: int) -> None:
    """Wait until the tracker knows so many servers of a key."""
    end = time.monotonic() + 30
    while [name for _, name in summary("127.0.0.1", farm.port, 5)].count(key) != count:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("kind", [pytest.param("python", marks=pytest.mark.slow), "native"])
def test_lent_and_given_again(
    farm: Running, kind: str, program: Path, toy: Path, tmp_path: Path
) -> None:
    words, key = ("--tracker", farm.address), f"lent-{kind}"
    made = (python_server(tmp_path / "s", key, *words) if kind == "python"
            else native_server(program, tmp_path / "s", key, *words))  # fmt: skip
    with made as server:
        registered(farm, key, 1)
        assert (server.address, key) in summary("127.0.0.1", farm.port, 5)
        with connect_tracker(farm.address, key) as session:
            assert session.where == server.address
            assert RemoteArtifact(toy, session).verify()["equal"]
            with pytest.raises(Unreachable, match=rf"no free board with the key '{key}' within 1"):
                connect_tracker(farm.address, key, connect_timeout=1)
        # The request that was given up took nothing: both come in turn.
        for _ in range(2):
            with connect_tracker(farm.address, key) as session:
                assert RemoteArtifact(toy, session).verify()["equal"]
        with pytest.raises(Unreachable, match=rf"no board with the key 'gpu'; it knows .*{key}"):
            connect_tracker(farm.address, "gpu", connect_timeout=0.5)


def test_dead_boards_are_passed_over(
    farm: Running, program: Path, toy: Path, tmp_path: Path
) -> None:
    """One of three is killed and one stopped: whoever asks gets the third, again and again."""
    words, key = ("--tracker", farm.address), "dead"
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(native_server(program, tmp_path / str(i), key, *words))
                   for i in range(3)]  # fmt: skip
        registered(farm, key, 3)
        servers[0].signal(signal.SIGKILL)
        servers[1].signal(signal.SIGSTOP)
        for _ in range(4):
            with connect_tracker(farm.address, key, connect_timeout=12) as session:
                assert session.where == servers[2].address
                assert RemoteArtifact(toy, session).verify()["equal"]


def test_a_client_who_never_comes(farm: Running, program: Path, tmp_path: Path) -> None:
    """A board that was lent to nobody is offered again, under another key."""
    with native_server(program, tmp_path / "s", "never", "--tracker", farm.address,
                       "--offer-again", 1) as server:  # fmt: skip
        registered(farm, "never", 1)
        _, port, first = request_board("127.0.0.1", farm.port, "never", 5)
        assert port == server.port
        _, _, second = request_board("127.0.0.1", farm.port, "never", 30)
        assert first != second
        with pytest.raises(Unreachable, match="has another key"):
            connect(server.address, first)


def test_a_tracker_that_comes_back(program: Path, toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("tornado", reason="TVM's tracker needs tornado (pip install .[rpc])")
    with native_server(
        program, tmp_path / "s", KEY, "--tracker", f"127.0.0.1:{(port := free_port())}"
    ) as server:
        wait_for("cannot reach the tracker", server.log)
        with tracker(tmp_path / "tracker", port) as farm:
            registered(farm, KEY, 1)
            with connect_tracker(farm.address, KEY) as session:
                assert RemoteArtifact(toy, session).verify()["equal"]
        # It is gone again, and every attempt fails alike: said once each time.
        refused = "cannot reach the tracker"
        end = time.monotonic() + 30
        while server.log.read_text().count(refused) < 2:
            assert time.monotonic() < end, server.log.read_text()
            time.sleep(0.1)
        time.sleep(2.5)  # one more attempt
        assert server.log.read_text().count(refused) == 2, server.log.read_text()


def test_no_tracker(farm: Running, native: Running) -> None:
    with pytest.raises(Unreachable, match="no RPC tracker listens there"):
        connect_tracker(f"127.0.0.1:{free_port()}", KEY)
    with pytest.raises(Unreachable, match=r"is no tracker of TVM's RPC \(a server is one"):
        connect_tracker(native.address, KEY, connect_timeout=2)
    with pytest.raises(Unreachable, match=r"no server of TVM's RPC|does not answer"):
        connect(farm.address, KEY, connect_timeout=2)
    with pytest.raises(Unreachable, match="--tracker wants HOST:PORT"):
        connect_tracker("farm", KEY)


def test_a_tracker_that_knows_none() -> None:
    reply = json.dumps([0, {"server_info": []}]).encode()

    def serve() -> None:
        with listening, listening.accept()[0] as client:
            receive(client, 4)
            client.sendall(struct.pack("<i", MAGIC))
            receive(client, *struct.unpack("<i", receive(client, 4)))
            client.sendall(struct.pack("<i", len(reply)) + reply)

    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(Unreachable, match="it knows none at all"):
        connect_tracker(address, KEY, connect_timeout=5)
