"""``tvm-vitq bench``: an artefact and other runtimes side by side, and where its time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from relay_passes.errors import VitqError

from .board import KeyOption, RpcOption, TimeoutOption, TrackerOption, asked, board
from .common import DebugOption, JsonOption, emit, progress_bar, verb

__all__ = ["command", "tables"]


def command(
    artifact: Annotated[Path, typer.Argument(help="The artefact.", show_default=False)],
    peers: Annotated[
        str,
        typer.Option(
            "--peers",
            help="all, none, or of torch-eager, torch-compile, ort-fp32, ort-static, "
            "ort-static-rr, ort-dynamic, openvino-fp32, openvino-nncf.",
        ),
    ] = "all",
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Threads of every runner, pinned to cores.")
    ] = 1,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images per call. [the artefact's]")
    ] = None,
    pairs: Annotated[
        int, typer.Option("--pairs", min=1, help="Timed pairs of ours and each peer.")
    ] = 30,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs before them.")] = 10,
    model: Annotated[
        str | None, typer.Option("--model", help="The peers' float model. [the artefact's]")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Its weights. [the artefact's]")
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Also time every kernel of the artefact.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Bar chart to write (PNG).")] = None,
    rpc: RpcOption = None,
    tracker: TrackerOption = None,
    key: KeyOption = None,
    timeout: TimeoutOption = 60,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure ARTIFACT against other runtimes, interleaved, on the same cores.

    On a board (--rpc, --tracker) it is measured alone: the other runtimes are on this machine.
    """
    with verb(debug):
        if asked(rpc, tracker, key):
            for flag, given in (("--peers", peers not in ("all", "none")), ("--plot", plot),
                                ("--per-layer", per_layer), ("--model", model),
                                ("--checkpoint", checkpoint)):  # fmt: skip
                if given:
                    raise VitqError(f"{flag} is for this machine: on a board only the artefact is "
                                    "timed, as a whole")  # fmt: skip
            from tvm_vitq.remote import bench as remote

            with (
                board(rpc, tracker, key, timeout) as session,
                progress_bar(pairs, session.where) as (advance, _),
            ):
                document = remote.bench(artifact, session, threads, batch, pairs, warmup, advance)
        else:
            from tvm_vitq.artifact.output import check_output
            from tvm_vitq.bench.compare import compare

            if plot is not None:
                check_output(plot)
            with progress_bar(pairs, "start") as (advance, say):
                document = compare(
                    artifact, peers, threads, batch, pairs, warmup, model, checkpoint, per_layer,
                    say, advance,
                )  # fmt: skip
            if plot is not None:
                from tvm_vitq.bench.chart import draw

                document["plot"] = str(draw(document, plot))

    def show(console: Console) -> None:
        for table in [_board_table(document)] if "server" in document else tables(document):
            console.print(table)
        for reason in _reasons(document["layers"]) if per_layer else ():
            console.print(reason, markup=False)
        for left_out in document.get("skipped", ()):
            console.print(f"{left_out['runner']}: {left_out['reason']}", markup=False)
        if "note" in document:
            console.print(document["note"], markup=False)
        if plot is not None:
            console.print(f"written: {plot}")

    emit(document, json, show)


def _board_table(document: dict[str, Any]) -> Table:
    (row,) = document["results"]
    threads = f"{document['threads']} thread" + "s" * (document["threads"] > 1)
    title = f"{document['model']}, batch {document['batch']}, {threads}, on {document['server']}"
    table = Table(title=title, title_justify="left")
    for heading in ("target", "median ms", "10-90 %", "least ms", "runs"):
        table.add_column(heading, justify="left" if heading == "target" else "right", no_wrap=True)
    table.add_row(document["target"], f"{row['median_ms']:.3f}",
                  f"{row['p10_ms']:.2f}-{row['p90_ms']:.2f}", f"{row['min_ms']:.3f}",
                  str(row["runs"]))  # fmt: skip
    return table


def tables(document: dict[str, Any]) -> list[Table]:
    """Lay out what ``compare`` returned: the runners, and with layers operators and matmuls."""
    threads = f"{document['threads']} thread" + "s" * (document["threads"] > 1)
    title = f"{document['model']}, batch {document['batch']}, {threads}, {document['pairs']} pairs"
    runners = Table(title=title, title_justify="left")
    for heading in ("runner", "precision", "median ms", "10-90 %", "× ours", "10-90 % "):
        text = heading in ("runner", "precision")
        runners.add_column(heading, justify="left" if text else "right", no_wrap=True)
    for row in document["results"]:
        own = row["runner"] == "tvm-vitq"
        runners.add_row(
            row["runner"],
            row["precision"],
            f"{row['median_ms']:.3f}",
            f"{row['p10_ms']:.2f}-{row['p90_ms']:.2f}",
            "" if own else f"{row['ratio']:.2f}",
            "" if own else f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}",
            style="bold" if own else None,
        )
    return [runners, *(_layer_tables(document["layers"]) if "layers" in document else [])]


def _layer_tables(layers: dict[str, Any]) -> list[Table]:
    operators = Table(
        title=f"Operators: {layers['total_ms']:.3f} ms in kernels, "
        f"{layers['outside_matmuls']:.1%} outside matmuls",
        title_justify="left",
    )
    for heading in ("operator", "calls", "ms", "share"):
        operators.add_column(heading, justify="left" if heading == "operator" else "right")
    for row in layers["operators"]:
        operators.add_row(
            row["op"].removeprefix("vitq."), str(row["calls"]), f"{row['ms']:.3f}",
            f"{row['share']:.1%}",
        )  # fmt: skip
    peaks = ", ".join(f"{name} {rate:.1f}" for name, rate in layers["peaks"].items())
    title = "Matmuls, GMAC/s" + (f"; what one core can do: {peaks}" if peaks else "")
    matmuls = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("operator", "shape", "n", "ms", "share", "rate", "peak", "sequence"):
        text = heading in ("operator", "shape", "sequence")
        matmuls.add_column(
            heading, justify="left" if text else "right", no_wrap=heading != "sequence",
            overflow="fold",
        )
    for row in layers["kernels"]:
        if not row["macs"]:
            continue
        matmuls.add_row(
            row["op"].removeprefix("vitq."),
            "x".join(str(extent) for extent in row["shape"]),
            str(row["calls"]),
            f"{row['ms']:.3f}",
            f"{row['share']:.1%}",
            "-" if row["gmacs"] is None else f"{row['gmacs']:.1f}",
            "-" if row["of_peak"] is None else f"{row['of_peak']:.1%}",
            " + ".join(_sequence(dot, len(row["dots"]) > 1) for dot in row["dots"]) or "-",
        )
    return [operators, matmuls]


def _sequence(dot: dict[str, Any], partial: bool = False) -> str:
    chain = f" x{dot['chain']}" if dot.get("chain", 1) > 1 else ""
    return dot["dot"] + chain + (f" ({dot['columns']} columns)" if partial else "")


def _reasons(layers: dict[str, Any]) -> list[str]:
    """Say how the weight matmuls fare, and once for each sequence why it was chosen."""
    dots = [dot for row in layers["kernels"] for dot in row["dots"] if dot.get("why")]
    lines = list(dict.fromkeys(f"{_sequence(dot)}: {dot['why']}" for dot in dots))
    weights = layers["weights"]
    if weights["of_peak"] is not None:
        work = ", ".join(f"{share:.1%} {name}" for name, share in weights["work"].items())
        lines.insert(0, f"weight matmuls: {weights['of_peak']:.1%} of peak; work: {work}")
    return lines
