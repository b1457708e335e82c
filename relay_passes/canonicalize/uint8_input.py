"""Raw pixels as input: the normalisation folds into the first linear layer.

With pixels u in 0 ... 255 the model's input is ``x = u * a + o``, ``a = 1 / (255 std)``,
``o = -mean / std`` per channel c, so that with c(k) the channel of the first layer's input k::

    W'[k, n] = a[c(k)] * W[k, n]        b'[n] = b[n] + sum_k o[c(k)] * W[k, n]

Exact in float64, rounded once to float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tvm

from ..errors import VitqError
from .check import check_graph
from .driver import simplify
from .fold import fold
from .from_relax import from_relax
from .graph import Graph, Node
from .naming import place
from .to_relax import to_relax

__all__ = ["fold_uint8_input"]


def _channel_of_inputs(source: Node, target: Node) -> np.ndarray | None:
    """Channel of every feature of ``target``, a layout of ``source`` [B, C, H, W]; or None."""
    batch, channels, height, width = source.shape
    index = np.arange(channels).reshape(1, channels, 1, 1)
    values = {id(source): np.broadcast_to(index, (batch, channels, height, width))}
    path: list[Node] = []
    walk = target
    while walk is not source:
        if walk.op not in ("reshape", "permute", "slice"):
            return None
        path.append(walk)
        walk = walk.inputs[0]
    value = values[id(source)]
    for node in reversed(path):
        moved = fold(node.op, [value], {**node.attrs, "shape": node.shape})
        assert moved is not None
        value = moved
    rows = value.reshape(-1, value.shape[-1])
    return rows[0] if (rows == rows[:1]).all() else None


def _first_linears(graph: Graph, node: Node) -> list[Node]:
    found: list[Node] = []
    for user in set(node.users):
        if user.op == "linear":
            found.append(user)
        elif user.op in ("reshape", "permute", "slice"):
            found.extend(_first_linears(graph, user))
        else:
            raise VitqError(
                f"input='uint8' cannot fold the normalisation: the pixels reach {user.op} near "
                f"{place(user)} before the first linear layer; use input='float32'"
            )
    return found


def fold_uint8_input(
    mod: tvm.IRModule, mean: Sequence[float], std: Sequence[float]
) -> tvm.IRModule:
    """Make a canonical module take ``uint8 [B, H, W, C]`` pixels.

    Parameters
    ----------
    mod : tvm.IRModule
        Canonical module with input ``float32 [B, C, H, W]``.
    mean, std : sequence of float
        Normalisation per channel, for pixel values in [0, 1].

    Returns
    -------
    tvm.IRModule
        Canonical module; its first binding is ``R.dequantize(x, 1, 0)``.

    Raises
    ------
    VitqError
        If something other than layouts lies between the pixels and the first linear layer.
    """
    graph = from_relax(mod)
    simplify(graph)
    old = graph.input
    assert old is not None
    batch, channels, height, width = old.shape
    if len(mean) != channels or len(std) != channels:
        raise VitqError(f"mean and std need {channels} values, one per channel")
    gain = 1.0 / (255.0 * np.asarray(std, dtype="float64"))
    offset = -np.asarray(mean, dtype="float64") / np.asarray(std, dtype="float64")
    for linear in _first_linears(graph, old):
        channel = _channel_of_inputs(old, linear.inputs[0])
        if channel is None:
            raise VitqError(
                f"input='uint8' cannot fold the normalisation into {place(linear)}; "
                "use input='float32'"
            )
        weight = linear.inputs[1].array.astype("float64")
        bias = linear.inputs[2].array.astype("float64") if len(linear.inputs) == 3 else 0.0
        scaled = graph.const(
            (weight * gain[channel][:, None]).astype("float32"), linear.inputs[1].name
        )
        shifted = graph.const((bias + offset[channel] @ weight).astype("float32"))
        graph.replace(linear, graph.linear(linear.inputs[0], scaled, shifted, name=linear.name))
    pixels = Node("input", [], (batch, height, width, channels), "uint8")
    values = Node("pixels", [pixels], pixels.shape, "float32")
    graph.replace(old, graph.permute(values, [0, 3, 1, 2]))
    graph.input = pixels
    simplify(graph)
    check_graph(graph)
    out = to_relax(graph)
    for key, value in (mod.attrs or {}).items():
        out = out.with_attr(key, value)
    return out
