"""Names: where in the model a value comes from, for bindings and errors."""

from __future__ import annotations

import hashlib

import numpy as np

from .graph import Node

__all__ = ["SUPPORTED", "digest", "module_path", "place"]

SUPPORTED = (
    "linear layers, patch-embedding convolutions, attention (matmul, scale, bias, mask, "
    "softmax), layer_norm, gelu, residual add, position embedding, mean pooling and operators that "
    "only move elements"
)
"""What the grammar covers, in the words of an error message."""


def place(node: Node) -> str:
    """Say where in the model a node is: its own name or that of the nearest named operand above."""
    seen = {id(node)}
    frontier = [node]
    while frontier:
        for candidate in frontier:
            if candidate.name or candidate.label:
                return candidate.name or candidate.label
        above = [i for n in frontier for i in n.inputs if id(i) not in seen]
        seen.update(id(n) for n in above)
        frontier = above
    return "the input"


def module_path(parameter: str) -> str:
    """Turn a parameter's name into its module's: ``mlp.fc1.weight`` becomes ``mlp.fc1``."""
    head, _, tail = parameter.rpartition(".")
    return head if head and tail in ("weight", "bias", "gamma", "beta") else parameter


def digest(array: np.ndarray) -> bytes:
    """Digest of a constant's type, shape and content."""
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(array).tobytes(), digest_size=16).digest()
