"""A connection to a server of TVM's RPC that can be given up: the process of ``relay.py``."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .errors import Unreachable

__all__ = ["Link", "parse_address"]

_RELAY = Path(__file__).with_name("relay.py")


def parse_address(text: str, flag: str = "--rpc") -> tuple[str, int]:
    """Split ``HOST:PORT``, where HOST may be an IPv6 address in brackets.

    Raises
    ------
    Unreachable
        If it is not of that form; ``flag`` is where the user gave it.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise Unreachable(f"{flag} wants HOST:PORT, as 192.168.0.7:9090, not {text!r}")
    return host, int(port)


class Link:
    """A connection whose hands are shaken.

    Parameters
    ----------
    host, port
        The server's address.
    key
        Its key, with options after spaces (as ``-timeout=60``), as TVM's client sends them.
    timeout
        Seconds for connecting and again for the handshake.
    limit
        Seconds of silence after which the connection is given up.

    Attributes
    ----------
    where : str
        ``HOST:PORT``.
    port, token
        Where on 127.0.0.1 TVM's client connects, and the key that it says there.

    Raises
    ------
    Unreachable
        If no connection is made.
    """

    def __init__(self, host: str, port: int, key: str, timeout: float, limit: float) -> None:
        self.where = f"{host}:{port}"
        self._limit = limit
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_RELAY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            self._say(host=host, port=port, key=key, timeout=timeout, limit=limit)
            reply = self._reply()
            if "error" in reply:
                raise Unreachable(reply["error"])
        except BaseException:
            self.close()
            raise
        self.port: int = reply["port"]
        self.token: str = reply["token"]

    def _say(self, **document: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(document) + "\n")
            self._process.stdin.flush()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = "" if self._process.stdout.closed else self._process.stdout.readline()
        return json.loads(line) if line else {"error": f"{self.where}: the relay has ended"}

    @property
    def limit(self) -> float:
        """Seconds of silence after which the connection is given up."""
        return self._limit

    @limit.setter
    def limit(self, seconds: float) -> None:
        if seconds != self._limit:
            self._limit = seconds
            self._say(limit=seconds)

    def state(self) -> dict[str, Any]:
        """Return ``late``, whether the limit passed, and ``gone``, whether the board closed."""
        self._say(ask=True)
        return self._reply()

    def close(self) -> None:
        """End the relay, and with it the connections."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
