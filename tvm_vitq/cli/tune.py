"""``tvm-vitq tune``: find faster schedules for a model's kernels, on the machine they are for."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from relay_passes.errors import VitqError

from .board import KeyOption, RpcOption, TimeoutOption, TrackerOption, asked, board
from .common import DebugOption, JsonOption, counted, emit, verb

if TYPE_CHECKING:
    from tvm_vitq.tuning.tune import Tuning

__all__ = ["command", "task_table"]

_TELL = 30.0
"""Seconds between lines of progress where there is no terminal."""


def command(
    model: Annotated[
        str,
        typer.Argument(help="Quantized module, or what compile takes.", show_default=False),
    ],
    records: Annotated[
        Path, typer.Option("--records", help="Folder of the records.", show_default=False)
    ],
    target: Annotated[str, typer.Option("--target", help="As for compile.")] = "native",
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, help="Kernels to measure, besides those that are known."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0.01, help="Time to take. It or --trials must be given."),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the kernels.")] = 1,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Best-so-far curves to write (PNG).")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Weights, if MODEL is not quantized.")
    ] = None,
    calib: Annotated[
        str | None, typer.Option("--calib", help="Calibration images, likewise.")
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Recipe, likewise.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images per call, likewise.")
    ] = None,
    rpc: RpcOption = None,
    tracker: TrackerOption = None,
    key: KeyOption = None,
    boards: Annotated[
        int, typer.Option("--boards", min=1, help="Boards of the tracker to use at once.")
    ] = 1,
    timeout: TimeoutOption = 60,
    transfer: Annotated[
        bool, typer.Option(help="Try first what the records say of similar kernels.")
    ] = True,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time schedules of MODEL's kernels beside the default ones, and record the best.

    Everything measured is on disk at once: stop it with Ctrl-C, start it again to go on.
    """
    with verb(debug):
        remote = asked(rpc, tracker, key)
        if trials is None and minutes is None:
            raise VitqError("say when to stop: --trials N, --minutes M, or both")
        if boards > 1 and tracker is None:
            raise VitqError("--boards goes with --tracker HOST:PORT")
        from tvm_vitq.artifact.output import check_output
        from tvm_vitq.artifact.threads import check_threads
        from tvm_vitq.job import CompileJob
        from tvm_vitq.tuning.job import TuneJob, describe
        from tvm_vitq.tuning.tune import Limits

        if not remote:
            check_threads(threads, os.cpu_count())
        if plot is not None and check_output(plot).suffix.lower() != ".png":
            raise VitqError(f"--plot writes a PNG: name it so, not {plot}")
        source = CompileJob(model, Path("-"), checkpoint, calib, recipe=recipe, batch=batch,
                            target=target)  # fmt: skip

        def open_session() -> Any:
            return board(rpc, tracker, key, timeout)

        limits = Limits(trials, None if minutes is None else 60 * minutes)
        job = TuneJob(source.quantized(), target, records, limits, threads,
                      open_session if remote else None, boards, transfer)  # fmt: skip
        tuning = job.prepare()
        stopped = False
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with _progress(tuning) as tuning.report:
                job.run(tuning)
        except KeyboardInterrupt:
            stopped = True
        document = {"model": model, "target": target, **describe(tuning), "stopped": stopped}
        if plot is not None:
            from tvm_vitq.tuning.plot import draw

            title = f"{Path(model).name}, {target}"
            title += f", after {tuning.known} trials of earlier runs" if tuning.known else ""
            document["plot"] = str(draw(tuning.states, title, plot))

    def show(console: Console) -> None:
        console.print(task_table(tuning))
        known = f", and {document['known']} that were known" if document["known"] else ""
        console.print(f"{counted(document['trials'], 'trial')} in {document['seconds']} s{known}"
                      + (", stopped" if stopped else "")
                      + f"; all kernels together × {document['gain']:.3f} as fast as by default, "
                      f"{sum(task['tuned'] for task in document['tasks'])} of "
                      f"{len(document['tasks'])} measured"
                      f"; {document['records']}")  # fmt: skip
        for note in dict.fromkeys(document["notes"]):
            console.print(note, markup=False)
        for where in document["left_out"]:
            console.print(f"left out after repeated faults: {where}", markup=False)
        if plot is not None:
            console.print(f"written: {plot}")

    emit(document, json, show)
    if stopped:
        raise typer.Exit(130)


def task_table(tuning: Tuning, most: int | None = None) -> Table:
    """Lay the tasks out: what each takes, what was gained, what more may be expected.

    Parameters
    ----------
    tuning
        The run.
    most
        Tasks to show, the longest; None for all.
    """
    left = tuning.left
    title = f"{counted(tuning.trials, 'trial')}, {tuning.elapsed:.0f} s"
    if left is not None:
        title += f", {left:.0f} s left"
    table = Table(title=f"{title}; × {tuning.gain:.3f}", title_justify="left", box=None,
                  padding=(0, 1, 0, 0))  # fmt: skip
    headings = ("task", "calls", "µs", "of all", "of peak", "trials", "× default", "may gain")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "task" else "right",
                         no_wrap=heading != "task", overflow="fold")
    states = sorted(tuning.states, key=lambda s: -s.total)
    whole = sum(s.total for s in states) or 1.0
    for state in states[:most]:
        table.add_row(
            str(state.job.task),
            str(state.job.calls),
            "-" if state.seconds is None else f"{state.seconds * 1e6:.1f}",
            f"{state.total / whole:.1%}",
            "-" if state.share is None else f"{state.share:.1%}",
            f"{state.trials}" + (f" (-{len(state.rejected)})" if state.rejected else ""),
            f"{1 / state.ratio:.3f}" if state.settled else "-",
            "-" if state.done else f"{state.hope / whole:.1%}",
            style="bold" if state.busy else None,
        )
    return table


@contextmanager
def _progress(tuning: Tuning) -> Iterator[Callable[[], None]]:
    """Yield what to call after a trial: it shows a table on standard error, or now and then a line.

    The table is for terminals.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        told = time.monotonic()

        def tell() -> None:
            nonlocal told
            if time.monotonic() - told > _TELL:
                told = time.monotonic()
                trials = counted(tuning.trials, "trial")
                print(f"{tuning.elapsed:.0f} s, {trials}, × {tuning.gain:.3f}", file=sys.stderr,
                      flush=True)  # fmt: skip

        yield tell
        return
    rows = max(5, console.height - 8)
    with Live(
        task_table(tuning, rows), console=console, transient=True, auto_refresh=False
    ) as live:
        last = 0.0

        def report() -> None:
            nonlocal last
            if time.monotonic() - last > 0.5:
                last = time.monotonic()
                live.update(task_table(tuning, rows), refresh=True)

        yield report
