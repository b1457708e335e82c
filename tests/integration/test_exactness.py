"""Compiled logits equal the int64 reference's, bit for bit, for every whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tvm_vitq
from tests.integration import models
from tvm_vitq.artifact.disassemble import count_float_instructions
from tvm_vitq.artifact.elf import host_machine
from tvm_vitq.artifact.foreign import ForeignArtifact
from tvm_vitq.reference.interpreter import Interpreter


def assert_exact(built: models.Built, images: np.ndarray) -> None:
    """Compare all logits of ``images`` as bits, and replay the stored golden vectors."""
    artifact = built.artifact()
    found = artifact.run(images)
    expected = Interpreter(built.integer())(images)
    assert found.dtype == expected.dtype == np.float32
    different = int((found.view(np.int32) != expected.view(np.int32)).sum())
    assert different == 0, f"{different} of {found.size} logits differ from the reference"
    assert len(np.unique(found)) > min(8, found.shape[-1] // 2), "the logits say nothing"
    golden = artifact.verify()
    assert golden["equal"] and golden["logits_different"] == 0 and golden["vectors"] >= 1


def assert_no_float_instructions(built: models.Built) -> None:
    census = count_float_instructions(built.library)
    assert census.instructions > 1000
    assert census.elsewhere == {}, f"floating-point arithmetic outside the boundary: {census}"


def test_digits_all_test_images(digits_built: models.Built) -> None:
    from tvm_vitq import demo

    assert_exact(digits_built, demo.normalise(demo.pixels(demo.digits("test")[0][:64])))
    assert_no_float_instructions(digits_built)


BUILDS = ["x86-64", "x86-64-v3", "alderlake", "x86-64-v4", "icelake-server"]
"""Without hand-made kernels, AVX2, AVX-VNNI, AVX-512BW, AVX512-VNNI."""


def assert_same_on(target: str, built: models.Built, images: np.ndarray, folder: Path) -> None:
    made = tvm_vitq.compile(built.quantized(), target, folder / "other.so", golden=images[:1])
    if isinstance(made, ForeignArtifact):
        pytest.skip(str(made.verify()["not_replayed"]))
    found, expected = made.run(images), built.artifact().run(images)
    different = int((found.view(np.int32) != expected.view(np.int32)).sum())
    assert different == 0, f"{different} of {found.size} logits differ between targets"


@pytest.mark.skipif(host_machine() != "x86_64", reason="targets of x86")
@pytest.mark.parametrize("target", BUILDS)
def test_every_build_has_the_same_logits(
    digits_built: models.Built, tmp_path: Path, target: str
) -> None:
    from tvm_vitq import demo

    images = demo.normalise(demo.pixels(demo.digits("test")[0][:64]))
    assert_same_on(target, digits_built, images, tmp_path)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(host_machine() != "x86_64", reason="targets of x86")
@pytest.mark.parametrize("target", BUILDS)
@pytest.mark.parametrize("model,images", [
    ("deit_built", "nips500"), ("swin_built", "cifar10_test2000")])
def test_every_build_of_real_models(
    model: str, images: str, target: str, request: pytest.FixtureRequest, data_dir: Path,
    tmp_path: Path,
) -> None:
    built = request.getfixturevalue(model)
    inputs, _ = models.labelled(data_dir / "images" / images, built.preprocess(), 4)
    assert_same_on(target, built, inputs, tmp_path)


@pytest.mark.data
@pytest.mark.parametrize("n", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_deit_tiny(deit_built: models.Built, data_dir: Path, n: int) -> None:
    images, _ = models.labelled(data_dir / "images/nips500", deit_built.preprocess(), n)
    assert_exact(deit_built, images)


@pytest.mark.data
@pytest.mark.parametrize("n", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_swin_micro(swin_built: models.Built, data_dir: Path, n: int) -> None:
    images, _ = models.labelled(data_dir / "images/cifar10_test2000", swin_built.preprocess(), n)
    assert_exact(swin_built, images)


@pytest.mark.data
@pytest.mark.parametrize("model", ["deit_built", "swin_built"])
def test_no_float_instruction(model: str, request: pytest.FixtureRequest) -> None:
    assert_no_float_instructions(request.getfixturevalue(model))


@pytest.mark.data
@pytest.mark.parametrize(("model", "weights"), [("deit_built", 5_717_416), ("swin_built", None)])
def test_size(model: str, weights: int | None, request: pytest.FixtureRequest) -> None:
    """The whole library is at most a third of the fp32 weights (small models: kernels dominate)."""
    built = request.getfixturevalue(model)
    if weights is not None:
        assert built.library.stat().st_size <= 0.33 * weights * 4


@pytest.mark.parametrize("key", models.RANDOM_MODELS)
@pytest.mark.parametrize("depth", ["reduced", pytest.param("full", marks=pytest.mark.slow)])
def test_random_weights(
    key: str, depth: str, tmp_path: Path, noise: Callable[..., np.ndarray]
) -> None:
    """Every architecture of the list compiles and is exact, whatever its weights."""
    model = models.random_model(key, reduced=depth == "reduced")
    built = models.build(tmp_path, model, noise(4, 3, 224, 224))
    assert_exact(built, noise(6, 3, 224, 224)[4:])
    assert_no_float_instructions(built)
