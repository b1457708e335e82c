"""ONNX file -> Relax, float or with QuantizeLinear/DequantizeLinear."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm

from relay_passes.canonicalize.naming import digest
from relay_passes.errors import VitqError

from .onnx_shapes import with_static_shapes
from .source import Imported
from .torch_export import fixed_shape, one_line, quiet

if TYPE_CHECKING:
    import onnx

__all__ = ["MAX_OPSET", "MIN_OPSET", "load_onnx"]

MIN_OPSET = 13
MAX_OPSET = 23


def load_onnx(path: Path, batch: int | None) -> Imported:
    """Read an ``.onnx`` file (with its external data beside it).

    Parameters
    ----------
    path : Path
        The file.
    batch : int or None
        Batch to fix a dynamic batch axis to; None keeps a static one, or means 1.

    Raises
    ------
    VitqError
        For a truncated or foreign file, an operator set or operator that is not supported,
        dynamic image sizes, or another static batch than asked for.
    """
    model = _read(path)
    opset = _check_opset(model, path)
    _check_operators(model, path)
    initializers = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in initializers]
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        raise VitqError(
            f"{path} has inputs {[i.name for i in inputs]}; one image tensor [B, C, H, W] is "
            "supported"
        )
    dims = [
        d.dim_value if d.HasField("dim_value") else (d.dim_param or "?")
        for d in inputs[0].type.tensor_type.shape.dim
    ]
    shape = fixed_shape(dims, batch, str(path))
    for dim, size in zip(inputs[0].type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size
    try:
        mod = _to_relax(model, opset)
    except Exception:  # shapes that the importer cannot follow: compute them first
        try:
            mod = _to_relax(with_static_shapes(model), opset)
        except Exception as error:  # TVM's importer raises many kinds
            raise VitqError(f"{path} cannot be imported: {one_line(error)}") from error
    factory: dict[str, Any] = {"kind": "onnx", "source": str(path)}
    return Imported(mod, path.stem, constants=_constant_names(model), factory=factory)


def _to_relax(model: onnx.ModelProto, opset: int) -> tvm.IRModule:
    from tvm.relax.frontend.onnx import from_onnx

    with quiet():
        return from_onnx(model, opset=opset)


def _read(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        model = onnx.load(str(path))
    except FileNotFoundError as error:
        raise VitqError(
            f"{path} keeps its weights in a file that is not there: {one_line(error)}"
        ) from error
    except Exception as error:  # protobuf and onnx errors
        raise VitqError(
            f"{path} cannot be read as ONNX (truncated or foreign): {one_line(error)}"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise VitqError(f"{path} is not an ONNX model, or is truncated: it holds no operators")
    return model


def _check_opset(model: onnx.ModelProto, path: Path) -> int:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise VitqError(
            f"{path} uses ONNX operator set {opset}; {MIN_OPSET} to {MAX_OPSET} are supported "
            "(export again with opset_version=18)"
        )
    return int(opset)


def _check_operators(model: onnx.ModelProto, path: Path) -> None:
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    known = _get_convert_map()
    for node in model.graph.node:
        if node.op_type in known or node.op_type == "Constant":
            continue
        where = _scope(node) or node.name or (node.output[0] if node.output else "?")
        raise VitqError(
            f"operator {node.op_type} in {where} of {path.name} is not supported; quantized models "
            "must use QuantizeLinear/DequantizeLinear pairs around float operators (QDQ format)"
        )


def _scope(node: onnx.NodeProto) -> str:
    """Module path of a node, from the exporter's metadata or the node's name."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = [s for s in ast.literal_eval(entry.value) if s]
            except (ValueError, SyntaxError):
                return ""
            return scopes[-2] if len(scopes) > 1 else ""
    path: list[str] = []
    for part in [p for p in node.name.split("/") if p][:-1]:
        if path and part.startswith(f"{path[-1]}."):  # /blocks/blocks.0/attn is blocks.0.attn
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)


def _constant_names(model: onnx.ModelProto) -> dict[bytes, str]:
    """Content digest -> parameter name; the names of folded initialisers come from their node."""
    from onnx import numpy_helper

    users: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        for operand in node.input:
            users.setdefault(operand, node)
    names: dict[bytes, str] = {}
    for tensor in model.graph.initializer:
        name = tensor.name.removesuffix("_quantized")
        if "." not in name or name.startswith("onnx::"):
            name = _scope(users[tensor.name]) if tensor.name in users else ""
        if name:
            array = numpy_helper.to_array(tensor)
            if array.size > 1:
                names.setdefault(digest(np.asarray(array)), name)
    return names
