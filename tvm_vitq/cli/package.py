"""``tvm-vitq package``: a folder that runs an artefact on a device without Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .common import DebugOption, JsonOption, emit, verb

__all__ = ["command"]


def command(
    artifact: Annotated[Path, typer.Argument(help="The artefact.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to make.", show_default=False)
    ],
    architecture: Annotated[
        str | None,
        typer.Option("--arch", help="aarch64 or x86_64. [the artefact's]", show_default=False),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Put ARTIFACT, a program that classifies images with it and TVM's runtime in one folder."""
    with verb(debug):
        from tvm_vitq.artifact.package import package

        document = package(artifact, output, architecture)

    def show(console: Console) -> None:
        table = Table(title=f"{output}, for {document['architecture']}", title_justify="left")
        table.add_column("file")
        table.add_column("bytes", justify="right")
        for name, size in document["files"].items():
            table.add_row(name, f"{size:,}")
        table.add_row("all", f"{document['bytes']:,}")
        console.print(table)
        needs = document["needs"]
        libraries = [f"{name} {needs[name]}" for name in ("GLIBC", "GLIBCXX") if name in needs]
        features = needs["features"] or ["no more than the architecture has"]
        console.print(f"needs {', '.join(libraries)}; of the processor: {', '.join(features)}")

    emit(document, json, show)
