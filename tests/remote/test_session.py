"""Sessions that go wrong end with one line, in their time, and leave the process alive."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from relay_passes.errors import VitqError
from tests.helpers.rpc import Running, free_port, native_server, running, wait_for
from tests.remote.conftest import KEY
from tvm_vitq.remote import BoardGone, BoardTimeout, RemoteError, Unreachable, connect
from tvm_vitq.remote.artifact import RemoteArtifact

FOREVER = 10**9


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@contextlib.contextmanager
def listener(reply: bytes | None) -> Iterator[str]:
    """Yield the address of something that is no server: it says ``reply`` and closes, or waits."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        taken: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                taken.append(listening.accept()[0])
                if reply is not None:
                    taken[0].sendall(reply)
                    taken[0].close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        for each in taken:
            each.close()


def test_no_server() -> None:
    with within(5):
        with pytest.raises(Unreachable, match="refuses the connection: no RPC server listens"):
            connect(f"127.0.0.1:{free_port()}")
        for address in ("board", "board:", ":9090", "board:99999", "board:port"):
            with pytest.raises(Unreachable, match="wants HOST:PORT"):
                connect(address)


def test_something_else_listens() -> None:
    with within(20):
        with (listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address,
              pytest.raises(Unreachable, match="is no server of TVM's RPC")):  # fmt: skip
            connect(address)
        with (listener(b"") as address, pytest.raises(Unreachable, match="closes the connection")):
            connect(address)
        with (listener(None) as address,
              pytest.raises(Unreachable, match=r"does not answer within 0.5 s: it serves another")):
            connect(address, connect_timeout=0.5)


def test_keys(server: Running) -> None:
    with pytest.raises(Unreachable, match="has another key than 'other'"):
        connect(server.address, "other")
    with pytest.raises(Unreachable, match="has a key; give it with --key"):
        connect(server.address)
    with pytest.raises(Unreachable, match="no spaces"):
        connect(server.address, f"{KEY} -timeout=1")
    with connect(server.address, KEY) as session:
        assert session.board.architecture


def test_a_server_that_is_busy(server: Running) -> None:
    with (connect(server.address, KEY), within(10),
          pytest.raises(Unreachable, match="it serves another client")):  # fmt: skip
        connect(server.address, KEY, connect_timeout=0.5)
    connect(server.address, KEY).close()


def test_tensors_and_errors_there(server: Running) -> None:
    big = np.random.default_rng(0).integers(-128, 128, (3, 1 << 20), dtype=np.int8)
    with connect(server.address, KEY) as session:
        assert np.array_equal(session.fetch(session.tensor(big)), big)
        with pytest.raises(RemoteError, match=r"calling no\.such: Module has no function"):
            session.call("no.such")
        with pytest.raises(RemoteError, match=r"calling tvm\.rpc\.server\.download: ") as caught:
            session.call("tvm.rpc.server.download", "no such file")
        assert not isinstance(caught.value, BoardGone) and "\n" not in str(caught.value)
        with pytest.raises(VitqError, match="at least 1"):
            session.set_threads(0)
        with pytest.raises(VitqError, match="100000 threads are too many: the board 127"):
            session.set_threads(100_000)
        session.set_threads(1)
    with pytest.raises(BoardGone, match="the session is closed"):
        session.call("runtime.config_threadpool", 1, 1)


# A process of its own: where an object of the board ends, the client waits with Python's lock held.
SLOW_LINE = """
import socket, sys, threading, time
port, chunk, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
listening = socket.socket()
listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, chunk)
listening.bind(("127.0.0.1", 0))
listening.listen()
print("listening on 127.0.0.1:%d" % listening.getsockname()[1], flush=True)
client, board = listening.accept()[0], socket.create_connection(("127.0.0.1", port))
def pass_on(source, target, wait):
    while part := source.recv(chunk):
        time.sleep(wait)
        target.sendall(part)
threading.Thread(target=pass_on, args=(board, client, 0), daemon=True).start()
pass_on(client, board, seconds)
"""


def test_a_slow_line_is_no_timeout(own_native: Running, tmp_path: Path) -> None:
    """Two seconds of transfer with half a second allowed for silence."""
    value = np.zeros(1 << 23, np.int8)
    slow = running(tmp_path / "line", sys.executable, "-c", SLOW_LINE, own_native.port, 1 << 17,
                   0.032)  # fmt: skip
    with slow as line, connect(line.address, KEY, timeout=0.5) as session:
        start = time.monotonic()
        kept = session.tensor(value)
        assert time.monotonic() - start > 1.5
        assert np.array_equal(session.fetch(kept), value)


def test_a_kernel_that_never_ends(server: Running, toy: Path) -> None:
    """The request ends in time; a server that was told so ends the session, too."""
    with connect(server.address, KEY, session_timeout=2) as session:
        artifact = RemoteArtifact(toy, session)
        artifact.set_input("main", np.zeros((2, *artifact.input_shape), np.float32))
        with within(3), pytest.raises(BoardTimeout, match=r"timing .* no answer within 0.7 s"):
            session.time(artifact._vm.module, "invoke_stateful", ["main"], FOREVER, timeout=0.7)
        with within(1), pytest.raises(BoardGone, match="the session is closed"):
            artifact.verify()
    with connect(server.address, KEY, session_timeout=2) as session:
        artifact = RemoteArtifact(toy, session)
        artifact.set_input("main", np.zeros((2, *artifact.input_shape), np.float32))
        with within(8), pytest.raises(BoardTimeout, match="the session took more than its time"):
            session.time(artifact._vm.module, "invoke_stateful", ["main"], FOREVER)
    connect(server.address, KEY).close()  # it serves the next


