"""Layers that differ in numbers only share a kernel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax, tirx

from relay_passes.dialect.layer_norm import layer_norm
from relay_passes.dialect.matmul import matmul_requant
from tests.helpers.qdq import build


def kernels(calls: list[Callable[[relax.Expr], relax.Expr]], shape: tuple[int, ...],
            dtype: str) -> list[str]:
    """Return the kernels that calls on one input are legalised to."""
    def body(bb: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
        return bb.emit(relax.Tuple([bb.emit(make(x)) for make in calls]))

    mod = relax.transform.LegalizeOps()(build(shape, body, dtype))
    return [gvar.name_hint for gvar, func in mod.functions_items()
            if isinstance(func, tirx.PrimFunc)]


def scores(mult: int, shift: int, zero_point: int, qmin: int = -128) -> Callable[..., relax.Call]:
    return lambda x: matmul_requant(x, x, True, mult, shift, zero_point, qmin, 127)


@pytest.mark.parametrize("others,count", [
    ([scores(7, 33, 1), scores(-(2**31) + 1, 45, -128)], 1),  # numbers
    ([scores(7, 31, 1)], 2),  # the operand is lifted by one
    ([scores(7, 33, 0)], 2),  # no zero point
    ([scores(7, 33, 1, -127)], 2),  # the clamp is no saturation
], ids=["numbers", "lift", "zero", "clamp"])
def test_matmul(others, count) -> None:
    made = kernels([scores(2**30, 40, 3), *others], (1, 4, 16), "int8")
    assert len(made) == count


def test_layer_norm() -> None:
    def normalised(in_scale: float) -> Callable[..., relax.Call]:
        return lambda x: layer_norm(
            x, in_scale, np.ones(48), np.zeros(48), 1e-5, 0.03, 5, -128, 127, "int8")

    assert len(kernels([normalised(0.01), normalised(0.002)], (2, 48), "int16")) == 1
