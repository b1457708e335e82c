"""Ask a tracker of TVM's RPC for a board: it knows servers by key and lends each to one client.

Requests and replies are JSON documents, each after its length (``tvm/rpc/base.py``).
"""

from __future__ import annotations

import json
import struct
from typing import Any

from .errors import Unreachable
from .relay import Refused, open_socket, receive

__all__ = ["request_board", "summary"]

MAGIC = 0x2F271
_REQUEST, _SUMMARY, _SUCCESS = 4, 6, 0
_LONGEST_REPLY = 1 << 24


class _Tracker:
    def __init__(self, host: str, port: int, timeout: float) -> None:
        self.where = f"{host}:{port}"
        try:
            self._socket = open_socket(host, port, timeout, "RPC tracker")
        except Refused as why:
            raise Unreachable(str(why)) from None
        try:
            self._socket.sendall(struct.pack("<i", MAGIC))
            (magic,) = struct.unpack("<i", receive(self._socket, 4))
        except OSError:
            magic = 0
        if magic != MAGIC:
            self._socket.close()
            raise Unreachable(
                f"{self.where} is no tracker of TVM's RPC (a server is one for --rpc)"
            )

    def __enter__(self) -> _Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, *words: Any) -> Any:
        """Return the value of a reply, None if it is not the one of a success."""
        text = json.dumps(words).encode()
        try:
            self._socket.sendall(struct.pack("<i", len(text)) + text)
            (size,) = struct.unpack("<i", receive(self._socket, 4))
            if not 0 <= size <= _LONGEST_REPLY:
                raise ConnectionError("no reply of a tracker")
            reply = json.loads(receive(self._socket, size))
        except TimeoutError:
            raise
        except (OSError, ValueError):
            raise Unreachable(f"the tracker {self.where} has closed the connection") from None
        return reply[1] if isinstance(reply, list) and reply[:1] == [_SUCCESS] else None


def request_board(
    host: str, port: int, key: str, timeout: float, priority: int = 1
) -> tuple[str, int, str]:
    """Wait for a free board of a key.

    Parameters
    ----------
    host, port
        The tracker's address.
    key
        Key of the wanted boards.
    timeout
        Seconds to wait for a board that is free.
    priority
        Of this request among those that wait for the key; larger is sooner.

    Returns
    -------
    host, port, key
        The server, and the key that it takes once.

    Raises
    ------
    Unreachable
        If the tracker is not to be had, knows no such board, or none is free in time.
    """
    keys = [name for _, name in summary(host, port, timeout)]
    if key not in keys:
        known = f"it knows {', '.join(sorted(set(keys)))}" if keys else "it knows none at all"
        raise Unreachable(f"the tracker {host}:{port} has no board with the key {key!r}; {known}")
    with _Tracker(host, port, timeout) as tracker:
        try:
            found = tracker.ask(_REQUEST, key, "", priority)
        except TimeoutError:
            found = None
    if found is None:
        raise Unreachable(
            f"the tracker {host}:{port} has no free board with the key {key!r} within "
            f"{timeout:.3g} s: all {keys.count(key)} are in use"
        )
    address, number, match_key = found
    return str(address), int(number), str(match_key)


def summary(host: str, port: int, timeout: float) -> list[tuple[str, str]]:
    """Return address and key of every server that a tracker knows.

    Raises
    ------
    Unreachable
        If the tracker is not to be had.
    """
    with _Tracker(host, port, timeout) as tracker:
        try:
            found = tracker.ask(_SUMMARY) or {}
        except TimeoutError:
            raise Unreachable(f"the tracker {host}:{port} does not answer") from None
    return [
        (":".join(map(str, entry["addr"])), str(entry["key"]).removeprefix("server:"))
        for entry in found.get("server_info", [])
    ]
