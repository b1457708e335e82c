"""``tvm-vitq eval``: accuracy of an artefact, paired with the float model on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .common import DebugOption, JsonOption, ThreadsOption, emit, fail_check, progress_bar, verb

__all__ = ["command"]


def command(
    artifact: Annotated[Path, typer.Argument(help="The artefact.", show_default=False)],
    images: Annotated[Path, typer.Option("--images", help="Folder of images.")],
    labels: Annotated[
        Path | None, typer.Option("--labels", help="CSV 'image,label'. [images/labels.csv]")
    ] = None,
    against_float: Annotated[
        Path | None,
        typer.Option("--against-float", help="The float model's checkpoint, .onnx or .pt2."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use the first N images only.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Fail if top-1 falls by more points.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option("--min-agreement", help="Fail if fewer percent agree.")
    ] = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure ARTIFACT's accuracy on labelled images, and the float model's beside it."""
    with verb(debug):
        import tvm_vitq
        from tvm_vitq.evaluate import evaluate, float_model, read_labels

        if against_float is None and (max_drop is not None or min_agreement is not None):
            raise tvm_vitq.VitqError("--max-drop and --min-agreement need --against-float")
        loaded = tvm_vitq.load(artifact, threads)
        pairs = read_labels(images, labels, int(loaded.metadata["output"]["shape"][-1]))[:limit]
        if max_drop is not None and any(label is None for _, label in pairs):
            raise tvm_vitq.VitqError("--max-drop needs --labels with a label for every image")
        against = None if against_float is None else float_model(loaded, against_float)
        with progress_bar(len(pairs), "evaluate") as (advance, _):
            found = evaluate(loaded, pairs, against, advance)
    drop = (
        None
        if found["top1"] is None or found["float_top1"] is None
        else round(found["float_top1"] - found["top1"], 4)
    )
    document: dict[str, Any] = {"artifact": str(artifact), **found, "drop": drop}

    def show(console: Console) -> None:
        def percent(value: float | None) -> str:
            return "-" if value is None else f"{value:.2f} %"

        table = Table(title=f"{artifact}, {found['n']} images", title_justify="left")
        for heading in ("", "integer", "float"):
            table.add_column(heading, justify="right" if heading else "left")
        for k in ("top1", "top5"):
            table.add_row(f"top-{k[3]}", percent(found[k]), percent(found[f"float_{k}"]))
        console.print(table)
        if found["agreement"] is not None:
            console.print(
                f"same prediction on {percent(found['agreement'])}; {found['changed']} changed"
                + ("" if drop is None else f" ({found['lost']} lost, {found['won']} won)")
            )

    emit(document, json, show)
    fail_check(
        (max_drop is not None and drop is not None and drop > max_drop)
        or (min_agreement is not None and found["agreement"] < min_agreement)
    )
