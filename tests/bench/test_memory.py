"""Memory of a run: the static plan, and what a process takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tvm
from tvm import relax

from benchmarks.memory import measure, planned
from relay_passes.pipeline import build_passes, lower
from schedules.isa import isa_for, resolve_target
from tests.helpers.tiny import tiny_vit_module
from tvm_vitq.compiler import compile_module
from tvm_vitq.quantizers import PRESETS, quantize


@pytest.fixture(scope="module")
def quantized() -> tvm.IRModule:
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return quantize(tiny_vit_module(depth=4), images, PRESETS["minmax"])


def built(quantized: tvm.IRModule, *left_out: str) -> tvm.IRModule:
    target = resolve_target("x86-64-v3")
    with target:
        passes = [p for p in build_passes(isa_for(target)) if p.info.name not in left_out]
        return tvm.transform.Sequential(passes)(lower(quantized))


def tensors(mod: tvm.IRModule) -> list[int]:
    """Bytes of every tensor that a kernel writes."""
    found: list[int] = []

    def visit(node: object) -> None:
        if isinstance(node, relax.Call) and getattr(node.op, "name", "") == "relax.vm.alloc_tensor":
            dtype = tvm.DataType(str(node.args[3].value))
            size = dtype.bits // 8
            for extent in node.args[2].values:
                size *= int(extent)
            found.append(size)

    for function in mod.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function.body, visit)
    return found


def test_tensors_share_a_few_pieces_of_storage(quantized: tvm.IRModule) -> None:
    mod = built(quantized)
    plan, every = planned(mod), tensors(mod)
    assert plan["pieces"] < len(every) / 2
    assert max(every) <= plan["storage"] < sum(every) / 2
    assert 0 < plan["scratch"] < 1 << 20


def test_without_the_static_plan_every_tensor_has_its_own(quantized: tvm.IRModule) -> None:
    mod = built(quantized, "StaticPlanBlockMemory")
    assert planned(mod)["pieces"] == len(tensors(mod))


def test_runs_after_the_first_take_no_more_memory(
    quantized: tvm.IRModule, tmp_path: Path
) -> None:
    compile_module(quantized, "x86-64-v3", tmp_path / "tiny.so")
    found = measure(tmp_path / "tiny.so", runs=50)
    assert found["later_runs"] < 256 * 1024
    assert found["first_run"] < 12 << 20
