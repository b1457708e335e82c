"""Whole models without copies of layout, exact on every target that this processor runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

import tvm_vitq
from relay_passes.errors import VitqError
from relay_passes.fold_layout import FoldLayout
from relay_passes.hoist_slices import HoistSlices
from relay_passes.pack import PackWeights
from relay_passes.split_boundary import SplitBoundary
from schedules.isa import AVX2, AVX512VNNI
from tests.integration import models
from tvm_vitq.reference.interpreter import Interpreter

CLASS_TOKEN = ["relax.concat", "relax.strided_slice"]
"""The token put before the patches, and the residual of its row before the last block."""


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


@pytest.mark.parametrize("model", ["digits_built",
                                   pytest.param("swin_built", marks=pytest.mark.data)])
@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_targets_agree(
    model: str, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The plain loops of x86-64-v2 and the kernels of each instruction set give equal bits."""
    built: models.Built = request.getfixturevalue(model)
    try:
        artifact = tvm_vitq.compile(built.quantized(), output=tmp_path / "m.so", target=target)
    except VitqError as why:
        if "which this processor lacks" in str(why):
            pytest.skip(str(why))
        raise
    shape = [int(e) for e in built.integer()["main"].params[0].ty.shape.values]
    images = np.random.default_rng(2).standard_normal((3, *shape[1:])).astype("float32")
    expected = Interpreter(built.integer())(images)
    assert (artifact.run(images).view(np.int32) == expected.view(np.int32)).all()
