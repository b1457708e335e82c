"""Artefacts and kernels on other machines, through the servers and trackers of TVM's RPC."""

from .errors import BoardGone, BoardTimeout, RemoteError, Unreachable
from .session import Board, Session, connect, connect_tracker

__all__ = [
    "Board",
    "BoardGone",
    "BoardTimeout",
    "RemoteError",
    "Session",
    "Unreachable",
    "connect",
    "connect_tracker",
]
