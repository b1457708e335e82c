"""The whole way to the quantize/dequantize form on tiny models, also with awkward data."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from relay_passes.errors import VitqError
from tests.helpers.tiny import tiny_vit_module
from tvm_vitq.quantizers import PRESETS, Recipe, preset, quantize
from tvm_vitq.quantizers.draft import Draft
from tvm_vitq.quantizers.emit import emit
from tvm_vitq.quantizers.structure import Structure
from tvm_vitq.reference.float_interpreter import Program, run_float


def images(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def noise(mod: tvm.IRModule, quantized: tvm.IRModule, x: torch.Tensor) -> float:
    a, b = run_float(mod, x), run_float(quantized, x)
    return float((a - b).var() / a.var())


def calls(mod: tvm.IRModule, name: str) -> list[relax.Call]:
    bindings = [b for block in mod["main"].body.blocks for b in block.bindings]
    values = [b.value for b in bindings if isinstance(b.value, relax.Call)]
    return [v for v in values if v.op.name == name]


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("pool", ["token", "avg", "pair"])
def test_presets_keep_the_function(name: str, pool: str) -> None:
    mod = tiny_vit_module(pool=pool)
    quantized = quantize(mod, images(), PRESETS[name])
    assert noise(mod, quantized, images(24)) < 5e-3


def test_result_is_saved_and_loaded_without_loss() -> None:
    quantized = quantize(tiny_vit_module(), images(), PRESETS["repq"])
    again = tvm.ir.load_json(tvm.ir.save_json(quantized))
    tvm.ir.assert_structural_equal(quantized, again)
    x = images(3)
    assert torch.equal(run_float(quantized, x), run_float(again, x))
    report = json.loads(str(again.attrs["vitq.recipe"]))
    assert report["recipe"]["observer"] == "percentile" and report["images"] == 16
    assert "vitq.model" in again.attrs


def test_same_seed_same_module() -> None:
    one, two = (quantize(tiny_vit_module(depth=1), images()) for _ in range(2))
    tvm.ir.assert_structural_equal(one, two)


def test_form_of_the_result() -> None:
    mod = tiny_vit_module(depth=1)
    methods = {"softmax": "poly", "gelu": "table"}
    quantized = quantize(mod, images(), preset("int8", nonlinear=methods))
    assert not calls(quantized, "relax.nn.softmax") and not calls(quantized, "relax.nn.gelu")
    assert calls(quantized, "vitq.float_softmax")[0].attrs["method"] == "poly"
    assert calls(quantized, "vitq.float_gelu")[0].attrs["method"] == "table"
    weights = [c for c in calls(quantized, "relax.dequantize") if len(c.args[0].ty.shape) == 2]
    matrices = [c for c in weights if isinstance(c.args[0], tvm.ir.GenericConst)]
    assert len(matrices) == 8
    for call in matrices:
        codes = call.args[0].value.numpy()
        assert codes.dtype == np.int8 and abs(codes.astype(int)).max() <= 127
    dtypes = {str(call.attrs.out_dtype) for call in calls(quantized, "relax.quantize")}
    assert dtypes == {"int8", "int16"}


def test_budget_of_int16_is_kept() -> None:
    for budget in (0.0, 0.05, 1.0):
        recipe = Recipe(a16_budget=budget, rounding="nearest")
        report = json.loads(
            str(quantize(tiny_vit_module(depth=1), images(), recipe).attrs["vitq.recipe"])
        )
        assert report["a16_share"] <= budget
        assert bool(report["a16"]) == (budget > 0)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_few_images(count: int, batch: int) -> None:
    mod = tiny_vit_module(depth=1, batch=batch)
    assert noise(mod, quantize(mod, images(count)), images(8)) < 0.05


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_images_have_tokens_without_variance(value: float) -> None:
    mod = tiny_vit_module(depth=1)
    constant = torch.full((4, 3, 16, 16), value)
    out = run_float(quantize(mod, constant), images(2))
    assert torch.isfinite(out).all()


def edited(mod: tvm.IRModule, edit) -> tvm.IRModule:
    """Return the module with every float constant passed through ``edit``."""

    draft = Draft(Structure(Program(mod)))
    for slot, value in draft.program.constants.items():
        if value.dim():
            draft.constants[slot] = torch.from_numpy(edit(value.numpy().copy()))
    return emit(mod, draft, defaultdict(lambda: "table"))


def test_constant_and_dead_channels() -> None:
    def kill(value: np.ndarray) -> np.ndarray:
        value[..., 0] = 0.0
        if value.ndim == 2:
            value[1] = 0.0
        return value

    mod = edited(tiny_vit_module(depth=1), kill)
    quantized = quantize(mod, images())
    assert noise(mod, quantized, images(8)) < 5e-3


def test_huge_and_tiny_channels() -> None:
    def stretch(value: np.ndarray) -> np.ndarray:
        if value.ndim == 1 and len(value) == 32:
            value[3] *= 60.0
            value[4] *= 1e-6
        return value

    mod = edited(tiny_vit_module(depth=1), stretch)
    default = noise(mod, quantize(mod, images()), images(8))
    plain = noise(mod, quantize(mod, images(), PRESETS["minmax"]), images(8))
    assert default < 0.006 and default < 0.8 * plain


def test_infinite_weights_are_refused() -> None:
    def spoil(value: np.ndarray) -> np.ndarray:
        value.reshape(-1)[0] = np.inf
        return value

    with pytest.raises(VitqError, match="NaN or infinite"):
        quantize(edited(tiny_vit_module(depth=1), spoil), images(2))


def test_progress_adds_up() -> None:
    seen: list[tuple[int, int]] = []
    quantize(tiny_vit_module(depth=1), images(4), PRESETS["minmax"], lambda *a: seen.append(a))
    assert sum(done for done, _ in seen) == seen[-1][1]


def test_given_quantizers_are_kept() -> None:
    mod = tiny_vit_module(depth=1)
    first = quantize(mod, images(), PRESETS["minmax"])
    again = quantize(first, images(), PRESETS["minmax"])
    x = images(4)
    torch.testing.assert_close(run_float(again, x), run_float(first, x))
    assert len(calls(again, "relax.quantize")) == len(calls(first, "relax.quantize"))


@pytest.mark.parametrize(
    "change",
    [
        {"observer": "magic"},
        {"nonlinear": "magic"},
        {"rounding": "up"},
        {"norm": 2.0},
        {"a16_budget": -1.0},
        {"probabilities": "int4"},
        {"images": 0},
    ],
)
def test_recipe_refuses_what_it_does_not_know(change: dict) -> None:
    with pytest.raises(VitqError):
        Recipe(**change)
    with pytest.raises(VitqError, match="unknown field"):
        Recipe.from_dict({"colour": 1})


@pytest.mark.parametrize(
    "values",
    [{"images": "64"}, {"norm": "x"}, {"a16_budget": None}, {"nonlinear": 3}, {"images": True}],
    ids=str,
)
def test_recipe_of_wrong_types_names_the_field(values) -> None:
    with pytest.raises(VitqError, match=f"recipe: {next(iter(values))} is") as info:
        Recipe.from_dict(values)
    assert "\n" not in str(info.value)
    with pytest.raises(VitqError, match="unknown recipe"):
        preset("magic")
