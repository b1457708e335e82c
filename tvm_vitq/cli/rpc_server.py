"""``tvm-vitq rpc-server``: what a board takes to be used by ``--rpc``, without Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import DebugOption, JsonOption, emit, verb

__all__ = ["command"]


def command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to make.", show_default=False)
    ],
    architecture: Annotated[
        str | None,
        typer.Option("--arch", help="aarch64 or x86_64. [this machine's]", show_default=False),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Put a server of TVM's RPC and TVM's runtime in one folder, to copy to a board."""
    with verb(debug):
        from tvm_vitq.remote.server import PROGRAM, package_server

        document = package_server(output, architecture)

    def show(console: Console) -> None:
        console.print(
            f"{output}, for {document['architecture']}: {document['bytes']:,} bytes; copy it to "
            f"the board and start {PROGRAM} --host 0.0.0.0 --port 9090 --key KEY there",
            markup=False,
        )

    emit(document, json, show)
