"""torch module or exported program -> Relax, with the parameters' names."""

from __future__ import annotations

import io
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm

from relay_passes.errors import VitqError

from .source import Imported

if TYPE_CHECKING:
    import torch

__all__ = ["export_module", "import_program", "load_pt2", "one_line", "quiet"]


def one_line(error: BaseException, limit: int = 200) -> str:
    """First line of an error's message, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' warnings off the standard streams: what matters becomes one error line."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def export_module(
    model: torch.nn.Module, shape: tuple[int, ...], what: str
) -> torch.export.ExportedProgram:
    """Trace a module with ``torch.export`` for one static input shape.

    Raises
    ------
    VitqError
        If the model cannot be traced, or does not take images of this shape.
    """
    import torch

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(model, (torch.zeros(shape, device=device),))
    except Exception as error:  # torch.export raises whatever the model's code raises
        raise VitqError(
            f"{what} cannot be traced by torch.export for an input of {list(shape)}: "
            f"{one_line(error)}"
        ) from error


def _same_size(node: Any, importer: Any) -> Any:
    """Resizing a position embedding to the size that it has (timm's ``dynamic_img_size``)."""
    x = importer.env[node.args[0]]
    if list(node.meta["val"].shape) != [int(d) for d in x.ty.shape]:
        raise VitqError(
            f"operator {node.target.__name__} resizes a tensor inside the model; build the model "
            "with the img_size that it will be used with"
        )
    return x


_CONVERTERS = {
    f"_upsample_{kind}2d_aa.{overload}": _same_size
    for kind in ("bicubic", "bilinear")
    for overload in ("default", "vec")
}


def import_program(
    program: torch.export.ExportedProgram, what: str
) -> tuple[tvm.IRModule, dict[str, str]]:
    """Convert an exported program to Relax.

    Returns
    -------
    mod : tvm.IRModule
        Parameters are arguments with their values in the attribute ``params``.
    names : dict
        Argument -> parameter name.

    Raises
    ------
    VitqError
        Names the operators that TVM's importer does not know.
    """
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    try:
        with torch.no_grad(), quiet():
            mod = from_exported_program(
                program, keep_params_as_input=True, custom_convert_map=_CONVERTERS
            )
            return mod, names
    except VitqError:
        raise
    except Exception as error:
        missing = (
            re.findall(r"'([\w.]+)'", str(error))
            if "Unsupported function types" in str(error)
            else []
        )
        if missing:
            raise VitqError(
                f"{_unsupported(program, missing)}; see the README for supported models"
            ) from error
        raise VitqError(f"{what} cannot be imported: {one_line(error)}") from error


def _unsupported(program: torch.export.ExportedProgram, missing: list[str]) -> str:
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") in missing:
            stack = node.meta.get("nn_module_stack") or {}
            where = next(
                (path for path, _ in reversed(stack.values()) if path), "the model's top level"
            )
            return f"operator {node.target.__name__} in {where} is not supported"
    return f"operators {', '.join(missing)} are not supported"


def load_pt2(path: Path, batch: int | None) -> Imported:
    """Read a ``.pt2`` file made by ``torch.export.save``.

    Parameters
    ----------
    path : Path
        The file.
    batch : int or None
        Batch to fix a dynamic batch axis to; None keeps a static one, or means 1.

    Raises
    ------
    VitqError
        For a truncated or foreign file, or another static batch than asked for.
    """
    import torch

    if not zipfile.is_zipfile(path):
        raise VitqError(
            f"{path} is not a .pt2 file (or is truncated); write it with torch.export.save"
        )
    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:  # anything from zip, json, pickle and torch
        raise VitqError(
            f"{path} cannot be read as a torch.export program by torch "
            f"{torch.__version__.split('+')[0]}; write it with torch.export.save"
        ) from error
    inputs = [s for s in program.graph_signature.user_inputs]
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    tensors = [placeholders[i].meta["val"] for i in inputs if i in placeholders]
    if len(tensors) != 1 or len(getattr(tensors[0], "shape", ())) != 4:
        shapes = [list(getattr(t, "shape", ())) for t in tensors]
        raise VitqError(
            f"{path} takes inputs of shapes {shapes}; one image tensor [B, C, H, W] is supported"
        )
    shape = fixed_shape(list(tensors[0].shape), batch, str(path))
    if any(not isinstance(d, int) for d in tensors[0].shape):
        program = export_module(program.module(), shape, str(path))
    mod, names = import_program(program, str(path))
    factory: dict[str, Any] = {"kind": "pt2", "source": str(path)}
    return Imported(mod, path.stem, names=names, factory=factory)


def fixed_shape(dims: list[Any], batch: int | None, what: str) -> tuple[int, ...]:
    """Fix a dynamic batch axis; every other axis, and a static batch, must be what was exported.

    Raises
    ------
    VitqError
        For a dynamic channel, height or width, or another batch than the static one.
    """
    for axis, name in ((1, "channels"), (2, "height"), (3, "width")):
        if not isinstance(dims[axis], int) or dims[axis] <= 0:
            raise VitqError(
                f"{what} has a dynamic {name} {dims[axis]!s}; export it with a static image size"
            )
    if isinstance(dims[0], int) and dims[0] > 0:
        if batch not in (None, dims[0]):
            raise VitqError(
                f"{what} was exported for batch {dims[0]}, not {batch}; export it again for batch "
                f"{batch} or with a dynamic batch"
            )
        return tuple(int(d) for d in dims)
    return (batch or 1, *(int(d) for d in dims[1:]))
