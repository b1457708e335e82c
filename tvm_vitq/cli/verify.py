"""``tvm-vitq verify``: replay the golden vectors stored in an artefact, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from relay_passes.errors import VitqError

from .board import KeyOption, RpcOption, TimeoutOption, TrackerOption, asked, board
from .common import DebugOption, JsonOption, ThreadsOption, emit, fail_check, verb

__all__ = ["command"]


def command(
    artifact: Annotated[Path, typer.Argument(help="The artefact.", show_default=False)],
    emulator: Annotated[
        str | None,
        typer.Option("--with", help="Emulator for another machine's artefact: qemu-aarch64, ...; "
                     "emulator for a GPU's."),
    ] = None,
    rpc: RpcOption = None,
    tracker: TrackerOption = None,
    key: KeyOption = None,
    timeout: TimeoutOption = 60,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Replay the golden vectors stored in ARTIFACT: equal or not, bit for bit."""
    with verb(debug):
        if asked(rpc, tracker, key):
            from tvm_vitq.remote.artifact import RemoteArtifact

            if emulator is not None:
                raise VitqError("--with replays here and --rpc on a board: give one of them")
            with board(rpc, tracker, key, timeout) as session:
                found = RemoteArtifact(artifact, session, threads).verify()
        elif emulator is not None:
            from tvm_vitq.artifact.emulate import emulated_verify

            found = emulated_verify(artifact, emulator)
        else:
            import tvm_vitq

            found = tvm_vitq.load(artifact, threads).verify()

    def show(console: Console) -> None:
        words = "equal" if found["equal"] else "NOT equal"
        place = f" on {found['server']}" if "server" in found else ""
        console.print(
            f"{artifact}: {words}{place}: {found['vectors']} golden vectors, "
            f"{found['logits_compared']} logits compared, {found['logits_different']} different"
        )
        if "not_shown" in found:
            console.print(f"not shown: {found['not_shown']}; verify without --with where one is")

    emit(found, json, show)
    fail_check(not found["equal"])
