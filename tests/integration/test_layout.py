"""Whole models run without copies of layout."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax

from relay_passes.fold_layout import FoldLayout
from relay_passes.hoist_slices import HoistSlices
from relay_passes.pack import PackWeights
from relay_passes.split_boundary import SplitBoundary
from schedules.isa import AVX2, AVX512VNNI
from tests.integration import models

CLASS_TOKEN = ["relax.concat"]
"""The token put before the patches."""


@pytest.mark.parametrize("model,expected", [
    ("digits_built", CLASS_TOKEN),
    pytest.param("deit_built", CLASS_TOKEN, marks=pytest.mark.data),
    pytest.param("swin_built", [], marks=pytest.mark.data)])
@pytest.mark.parametrize("isa", [AVX2, AVX512VNNI], ids=lambda isa: isa.name)
def test_what_is_left(
    model: str, expected: list[str], isa: object, request: pytest.FixtureRequest
) -> None:
    """Layout operators are index maps of kernels, save what a class token needs."""
    built: models.Built = request.getfixturevalue(model)
    passes = [SplitBoundary(), HoistSlices(), PackWeights(isa), FoldLayout(isa)]
    main = tvm.transform.Sequential(passes)(built.integer())["main_codes"]
    calls = [b.value for block in main.body.blocks for b in block.bindings
             if isinstance(b.value, relax.Call)]
    names = [c.op.name for c in calls if c.op.name.startswith("relax.")]
    assert sorted(n for n in names if n != "relax.reshape") == expected
