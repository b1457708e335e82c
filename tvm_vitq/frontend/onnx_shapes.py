"""Computes what an ONNX graph says about shapes, so that only image data flows through it.

Older exporters write reshapes as little programs (Shape, Gather, Concat, ...). With a static input
all of them are constants: shape inference gives the results of Shape, and onnx's reference
evaluator does the arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

__all__ = ["with_static_shapes"]

_LARGEST = 4096
"""Constants larger than this many elements are weights, not shapes: they are left alone."""
_MAX_ROUNDS = 64


def with_static_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every computation on shapes replaced by its result.

    Parameters
    ----------
    model : onnx.ModelProto
        With static input dimensions; not changed.
    """
    import onnx
    from onnx import numpy_helper

    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    light = _without_weights(out)
    small = {
        i.name: numpy_helper.to_array(i)
        for i in graph.initializer
        if np.prod(i.dims, dtype=int) <= _LARGEST
    }
    for _ in range(_MAX_ROUNDS):
        folded = _fold_once(light, small)
        if not folded:
            break
    values = {n: v for n, v in small.items() if n not in {i.name for i in graph.initializer}}
    kept = [n for n in graph.node if not all(o in values for o in n.output if o)]
    del graph.node[:]
    graph.node.extend(kept)
    used = {i for n in kept for i in n.input}
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items() if n in used)
    del graph.value_info[:]
    return out


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy of the graph in which large initialisers are inputs, so that inference is cheap."""
    import onnx
    from onnx import helper

    light = onnx.ModelProto()
    light.CopyFrom(model)
    keep = []
    for tensor in light.graph.initializer:
        if np.prod(tensor.dims, dtype=int) <= _LARGEST:
            keep.append(tensor)
        else:
            light.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del light.graph.initializer[:]
    light.graph.initializer.extend(keep)
    del light.graph.value_info[:]
    return light


def _fold_once(model: onnx.ModelProto, known: dict[str, np.ndarray]) -> bool:
    """Evaluate every node whose operands are known, and every Shape of a known shape."""
    from onnx import numpy_helper, shape_inference

    inferred = shape_inference.infer_shapes(model, data_prop=True)
    shapes: dict[str, list[int]] = {}
    for info in [*inferred.graph.value_info, *inferred.graph.input]:
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[info.name] = [d.dim_value for d in dims]
    rest, found = [], False
    for node in model.graph.node:
        result = _evaluate(node, known, shapes, model)
        if result is None:
            rest.append(node)
            continue
        found = True
        for name, value in zip(node.output, result, strict=False):
            known[name] = value
            model.graph.initializer.append(numpy_helper.from_array(value, name))
    del model.graph.node[:]
    model.graph.node.extend(rest)
    return found


def _evaluate(
    node: onnx.NodeProto,
    known: dict[str, np.ndarray],
    shapes: dict[str, list[int]],
    model: onnx.ModelProto,
) -> list[np.ndarray] | None:
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    if node.op_type == "Shape" and node.input[0] in shapes:
        bounds = {a.name: a.i for a in node.attribute}
        dims = shapes[node.input[0]]
        return [np.array(dims[bounds.get("start", 0) : bounds.get("end", len(dims))], "int64")]
    operands = [i for i in node.input if i]
    if any(i not in known for i in operands) or node.op_type in (
        "DequantizeLinear",
        "QuantizeLinear",
    ):
        return None
    graph = helper.make_graph(
        [node],
        "constant",
        [
            helper.make_tensor_value_info(i, helper.np_dtype_to_tensor_dtype(known[i].dtype), None)
            for i in operands
        ],
        [helper.make_empty_tensor_value_info(o) for o in node.output],
    )
    single = helper.make_model(graph, opset_imports=model.opset_import)
    try:
        result = ReferenceEvaluator(single).run(None, {i: known[i] for i in operands})
    except Exception:  # not evaluable here: the importer sees the node as it is
        return None
    arrays = [np.asarray(r) for r in result]
    return arrays if all(a.size <= _LARGEST for a in arrays) else None
