"""compile, from a saved module and from the embedded model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tvm_vitq
from tests.artifact.toy import CLASSES, SIDE, toy_quantized
from tests.cli.conftest import Cli
from tvm_vitq.saved import load_quantized, save_quantized


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_saved_module(cli: Cli, tmp_path: Path, dtype: str) -> None:
    saved = save_quantized(toy_quantized(dtype), tmp_path / "q.json")
    out = tmp_path / "toy.so"
    done = cli("compile", saved, "-o", out, "--json", "--dump-ir", tmp_path / "ir")
    assert done.code == 0, done.err
    report = done.json()
    assert report["equal"] and report["integer_only"] and report["ranges_proved"]
    assert report["size_bytes"] == out.stat().st_size
    assert {p.name for p in (tmp_path / "ir").iterdir()} >= {"1_quantized.py", "4_kernels.py"}
    artifact = tvm_vitq.load(out)
    assert artifact.input_dtype == dtype
    assert artifact.inspect()["float_instructions"] == 0


def test_labels_and_golden_images(cli: Cli, tmp_path: Path) -> None:
    """Class names are stored; the golden vectors are the first calibration images."""
    saved = save_quantized(toy_quantized(), tmp_path / "q.json")
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcde"))
    calib = tmp_path / "calib.npy"
    x = np.random.default_rng(0).standard_normal((3, 3, SIDE, SIDE)).astype(np.float32)
    np.save(calib, x)
    out = tmp_path / "toy.so"
    done = cli("compile", saved, "-o", out, "--labels", names, "--calib", calib)
    assert done.code == 0, done.err
    artifact = tvm_vitq.load(out)
    assert artifact.labels == list("abcde")
    codes, logits = artifact.golden
    assert codes.shape == (2, 3, SIDE, SIDE) and logits.shape == (2, CLASSES)
    scale = artifact.metadata["output"]["scale"]
    np.testing.assert_array_equal(
        artifact.run(x[[0, 2]]), logits.astype(np.float32) * np.float32(scale)
    )


def test_saving_loses_nothing(tmp_path: Path) -> None:
    import tvm

    module = toy_quantized()
    again = load_quantized(save_quantized(module, tmp_path / "q.json"))
    tvm.ir.assert_structural_equal(again, module)
    assert str(again.attrs["vitq.model"]) == str(module.attrs["vitq.model"])


def test_a_difference_to_the_reference_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tvm_vitq.compiler as compiler

    honest = compiler.reference_logits
    monkeypatch.setattr(compiler, "reference_logits", lambda *a: honest(*a) + np.int16(1))
    out = tmp_path / "toy.so"
    out.write_text("what was there")
    with pytest.raises(tvm_vitq.VitqError, match="differ"):
        tvm_vitq.compile(toy_quantized(), output=out)
    assert out.read_text() == "what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["toy.so"]


@pytest.mark.parametrize(
    ("golden", "words"),
    [
        (np.zeros((1, 3, SIDE, SIDE + 1), np.float32), "shape"),
        (np.zeros((0, 3, SIDE, SIDE), np.float32), "shape"),
        (np.full((1, 3, SIDE, SIDE), np.nan, np.float32), "NaN"),
    ],
)
def test_bad_golden_images(tmp_path: Path, golden: np.ndarray, words: str) -> None:
    with pytest.raises(tvm_vitq.VitqError, match=words):
        tvm_vitq.compile(toy_quantized(), output=tmp_path / "o.so", golden=golden)


def test_api_errors(tmp_path: Path) -> None:
    with pytest.raises(tvm_vitq.VitqError, match="output"):
        tvm_vitq.compile(toy_quantized())
    with pytest.raises(tvm_vitq.VitqError, match="IRModule"):
        tvm_vitq.compile("model.onnx", output=tmp_path / "o.so")
    with pytest.raises(tvm_vitq.VitqError, match="unknown target"):
        tvm_vitq.compile(toy_quantized(), "z80", tmp_path / "o.so")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tvm_vitq.nonsense


def test_the_embedded_model_from_pictures_to_eval(cli: Cli, tmp_path: Path) -> None:
    """The whole road with the digits model: compile, save, run, eval against float, verify."""
    from tvm_vitq import demo

    demo.write_images("calib", tmp_path / "calib", limit=48)
    demo.write_images("test", tmp_path / "test", limit=40)
    out, saved = tmp_path / "digits.so", tmp_path / "digits.json"
    model = "tvm_vitq.demo:digits_vit"
    done = cli(
        "compile", model, "--calib", tmp_path / "calib", "-o", out, "--samples", 32,
        "--save-quantized", saved, "--input", "uint8", "--recipe", "minmax", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json()["equal"]
    weights = demo.data_file("digits_vit.safetensors")
    found = cli(
        "eval", out, "--images", tmp_path / "test", "--against-float", weights, "--json"
    ).json()
    assert found["n"] == 40 and found["agreement"] >= 95 and found["float_top1"] >= 90
    top = cli("run", out, tmp_path / "test/img/test_0000.png", "--json").json()["images"][0]["top"]
    assert top[0]["label"] == str(top[0]["class"])
    report = cli("inspect", out, "--json").json()
    assert report["float_instructions"] == 0
    again = tmp_path / "again.so"
    assert cli("compile", saved, "-o", again).code == 0
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    first, second = tvm_vitq.load(out), tvm_vitq.load(again)
    np.testing.assert_array_equal(first.run(x), second.run(x))
