"""What can go wrong with a board, in kinds that need different answers."""

from __future__ import annotations

from relay_passes.errors import VitqError

__all__ = ["BoardGone", "BoardTimeout", "RemoteError", "Unreachable"]


class RemoteError(VitqError):
    """A request that the board answered with an error, or that it cannot serve; it is still there.

    Its subclasses are the board's own faults: another board, or a new session, may do better.
    """


class Unreachable(RemoteError):
    """No session was opened: refused, unknown host, wrong key, no answer, no RPC server."""


class BoardGone(RemoteError):
    """The server ended, or the network did, in the middle of a session."""


class BoardTimeout(RemoteError):
    """A request was not answered in time; the session is closed."""
