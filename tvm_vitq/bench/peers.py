"""The list of peers: one line each. A new peer is a file beside this one and a line here."""

from __future__ import annotations

import difflib

from relay_passes.errors import VitqError

from . import (
    openvino_fp32,
    openvino_nncf,
    ort_dynamic,
    ort_fp32,
    ort_static,
    torch_compile,
    torch_eager,
)
from .peer import Peer

__all__ = ["PEERS", "choose"]

PEERS = {
    peer.name: peer
    for peer in (
        torch_eager.PEER,
        torch_compile.PEER,
        ort_fp32.PEER,
        ort_static.PEER,
        ort_static.PEER_REDUCED,
        ort_dynamic.PEER,
        openvino_fp32.PEER,
        openvino_nncf.PEER,
    )
}


def choose(names: str) -> tuple[list[Peer], list[dict[str, str]]]:
    """Return the peers to run, and those that are left out with the reason.

    Parameters
    ----------
    names
        ``"all"``, ``"none"``, or names separated by commas.

    Raises
    ------
    VitqError
        If a name is unknown, or a peer asked for by name is not installed.
    """
    if names == "none":
        return [], []
    wanted = list(PEERS) if names == "all" else [n.strip() for n in names.split(",") if n.strip()]
    for name in wanted:
        if name not in PEERS:
            close = difflib.get_close_matches(name, PEERS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise VitqError(
                f"--peers: unknown peer {name!r}{hint} (all, none, or of {', '.join(PEERS)})"
            )
    if not wanted:
        raise VitqError(f"--peers names nothing; give all, none, or of {', '.join(PEERS)}")
    chosen, skipped = [], []
    for peer in (PEERS[name] for name in dict.fromkeys(wanted)):
        missing = peer.missing()
        if not missing:
            chosen.append(peer)
        elif names == "all":
            skipped.append({"runner": peer.name, "reason": "not installed (pip install .[bench])"})
        else:
            raise VitqError(
                f"--peers: {peer.name} needs {', '.join(missing)}, which is not installed: "
                "pip install '.[bench]'"
            )
    return chosen, skipped
