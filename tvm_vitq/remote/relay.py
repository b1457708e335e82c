"""The process between TVM's client and a board: ``python relay.py``, driven by ``link.py``.

TVM's client connects, shakes hands and waits for replies inside C++ without any time-out, and when
Python drops an object of the board it waits so while it holds the interpreter's lock: a board that
hangs would stop every thread of the client's process. So the client is connected to this process,
which has the time-outs. It passes bytes on, and when the board owes a reply or the rest of one, and
nothing has passed for the limit, nor left the system's queue for a slow line, it closes both
connections; the client's call then fails.

It reads one JSON document a line: first ``host, port, key, timeout, limit``, then ``{"limit": s}``
or ``{"ask": true}``; at the end of its input it ends. It answers the first with ``port`` and
``token`` (the key that one client on 127.0.0.1 must say) or ``error``, and an ``ask`` with ``late``
(whether the limit passed) and ``gone`` (whether the board closed the connection).

The handshake (``tvm/rpc/base.py``): the client sends a magic number and its key as a length and
``client:KEY``, the server answers with a code and its own key. Numbers are 32-bit, little-endian.
What follows are packets: 64 bits that say the length of the rest.

Only the standard library is imported, so that it starts in an instant.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import socket
import struct
import sys
import termios
import threading
import time
from typing import Any

__all__ = ["Refused", "main", "open_socket", "receive"]

MAGIC = 0xFF271
_DUPLICATE, _MISMATCH = MAGIC + 1, MAGIC + 2
_NUMBER = struct.Struct("<i")
_CHUNK = 1 << 16
_LONGEST_KEY = 4096
_POLL = 0.1


class Refused(Exception):
    """No connection; one line says why."""


def open_socket(host: str, port: int, timeout: float, what: str) -> socket.socket:
    """Connect within ``timeout`` seconds; ``what`` names the other end in errors.

    Raises
    ------
    Refused
        If it refuses, does not answer, or is unknown.
    """
    where = f"{host}:{port}"
    try:
        made = socket.create_connection((host, port), timeout)
    except ConnectionRefusedError:
        raise Refused(f"{where} refuses the connection: no {what} listens there") from None
    except TimeoutError:
        raise Refused(f"{where} does not answer within {timeout:g} s") from None
    except socket.gaierror as why:
        raise Refused(f"cannot find the host {host}: {why.strerror}") from None
    except OSError as why:
        raise Refused(f"cannot reach {where}: {why.strerror or why}") from None
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def receive(source: socket.socket, size: int) -> bytes:
    """Receive exactly ``size`` bytes.

    Raises
    ------
    ConnectionError
        If the other end closes the connection before.
    """
    parts = []
    while size > 0:
        part = source.recv(min(size, _CHUNK))
        if not part:
            raise ConnectionError("closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def shake_hands(board: socket.socket, where: str, key: str, timeout: float) -> bytes:
    """Introduce a client to a server; return the server's key."""
    text = f"client:{key}".encode()
    shown = key.split(" ")[0].partition(":")[0]  # without options, and a tracker's random number
    try:
        board.sendall(_NUMBER.pack(MAGIC) + _NUMBER.pack(len(text)) + text)
        (code,) = _NUMBER.unpack(receive(board, _NUMBER.size))
        if code == _MISMATCH:
            has = f"has another key than {shown!r}" if shown else "has a key"
            raise Refused(f"{where} {has}; give it with --key")
        if code == _DUPLICATE:
            raise Refused(f"{where} already serves a client with the key {shown!r}")
        size = _NUMBER.unpack(receive(board, _NUMBER.size))[0] if code == MAGIC else -1
        if not 0 <= size <= _LONGEST_KEY:
            raise Refused(f"{where} is no server of TVM's RPC")
        return receive(board, size)
    except TimeoutError:
        raise Refused(
            f"{where} accepts the connection and does not answer within {timeout:g} s: it serves "
            "another client, hangs, or is no server of TVM's RPC"
        ) from None
    except OSError:
        raise Refused(
            f"{where} closes the connection: it is no server of TVM's RPC (for a tracker say "
            "--tracker)"
        ) from None


