"""``tvm-vitq records``: merge, list and prune what tuning measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .common import DebugOption, JsonOption, OneLineGroup, counted, emit, verb

__all__ = ["app"]

app = typer.Typer(cls=OneLineGroup, help="Merge, list and prune records of tuning.",
                  no_args_is_help=True, rich_markup_mode=None)  # fmt: skip

_Folder = Annotated[Path, typer.Argument(help="Folder of records.", show_default=False)]


def _say_refused(console: Console, document: dict[str, Any]) -> None:
    for reason in document["refused"]:
        console.print(f"refused: {reason}", markup=False)


@app.command("merge")
def merge(
    into: Annotated[Path, typer.Argument(help="Folder to add to.", show_default=False)],
    sources: Annotated[
        list[Path], typer.Argument(help="Folders of records, or files.", show_default=False)
    ],
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Add the records of SOURCES to those of INTO."""
    with verb(debug):
        from tvm_vitq.records import merge as merge_records

        document = merge_records(sources, into)

    def show(console: Console) -> None:
        total = ", ".join(f"{count} for {isa}" for isa, count in document["records"].items())
        console.print(f"{into}: {total or 'no records'}; {document['added']} are new")
        _say_refused(console, document)

    emit(document, json, show)


@app.command("list")
def list_(folder: _Folder, json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the best schedule of each task."""
    with verb(debug):
        from tvm_vitq.records import list_records

        document = list_records(folder)

    def show(console: Console) -> None:
        for row in document["best"]:
            threads = f", {row['threads']} threads" if row["threads"] > 1 else ""
            share = "" if row["share"] is None else f", {row['share']:.1%} of peak"
            console.print(f"{row['task']}, {row['isa']}{threads}", markup=False)
            console.print(f"    {row['seconds'] * 1e6:.1f} µs, × {1 / row['ratio']:.3f} as fast as "
                          f"by default{share}, {counted(row['trials'], 'trial')}, {row['host']}, "
                          f"{row['when'][:10]}", markup=False)  # fmt: skip
            point = ", ".join(f"{name} {value}" for name, value in row["point"].items())
            console.print(f"    {point}", markup=False, style="dim")
        _say_refused(console, document)

    emit(document, json, show)


@app.command("prune")
def prune(folder: _Folder, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Keep only what compile uses: the latest best of each task. Tune forgets what it has tried."""
    with verb(debug):
        from tvm_vitq.records import prune as prune_records

        document = prune_records(folder)

    def show(console: Console) -> None:
        kept = counted(document["kept"], "record")
        console.print(f"{folder}: {kept} kept, {document['removed']} removed")
        _say_refused(console, document)

    emit(document, json, show)