def test_a_board_that_stops(own_native: Running, toy: Path) -> None:
    """Neither a request nor the end of an object that lives there waits for ever."""
    session = connect(own_native.address, KEY, timeout=1)
    artifact = RemoteArtifact(toy, session)
    kept = session.tensor(np.zeros(9))
    own_native.signal(signal.SIGSTOP)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.05):
            ticks.append(time.monotonic())

    threading.Thread(target=tick, daemon=True).start()
    with within(4):
        del kept
        gc.collect()
    with within(4), pytest.raises((BoardTimeout, BoardGone)):
        artifact.verify()
    with within(4):
        del artifact
        session.close()
        gc.collect()
    done.set()
    assert ticks


def test_a_board_that_stops_in_a_request(own_native: Running, toy: Path) -> None:
    with connect(own_native.address, KEY, timeout=1) as session:
        artifact = RemoteArtifact(toy, session)
        own_native.signal(signal.SIGSTOP)
        with within(4), pytest.raises(BoardTimeout, match="no answer within 1 s"):
            artifact.verify()


def test_a_board_that_vanishes(own_native: Running, toy: Path) -> None:
    with connect(own_native.address, KEY) as session:
        artifact = RemoteArtifact(toy, session)
        own_native.signal(signal.SIGKILL)
        with within(3), pytest.raises(BoardGone, match="the connection is lost"):
            artifact.verify()
        with pytest.raises(BoardGone, match="the session is closed"):
            artifact.verify()


def test_a_board_that_vanishes_while_it_runs(own_server: Running, toy: Path) -> None:
    with connect(own_server.address, KEY) as session:
        artifact = RemoteArtifact(toy, session)
        artifact.set_input("main", np.zeros((2, *artifact.input_shape), np.float32))
        threading.Timer(0.5, own_server.signal, [signal.SIGKILL]).start()
        with within(5), pytest.raises(BoardGone, match="timing invoke_stateful: the connection is"):
            session.time(artifact._vm.module, "invoke_stateful", ["main"], FOREVER)


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGKILL"])
def test_our_server_says_what_ended_a_session(own_native: Running, toy: Path, name: str) -> None:
    """And serves the next client; the first one's files are removed."""
    with connect(own_native.address, KEY) as session:
        artifact = RemoteArtifact(toy, session)
        artifact.set_input("main", np.zeros((2, *artifact.input_shape), np.float32))
        (child,) = own_native.children()
        number = signal.Signals[name]
        threading.Timer(0.5, os.kill, [child, number]).start()
        words = signal.strsignal(number) or ""
        with pytest.raises(BoardGone, match=f"server's process was ended by {words}"):
            session.time(artifact._vm.module, "invoke_stateful", ["main"], FOREVER)
    wait_for("was ended by", own_native.log)
    with connect(own_native.address, KEY) as session:
        assert RemoteArtifact(toy, session).verify()["equal"]
        assert len(list(own_native.folder.glob("vitq-rpc-*"))) == 1
    wait_for("left", own_native.log)
    assert not list(own_native.folder.glob("vitq-rpc-*"))


def test_names_stay_in_the_folder_of_the_session(native: Running) -> None:
    """No file of the board is read, written or removed by way of an upload's name."""
    kept = native.folder / "kept.txt"
    kept.write_text("kept")
    with connect(native.address, KEY) as session:
        for name in ("../kept.txt", str(kept), "a/../../kept.txt", ".."):
            for what, *more in (("upload", b"x"), ("download",), ("remove",), ("load_module",)):
                with pytest.raises(RemoteError, match="must stay in the session's folder"):
                    session.call(f"tvm.rpc.server.{what}", name, *more)
        session.call("tvm.rpc.server.upload", "./own.txt", b"own")
        assert bytes(session.call("tvm.rpc.server.download", "own.txt")) == b"own"
    assert kept.read_text() == "kept"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_server_that_ends(own_native: Running, toy: Path, name: str) -> None:
    """Its session ends with it; if it is asked to end it leaves nothing behind, and says so."""
    number = signal.Signals[name]
    words = "server's process was told to end" if name == "SIGTERM" else "the connection is lost"
    with connect(own_native.address, KEY) as session:
        artifact = RemoteArtifact(toy, session)
        artifact.set_input("main", np.zeros((2, *artifact.input_shape), np.float32))
        (child,) = own_native.children()
        threading.Timer(0.3, own_native.process.send_signal, [number]).start()
        with within(5), pytest.raises(BoardGone, match=words):
            session.time(artifact._vm.module, "invoke_stateful", ["main"], FOREVER)
    assert own_native.process.wait(5) == (0 if name == "SIGTERM" else -number)
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
    if name == "SIGTERM":
        assert not list(own_native.folder.glob("vitq-rpc-*"))


def test_many_boards_from_threads(program: Path, toy: Path, tmp_path: Path) -> None:
    """Of three boards at once one stops: the others' threads are not disturbed."""
    found: dict[int, object] = {}

    def work(i: int, server: Running) -> None:
        try:
            with connect(server.address, KEY, timeout=2) as session:
                artifact = RemoteArtifact(toy, session)
                if i == 0:
                    server.signal(signal.SIGSTOP)
                found[i] = [artifact.verify()["equal"] for _ in range(20)]
        except VitqError as why:
            found[i] = why

    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(native_server(program, tmp_path / str(i), KEY))
                   for i in range(3)]  # fmt: skip
        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(servers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert isinstance(found[0], BoardTimeout)
    assert found[1] == found[2] == [True] * 20
