"""Options of the verbs that can run an artefact on another machine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated

import typer

from relay_passes.errors import VitqError

if TYPE_CHECKING:
    from tvm_vitq.remote import Session

__all__ = ["KeyOption", "RpcOption", "TimeoutOption", "TrackerOption", "asked", "board"]

RpcOption = Annotated[
    str | None,
    typer.Option("--rpc", metavar="HOST:PORT", help="Run on the board of this TVM RPC server."),
]
TrackerOption = Annotated[
    str | None,
    typer.Option("--tracker", metavar="HOST:PORT",
                 help="Run on a free board of this TVM RPC tracker."),
]  # fmt: skip
KeyOption = Annotated[
    str | None,
    typer.Option("--key", help="The server's key; with --tracker, that of the wanted boards."),
]
TimeoutOption = Annotated[
    float,
    typer.Option("--timeout", min=0.1,
                 help="Seconds that the board may be silent before it is given up."),
]  # fmt: skip


def asked(rpc: str | None, tracker: str | None, key: str | None) -> bool:
    """Return whether the verb is to run on a board.

    Raises
    ------
    VitqError
        If the options do not go together.
    """
    if rpc is not None and tracker is not None:
        raise VitqError("--rpc is one server and --tracker knows many: give one of them")
    if tracker is not None and not key:
        raise VitqError("--tracker wants the --key of the boards that will do")
    if key is not None and rpc is None and tracker is None:
        raise VitqError("--key goes with --rpc HOST:PORT or --tracker HOST:PORT")
    return rpc is not None or tracker is not None


def board(
    rpc: str | None, tracker: str | None, key: str | None, timeout: float
) -> AbstractContextManager[Session]:
    """Open the session that the options ask for, which :func:`asked` has approved."""
    from tvm_vitq.remote import connect, connect_tracker

    if tracker is not None:
        assert key is not None
        return connect_tracker(tracker, key, timeout)
    assert rpc is not None
    return connect(rpc, key or "", timeout)