class Packets:
    """Follows a stream of packets, to know whether the last one is whole."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0

    def take(self, part: bytes) -> None:
        """Go on by some bytes."""
        while part:
            if self._left:
                passed = min(self._left, len(part))
                self._left -= passed
            else:
                passed = min(8 - len(self._head), len(part))
                self._head += part[:passed]
                if len(self._head) == 8:
                    self._left, self._head = int.from_bytes(self._head, "little"), b""
            part = part[passed:]

    @property
    def whole(self) -> bool:
        """Whether the last packet that was begun has ended."""
        return not self._left and not self._head


class Relay:
    """The board's connection and the client's."""

    def __init__(self, host: str, port: int, key: str, timeout: float, limit: float) -> None:
        self.limit = limit
        self.late = self.gone = False
        self.token = secrets.token_hex(16)
        # When something was last passed on to the board, came from it, and moved either way.
        self._asked = self._answered = self._moved = time.monotonic()
        self._reply = Packets()
        self._waits_for_client = False
        self._timeout = timeout
        self._client: socket.socket | None = None
        self._board = open_socket(host, port, timeout, "RPC server")
        self._name = shake_hands(self._board, f"{host}:{port}", key, timeout)
        self._board.settimeout(None)
        self._board.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        self.port = int(self._listener.getsockname()[1])
        for work in (self._serve, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def _accept(self) -> socket.socket:
        """Wait for the one client that knows the token, and answer its handshake."""
        self._listener.settimeout(self._timeout)
        wanted = f"client:{self.token}".encode()
        while True:
            client, _ = self._listener.accept()
            with contextlib.suppress(OSError):
                client.settimeout(self._timeout)
                _, size = struct.unpack("<ii", receive(client, 8))
                if size == len(wanted) and receive(client, size) == wanted:
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    client.sendall(_NUMBER.pack(MAGIC) + _NUMBER.pack(len(self._name)) + self._name)
                    client.settimeout(None)
                    return client
            client.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            self._client = self._accept()
            back = threading.Thread(target=self._from_board, args=(self._client,), daemon=True)
            back.start()
            while part := self._client.recv(_CHUNK):
                # Set before the board can answer.
                self._asked = time.monotonic()
                self._board.sendall(part)
                self._moved = time.monotonic()
            # A client that goes says so to the board, which then ends its side.
            self._board.shutdown(socket.SHUT_WR)
            back.join(self._timeout)
        self.close()

    def _from_board(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := self._board.recv(_CHUNK):
                # Set before the client can ask anew.
                self._waits_for_client = True
                self._reply.take(part)
                self._answered = time.monotonic()
                client.sendall(part)
                self._moved = time.monotonic()
                self._waits_for_client = False
        self.gone = not self.late
        self.close()

    def _unsent(self) -> int:
        """Return how many bytes wait in the system for the line to the board."""
        left = bytearray(4)
        with contextlib.suppress(OSError, ValueError):
            fcntl.ioctl(self._board, termios.TIOCOUTQ, left)
        return int.from_bytes(left, sys.byteorder)

    def _watch(self) -> None:
        unsent = 0
        while not self.gone:
            time.sleep(min(_POLL, self.limit / 4))
            before, unsent = unsent, self._unsent()
            if unsent != before or self._waits_for_client:
                self._moved = time.monotonic()
            owed = self._asked > self._answered or not self._reply.whole
            silent = time.monotonic() - max(self._asked, self._answered, self._moved)
            if owed and silent > self.limit:
                self.late = True
                self.close()
                return

    def close(self) -> None:
        """Close every connection; whatever waits for one fails at once."""
        for end in (self._board, self._client, self._listener):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def main() -> int:
    """Serve one session; see the module."""

    def say(**document: Any) -> None:
        print(json.dumps(document), flush=True)

    try:
        relay = Relay(**json.loads(sys.stdin.readline()))
    except Refused as why:
        say(error=str(why))
        return 1
    say(port=relay.port, token=relay.token)
    for line in sys.stdin:
        request = json.loads(line)
        relay.limit = request.get("limit", relay.limit)
        if "ask" in request:
            say(late=relay.late, gone=relay.gone)
    relay.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
