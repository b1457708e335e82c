"""``tvm-vitq run``: classify images with an artefact, preprocessed as it says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .common import DebugOption, JsonOption, ThreadsOption, emit, verb

__all__ = ["command"]


def command(
    artifact: Annotated[Path, typer.Argument(help="The artefact.", show_default=False)],
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to show per image.")] = 5,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Classify IMAGES with ARTIFACT."""
    with verb(debug):
        import tvm_vitq
        from tvm_vitq.evaluate import best_classes, model_input

        loaded = tvm_vitq.load(artifact, threads)
        x, _ = model_input(loaded, images)
        loaded.run(x[:1])  # the first call pages the library in
        start = time.perf_counter()
        logits = loaded.run(x)
        seconds = time.perf_counter() - start
        document: dict[str, Any] = {
            "artifact": str(artifact),
            "milliseconds_per_image": round(1e3 * seconds / len(images), 3),
            "images": [
                {"image": str(path), "top": best_classes(row, top, loaded.labels)}
                for path, row in zip(images, logits, strict=True)
            ],
        }

    def show(console: Console) -> None:
        for entry in document["images"]:
            table = Table(title=entry["image"], title_justify="left")
            for heading in ("class", "label", "logit", "probability"):
                table.add_column(heading, justify="left" if heading == "label" else "right")
            for row in entry["top"]:
                table.add_row(
                    str(row["class"]),
                    row["label"] or "",
                    f"{row['logit']:.3f}",
                    f"{100 * row['probability']:.2f} %",
                )
            console.print(table)
        console.print(f"{document['milliseconds_per_image']} ms per image")

    emit(document, json, show)
