"""The command line ``tvm-vitq``: it only parses; what the verbs do is in the packages beside it.

Exit status: 0 done, 1 the check failed, 2 the input was wrong (one line on standard error).
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from . import bench as _bench
from . import compile as _compile
from . import eval as _eval
from . import inspect as _inspect
from . import package as _package
from . import records as _records
from . import rpc_server as _rpc_server
from . import run as _run
from . import tune as _tune
from . import verify as _verify
from .common import OneLineGroup

__all__ = ["app", "main"]

app = typer.Typer(
    name="tvm-vitq",
    cls=OneLineGroup,
    help="Integer-only Vision Transformers: a trained ViT in, one proved shared library out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"tvm-vitq {version('tvm-vitq')}")
        raise typer.Exit


@app.callback()
def _all(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command("compile")(_compile.command)
app.command("run")(_run.command)
app.command("eval")(_eval.command)
app.command("inspect")(_inspect.command)
app.command("verify")(_verify.command)
app.command("bench")(_bench.command)
app.command("package")(_package.command)
app.command("rpc-server")(_rpc_server.command)
app.command("tune")(_tune.command)
app.add_typer(_records.app, name="records")


def main() -> None:
    """Run the command line with the process's arguments."""
    app(prog_name="tvm-vitq")
