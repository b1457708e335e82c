"""An artefact runs what the reference runs, checks what it is given, and says what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tvm_vitq
from relay_passes.errors import VitqError
from tests.artifact.toy import CLASSES, SIDE, toy_artifact, toy_integer
from tvm_vitq.reference.interpreter import run_integer

ROOT = Path(__file__).resolve().parents[2]


def images(n: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(n)
    if dtype == "uint8":
        return rng.integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)
    return rng.standard_normal((n, 3, SIDE, SIDE)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_any_number_of_images_equals_the_reference(toy: Path, n: int) -> None:
    """The last group is filled up, and that changes nothing."""
    x = images(n)
    padded = np.concatenate([x, x[-1:]])[: n + n % 2]
    found = tvm_vitq.load(toy).run(x)
    assert found.shape == (n, CLASSES) and found.dtype == np.float32
    np.testing.assert_array_equal(found, run_integer(toy_integer(), padded)[:n])


def test_one_image_without_a_batch_axis(toy: Path) -> None:
    artifact, x = tvm_vitq.load(toy), images(1)
    np.testing.assert_array_equal(artifact.run(x[0]), artifact.run(x)[0])


def test_uint8_pixels_are_the_codes(toy_uint8: Path) -> None:
    artifact, x = tvm_vitq.load(toy_uint8), images(3, "uint8")
    codes = artifact.run_codes(x)
    out = artifact.metadata["output"]
    assert str(codes.dtype) == out["dtype"] == "int16"
    real = (codes.astype(np.float32) - out["zero_point"]) * np.float32(out["scale"])
    np.testing.assert_array_equal(artifact.run(x), real)


def test_verify(toy: Path) -> None:
    assert tvm_vitq.load(toy).verify() == {
        "equal": True,
        "vectors": 2,
        "logits_compared": 2 * CLASSES,
        "logits_different": 0,
    }


def test_verify_counts_differences(tmp_path: Path) -> None:
    found = tvm_vitq.load(toy_artifact(tmp_path / "wrong.so", wrong=True)).verify()
    assert not found["equal"] and found["logits_different"] == 1


def test_metadata(toy: Path) -> None:
    meta = tvm_vitq.load(toy).metadata
    assert meta["format"] == 1
    assert meta["model"]["name"] == "toy"
    assert meta["input"]["shape"] == [2, 3, SIDE, SIDE] and meta["input"]["layout"] == "NCHW"
    assert meta["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    assert meta["labels"][1] == "class 1"
    assert {"tvm", "tvm_ffi", "tvm_vitq"} <= set(meta["versions"])


def test_inspect(toy: Path) -> None:
    report = tvm_vitq.load(toy).inspect()
    assert report["integer_only"] and report["ranges_proved"]
    assert report["float_instructions"] == 0
    assert set(report["float_boundary"]) == {"vitq_quantize", "vitq_dequantize"}
    assert report["size_bytes"] == toy.stat().st_size
    assert report["operators"]["vitq.linear"] == 1
    assert {"binding", "op", "quantity", "lo", "hi", "dtype"} <= set(report["bounds"][0])
    json.dumps(report)


def test_needs_no_other_library(toy: Path) -> None:
    done = subprocess.run(["readelf", "-d", str(toy)], capture_output=True, text=True, check=True)
    needed = [
        line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "NEEDED" in line
    ]
    assert all(name.startswith(("libc.", "libm.")) for name in needed)


def test_runs_where_there_is_no_torch(toy: Path) -> None:
    """Loading, running and verifying import neither torch nor timm, which are hidden here."""
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'onnx'): sys.modules[name] = None\n"
        "import numpy as np, tvm_vitq\n"
        f"a = tvm_vitq.load({str(toy)!r}, threads=1)\n"
        f"assert a.verify()['equal'] and a.run(np.zeros((1, 3, {SIDE}, {SIDE}), 'float32')).size\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((1, 3, SIDE, SIDE + 1), np.float32), "shape"),
        (np.zeros((0, 3, SIDE, SIDE), np.float32), "shape"),
        (np.zeros((1, SIDE, SIDE, 3), np.float32), "shape"),
        (np.zeros((1, 3, SIDE, SIDE), np.uint8), "uint8"),
        (np.full((1, 3, SIDE, SIDE), np.nan, np.float32), "NaN"),
        (np.full((1, 3, SIDE, SIDE), -np.inf, np.float32), "Inf"),
    ],
    ids=["width", "none", "layout", "dtype", "nan", "inf"],
)
def test_wrong_input_is_refused(toy: Path, x: np.ndarray, words: str) -> None:
    with pytest.raises(VitqError, match=words):
        tvm_vitq.load(toy).run(x)


def test_wrong_codes_are_refused(toy: Path, toy_uint8: Path) -> None:
    with pytest.raises(VitqError, match="int8"):
        tvm_vitq.load(toy).run_codes(np.zeros((1, 3, SIDE, SIDE), np.int16))
    with pytest.raises(VitqError, match="uint8"):
        tvm_vitq.load(toy_uint8).run(images(1))


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.3, 0.9, 0.999])
def test_truncated_file(toy: Path, tmp_path: Path, share: float) -> None:
    """Every prefix is refused with one line; none brings the process down."""
    cut = tmp_path / "cut.so"
    data = toy.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VitqError, match=r"truncated|not a shared library") as caught:
        tvm_vitq.load(cut)
    assert "\n" not in str(caught.value)


def test_foreign_files(toy: Path, tmp_path: Path) -> None:
    import ctypes.util

    import tvm

    text = tmp_path / "text.so"
    text.write_text("hello " * 100)
    other = tmp_path / "arm.so"
    data = bytearray(toy.read_bytes())
    data[18:20] = (183).to_bytes(2, "little")
    other.write_bytes(data)
    empty = tmp_path / "empty.so"
    empty.touch()
    for path, words in (
        (text, "not a shared library"),
        (empty, "not a shared library"),
        (tmp_path, "cannot read"),
        (tmp_path / "absent.so", "cannot read"),
        (Path(sys.executable).resolve(), "not"),
        (next(Path(tvm.__file__).parent.rglob("libtvm_runtime.so")), "not one of tvm-vitq"),
        (other, "aarch64"),
    ):
        with pytest.raises(VitqError, match=words) as caught:
            tvm_vitq.load(path)
        assert "\n" not in str(caught.value)
    assert ctypes.util


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 0}, "older"),
        ({"format": 99}, "newer"),
        ({"format": None, "versions": None}, "older"),
        ({"target": {"name": "x", "mcpu": "x", "features": ["amx-imaginary"]}}, "processor"),
    ],
    ids=["older", "newer", "none", "processor"],
)
def test_other_versions(tmp_path: Path, change: dict, words: str) -> None:
    path = toy_artifact(tmp_path / "other.so", change=change)
    with pytest.raises(VitqError, match=words):
        tvm_vitq.load(path)


def test_a_library_of_tvm_that_is_not_ours(tmp_path: Path) -> None:
    """It has a kernel with our prefix but no metadata."""
    import tvm
    from tvm import relax

    from tests.artifact.toy import toy_kernels
    from tvm_vitq.compiler import resolve

    built = relax.build(toy_kernels(toy_integer()), resolve("native")[1], relax_pipeline=None)
    assert tvm.__version__
    built.export_library(str(tmp_path / "plain.so"))
    with pytest.raises(VitqError, match="cannot be loaded"):
        tvm_vitq.load(tmp_path / "plain.so")


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    """The dynamic loader would hand out the first library again."""
    path = tmp_path / "same.so"
    first = tvm_vitq.load(toy_artifact(path))
    toy_artifact(tmp_path / "new.so", dtype="uint8", batch=1).replace(path)
    second = tvm_vitq.load(path)
    assert (first.input_dtype, second.input_dtype) == ("float32", "uint8")
    assert second.run(images(1, "uint8")).shape == (1, CLASSES)
    assert first.run(images(1)).shape == (1, CLASSES)


def test_threads(toy: Path) -> None:
    x = images(4)
    assert np.array_equal(
        tvm_vitq.load(toy, threads=1).run(x), tvm_vitq.load(toy, threads=2).run(x)
    )
    with pytest.raises(VitqError, match="threads"):
        tvm_vitq.load(toy, threads=0)


def test_labels_must_fit(tmp_path: Path) -> None:
    from tvm_vitq.artifact.metadata import analyse, describe

    integer = toy_integer()
    with pytest.raises(VitqError, match="2 labels"):
        describe(None, integer, {}, analyse(integer)[0], ["a", "b"])
