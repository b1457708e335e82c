"""A session with a board: files, functions and timings there, each request within its time.

    with connect("192.168.0.7:9090", key="pi") as board:
        module = board.load("deit_tiny.so")
        seconds = board.time(module, "kernel", [board.tensor(x), board.tensor(y)], repeat=10)

A time-out is of silence: seconds in which a request is under way and no byte passes, so that a
large file on a slow line is no time-out and a kernel that hangs is one. After a time-out or a lost
connection the session is closed: every later request fails at once.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from relay_passes.errors import VitqError
from tvm_vitq.artifact.threads import check_threads

from .errors import BoardGone, BoardTimeout, RemoteError, Unreachable
from .link import Link, parse_address
from .tracker import request_board

__all__ = ["Board", "Session", "connect", "connect_tracker"]

_Value = TypeVar("_Value")
_BIG_CORES = 1
_ENDED = "the server's process"  # how vitq_rpc_server begins to say that it crashed
# What TVM says before the loader's own words: the path there, twice.
_NOT_LOADED = re.compile(r"^Check failed: .* Failed to load dynamic shared library \S+ \S+: ")
# LLVM's names that Linux spells otherwise; the rest differ in dots and dashes only.
_LINUX_NAMES = {"dotprod": "asimddp"}


@dataclass(frozen=True)
class Board:
    """What a server says of its machine.

    Parameters
    ----------
    architecture
        As in ``elf.MACHINES``; None if it does not say.
    features
        Of its processor, as Linux names them without ``_``; None if it does not say.
    cores
        Number of them; None if it does not say.
    """

    architecture: str | None
    features: frozenset[str] | None
    cores: int | None

    def missing(self, needed: Sequence[str]) -> list[str]:
        """Return the features that it is known to lack."""
        if not self.features:
            return []
        return [name for name in needed if re.sub("[-._]", "", name) not in self.features]


class Session:
    """An open session; use it as a context manager, from one thread at a time.

    Parameters
    ----------
    link
        The connection.
    timeout
        Seconds of silence that a request may last, unless it says otherwise.

    Attributes
    ----------
    where : str
        ``HOST:PORT`` of the server.
    device
        Its CPU, for tensors and virtual machines.
    board : Board
        What it is.
    """

    def __init__(self, link: Link, timeout: float) -> None:
        from tvm import rpc

        self.where = link.where
        self._link = link
        self._timeout = timeout
        self._closed = False
        self._files: set[str] = set()
        with self.request("opening the session"):
            self._session = rpc.connect("127.0.0.1", link.port, link.token)
            self.device = self._session.cpu()
        try:
            self.board = self._describe()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was uploaded and end the session; nothing is raised."""
        if self._closed:
            return
        for name in list(self._files):
            try:
                self._remove(name)
            except VitqError:
                break
        self._closed = True
        self._link.close()

    # -- requests --------------------------------------------------------------------------------
    @contextmanager
    def request(self, what: str, timeout: float | None = None) -> Iterator[None]:
        """Bound the time of what is done inside, and turn its errors into ours.

        Parameters
        ----------
        what
            For errors, as "running main".
        timeout
            Seconds of silence; None takes the session's.

        Raises
        ------
        BoardTimeout, BoardGone
            If the board does not answer in time, or is gone; the session is closed.
        RemoteError
            If it answers with an error.
        """
        if self._closed:
            raise BoardGone(f"{self.where}: {what}: the session is closed")
        self._link.limit = self._timeout if timeout is None else timeout
        try:
            yield
        except VitqError:
            raise
        except Exception as why:
            raise self._explain(what, str(why)) from why

    def _explain(self, what: str, said: str) -> RemoteError:
        lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no message"]
        state, limit = self._link.state(), self._link.limit
        kind: type[RemoteError] = RemoteError
        reason = _NOT_LOADED.sub("", lines[-1])[:300]
        if state.get("late"):
            kind = BoardTimeout
            reason = f"no answer within {limit:g} s; it is overloaded or hangs (see --timeout)"
        elif "RPCSessionTimeoutError" in said:
            kind, reason = BoardTimeout, "the session took more than its time"
        elif lines[-1].startswith(_ENDED):
            kind = BoardGone
        elif state.get("gone") or "error" in state:
            kind = BoardGone
            reason = "the connection is lost: the server ended, or the network did"
        if kind is not RemoteError:
            self._closed = True
            self._link.close()
        return kind(f"{self.where}: {what}: {reason}")

    def run(
        self, what: str, function: Callable[[], _Value], timeout: float | None = None
    ) -> _Value:
        """Return what ``function`` does, as one :meth:`request`."""
        with self.request(what, timeout):
            return function()

    def call(self, name: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Call a global function of the board's TVM runtime."""
        with self.request(f"calling {name}", timeout):
            return self._session.get_function(name)(*arguments)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Call a function that the board may lack, or that may fail: None then."""
        with self.request(f"asking {name}"):
            try:
                return self._session.get_function(name)(*arguments)
            except AttributeError:
                return None

    def _describe(self) -> Board:
        own = self._ask("vitq.rpc.describe")
        if own is not None:
            found = json.loads(str(own))
            features = frozenset(found["features"]) or None
            return Board(found["architecture"], features, found["cores"])
        # TVM's own server: what its compiler knows of the machine, if it has one.
        triple = self._ask("target.llvm_get_system_triple")
        features = self._ask("tvm.codegen.llvm.GetHostCPUFeatures")
        text = "" if features is None else str(self._ask("ffi.ReprPrint", features) or "")
        names = {_LINUX_NAMES.get(name, re.sub("[-._]", "", name))
                 for name in re.findall(r'"([^"]+)": [\w.]*\(?True', text)}  # fmt: skip
        architecture = str(triple).partition("-")[0] if triple else None
        return Board(architecture, frozenset(names) or None, None)

    # -- files, tensors, timings -----------------------------------------------------------------
    def load(self, path: str | Path, timeout: float | None = None) -> Any:
        """Upload a library and load it; the file there is removed again.

        Returns
        -------
        tvm.runtime.Module
            The module on the board.
        """
        path = Path(path)
        try:
            data = bytearray(path.read_bytes())
        except OSError as why:
            raise VitqError(f"cannot read {path}: {why.strerror}") from why
        name = f"{uuid.uuid4().hex}{path.suffix}"
        self._files.add(name)
        with self.request(f"uploading {path.name}", timeout):
            self._session.upload(data, name)
        try:
            with self.request(f"loading {path.name}", timeout):
                return self._session.load_module(name)
        finally:
            if not self._closed:
                self._remove(name)  # what is mapped stays

    def _remove(self, name: str) -> None:
        self._files.discard(name)
        with self.request("removing an uploaded file"):
            self._session.remove(name)

    def tensor(self, value: np.ndarray) -> Any:
        """Copy an array to the board."""
        import tvm

        with self.request("copying a tensor to it"):
            return tvm.runtime.tensor(np.ascontiguousarray(value), self.device)

    def fetch(self, tensor: Any) -> np.ndarray:
        """Copy a tensor of the board here."""
        with self.request("copying a tensor from it"):
            return np.asarray(tensor.numpy())

    def set_threads(self, threads: int) -> None:
        """Set how many threads the kernels of this session use.

        Raises
        ------
        VitqError
            If the board has no use for so many.
        """
        check_threads(threads, self.board.cores, f"the board {self.where}")
        self.call("runtime.config_threadpool", _BIG_CORES, threads)

    def time(
        self,
        module: Any,
        function: str,
        arguments: Sequence[Any] = (),
        number: int = 1,
        repeat: int = 1,
        min_repeat_ms: int = 0,
        timeout: float | None = None,
    ) -> np.ndarray:
        """Time a function of a module with the board's own clock.

        Parameters
        ----------
        module, function, arguments
            What is called; tensors are the board's.
        number, repeat, min_repeat_ms
            As TVM's time evaluator: ``repeat`` times the mean of ``number`` calls, or of as many
            more as take ``min_repeat_ms``; before them one call that is not timed.
        timeout
            Seconds that all of it may take; None takes the session's.

        Returns
        -------
        numpy.ndarray
            Seconds ``[repeat]``.
        """
        with self.request(f"timing {function}", timeout):
            measure = module.time_evaluator(
                function, self.device, number=number, repeat=repeat, min_repeat_ms=min_repeat_ms
            )
            return np.array(measure(*arguments).results)


def connect(
    address: str, key: str = "", timeout: float = 60, connect_timeout: float = 10,
    session_timeout: float = 0,
) -> Session:  # fmt: skip
    """Open a session with a server of TVM's RPC.

    Parameters
    ----------
    address
        ``HOST:PORT`` of ``python -m tvm.exec.rpc_server`` or ``vitq_rpc_server``.
    key
        The server's own.
    timeout
        Seconds of silence that a request may last.
    connect_timeout
        Seconds for connecting, and again for the handshake: a server serves one client at a time.
    session_timeout
        Seconds after which the server ends the session, so that a kernel that never ends does not
        keep the board; 0 for none.

    Raises
    ------
    Unreachable
        If there is no such server, it has another key, or does not answer.
    """
    host, port = parse_address(address)
    return _open(host, port, key, timeout, connect_timeout, session_timeout)


def connect_tracker(
    address: str, key: str, timeout: float = 60, connect_timeout: float = 30,
    session_timeout: float = 0, priority: int = 1,
) -> Session:  # fmt: skip
    """Open a session with a free board of a tracker; the rest is as in :func:`connect`.

    Parameters
    ----------
    address
        ``HOST:PORT`` of ``python -m tvm.exec.rpc_tracker``.
    key
        Of the wanted boards.
    connect_timeout
        Seconds to wait for a board; one that does not answer is given up for another.
    priority
        Larger is served sooner.

    Raises
    ------
    Unreachable
        If there is no such tracker, or no free board in time.
    """
    host, port = parse_address(address, "--tracker")
    end = time.monotonic() + connect_timeout
    while True:
        left = max(0.1, end - time.monotonic())
        server, number, match_key = request_board(host, port, key, left, priority)
        try:
            # A third, so that there is time for another board if this one does not answer.
            return _open(server, number, match_key, timeout, min(10.0, left / 3), session_timeout)
        except (Unreachable, BoardGone):
            if time.monotonic() >= end:
                raise


def _open(
    host: str, port: int, key: str, timeout: float, connect_timeout: float, session_timeout: float
) -> Session:
    if re.search(r"\s", key):
        raise Unreachable(f"a key has no spaces, {key!r} has")
    options = f" -timeout={session_timeout:g}" if session_timeout else ""
    link = Link(host, port, key + options, connect_timeout, timeout)
    try:
        return Session(link, timeout)
    except BaseException:
        link.close()
        raise
