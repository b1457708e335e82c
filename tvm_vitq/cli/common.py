"""What every verb shares: one-line errors, JSON alone on standard output, progress bars."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from relay_passes.errors import VitqError

__all__ = [
    "DebugOption",
    "JsonOption",
    "OneLineGroup",
    "ThreadsOption",
    "counted",
    "emit",
    "fail_check",
    "progress_bar",
    "verb",
]

JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of the compiled kernels.")
]


def _complain(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)


def _listed(context: Any) -> str:
    """Return what the help of a usage error's command lists."""
    return "its options" if context is not None and context.parent else "verbs and options"


class OneLineGroup(typer.core.TyperGroup):
    """A command group whose usage errors are one line on standard error, exit status 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; see ``typer``."""
        try:
            status = super().main(
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )
        except typer.Abort:
            status = 130
        except Exception as why:
            if type(why).__name__ == "NoArgsIsHelpError":  # typer's copy of click has no such name
                print(str(why))
                sys.exit(0 if standalone_mode else 2)
            message = getattr(why, "format_message", None)
            if message is None or not standalone_mode:
                raise
            context = getattr(why, "ctx", None)
            path = "tvm-vitq" if context is None else context.command_path
            _complain(f"{message()} ('{path} --help' lists {_listed(context)})")
            status = 2
        if standalone_mode:
            sys.exit(status if isinstance(status, int) else 0)
        return status


@contextmanager
def verb(debug: bool) -> Iterator[None]:
    """Run a verb: what it prints by the way goes to standard error, its errors become one line."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except VitqError as why:
        if debug:
            traceback.print_exc()
        _complain(str(why))
        raise typer.Exit(2) from None
    except OSError as why:
        if debug:
            traceback.print_exc()
        _complain(f"{why.filename}: {why.strerror}" if why.filename and why.strerror else str(why))
        raise typer.Exit(2) from None
    except Exception as why:
        if isinstance(why, typer.Exit):
            raise
        if debug:
            traceback.print_exc()
        # Errors of passes cross TVM's FFI and may come back as another class with the same text.
        lines = [line for line in str(why).splitlines() if line.strip()] or ["no message"]
        hint = "" if debug else " (--debug shows where)"
        _complain(f"{type(why).__name__}: {lines[-1][:300]}{hint}")
        raise typer.Exit(2) from None


def counted(number: int, word: str) -> str:
    """Return ``"1 trial"``, ``"2 trials"``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def emit(document: dict[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    """Print ``document`` as JSON, or call ``show`` with a console on standard output."""
    if as_json:
        print(json.dumps(document, ensure_ascii=False, default=str))
    else:
        show(Console(highlight=False, soft_wrap=not sys.stdout.isatty()))


def fail_check(failed: bool) -> None:
    """End with status 1 if a check failed."""
    if failed:
        raise typer.Exit(1)


@contextmanager
def progress_bar(
    total: int, text: str = ""
) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """Yield ``advance(n)`` and ``say(text)``: a bar on standard error if that is a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(text, total=total)
        yield (
            lambda n: bar.advance(task, n),
            lambda words: bar.update(task, description=words),
        )
