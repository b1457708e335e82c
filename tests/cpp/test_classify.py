"""``vitq_classify`` sees the pixels that Python sees, and says what Python says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

import tvm_vitq
from tests.artifact.toy import MODEL, toy_artifact
from tvm_vitq.evaluate import best_classes, model_input
from tvm_vitq.preprocess import check_preprocess, normalize_pixels, preprocess_image

PICTURES = ("rgb.png", "rgba.png", "palette.png", "grey.png", "black_white.png", "rgb.jpg",
            "grey.jpg", "cmyk.jpg", "progressive.jpg", "tall.jpg", "tiny.png")  # fmt: skip


def _save(folder: Path) -> list[Path]:
    """Smooth pictures with edges in every form that the formats have."""
    y, x = np.mgrid[:90, :130]
    waves = [128 + 90 * np.sin(x / (5 + i) + y / (9 - i)) for i in range(3)]
    rgb = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    rgb.paste((255, 0, 0), (20, 10, 60, 40))
    rgb.save(folder / "rgb.png")
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(waves[0].astype(np.uint8)))
    rgba.save(folder / "rgba.png")
    rgb.quantize(32).save(folder / "palette.png", transparency=3)
    rgb.convert("L").save(folder / "grey.png")
    rgb.convert("1").save(folder / "black_white.png")
    rgb.save(folder / "rgb.jpg", quality=90)
    rgb.convert("L").save(folder / "grey.jpg")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.save(folder / "progressive.jpg", progressive=True, subsampling="4:4:4")
    rgb.transpose(Image.Transpose.ROTATE_90).save(folder / "tall.jpg", subsampling="4:2:2")
    rgb.crop((0, 0, 3, 2)).save(folder / "tiny.png")
    return [folder / name for name in PICTURES]


def _classify(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(folder / "vitq_classify"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _expected(path: Path, images: list[Path], top: int) -> list[dict[str, Any]]:
    artifact = tvm_vitq.load(path)
    logits = artifact.run(model_input(artifact, images)[0])
    return [{"image": str(image), "top": best_classes(row, top, artifact.labels)}
            for image, row in zip(images, logits, strict=True)]  # fmt: skip


@pytest.mark.parametrize("kind", ["toy", "toy_uint8"])
def test_the_same_classes_as_python(
    release: Path, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path, images = request.getfixturevalue(kind), _save(tmp_path)
    done = _classify(release, path, "--json", "--verify", "--threads", 1, "--top", 4, *images)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] is True and found["logits_different"] == 0
    for ours, theirs in zip(found["images"], _expected(path, images, 4), strict=True):
        chances = [row.pop("probability") for rows in (ours, theirs) for row in rows["top"]]
        assert ours == theirs  # every logit, bit for bit
        assert np.allclose(chances[:4], chances[4:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming",
                                           "lanczos"])  # fmt: skip
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_the_same_pixels_as_pillow(release: Path, interpolation: str, mode: str) -> None:
    rng = np.random.default_rng(0)
    for case in range(6):
        channels = (3, 1)[case % 2]
        spec = check_preprocess({
            "input_size": [channels, *(int(v) for v in rng.integers(5, 60, 2))],
            "crop_pct": float(rng.uniform(0.5, 1.1)), "crop_mode": mode,
            "interpolation": interpolation, "mean": [0.3] * channels, "std": [0.2] * channels,
            "resize": [None, 37, [41, 23]][case // 2],
        })  # fmt: skip
        size = rng.integers(3, 90, 2)
        raw = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        if int(PIL.__version__.split(".")[0]) < 13 and size[0] > size[1]:
            continue  # it resized the columns of tall images first
        expected = preprocess_image(Image.fromarray(raw), spec, "uint8")
        done = subprocess.run([release / "vitq_program", "pixels", json.dumps(spec),
                               *map(str, size), "3"], input=raw.tobytes(), capture_output=True,
                              check=True)  # fmt: skip
        pixels, floats = done.stdout[: expected.size], done.stdout[expected.size :]
        assert pixels == expected.tobytes(), spec
        assert floats == normalize_pixels(expected, spec).tobytes(), spec


@pytest.mark.parametrize("build", ["release", "sanitized"])
def test_what_is_wrong_is_one_line(
    build: str, toy: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(build)
    images = {path.name: path for path in _save(tmp_path)}
    for name in ("rgb.jpg", "rgb.png"):
        (tmp_path / f"cut_{name}").write_bytes(images[name].read_bytes()[:1500])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    cases = {
        "usage:": [],
        "--top takes a number": [toy, "--top", "0"],
        "--threads takes a number from 1 to": [toy, "--threads", ""],
        "1025 threads are too many: this machine has": [toy, "--threads", "1025"],
        "100000 threads are too many": [toy, "--threads", "100000", "--verify"],
        "can run here; give an IMAGE or --verify": [toy],
        f"cannot read {tmp_path}: Is a directory": [toy, tmp_path],
        "unknown option --colour": [toy, "--colour"],
        "No such file": [toy, "absent.png"],
        "neither JPEG nor PNG": [toy, toy],
        "cut_rgb.jpg as an image": [toy, tmp_path / "cut_rgb.jpg"],
        "the file is truncated": [toy, tmp_path / "cut_rgb.png"],
        "16-bit grey": [toy, tmp_path / "deep.png"],
        "cannot read absent.so": ["absent.so", images["rgb.png"]],
    }
    for words, arguments in cases.items():
        done = _classify(folder, *arguments)
        assert done.returncode == 2 and done.stdout == "", (arguments, done.stderr)
        assert words in done.stderr and done.stderr.startswith("error: "), (words, done.stderr)
        assert done.stderr.count("\n") == 1


def test_help(release: Path) -> None:
    done = _classify(release, "absent.so", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: vitq_classify MODEL.so")


@pytest.mark.parametrize("name", ["rgb.jpg", "progressive.jpg", "cmyk.jpg", "rgb.png",
                                  "palette.png"])  # fmt: skip
def test_damaged_images_do_no_harm(sanitized: Path, toy: Path, tmp_path: Path, name: str) -> None:
    """Cut anywhere or with bytes changed: a picture or one line, and no finding of a sanitizer."""
    _save(tmp_path)
    whole, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    for case in range(24):
        data = bytearray(whole)
        if case % 2:
            del data[int(rng.integers(3, len(whole))) :]
        else:
            for place in rng.integers(8, len(whole), 8):
                data[place] = int(rng.integers(256))
        (tmp_path / "damaged").write_bytes(data)
        done = _classify(sanitized, toy, tmp_path / "damaged")
        assert done.returncode in (0, 2), done.stderr
        assert done.stderr.count("\n") == (done.returncode == 2), done.stderr


def test_golden_vectors_that_are_not_met(release: Path, tmp_path: Path) -> None:
    path = toy_artifact(tmp_path / "wrong.so", wrong=True)
    done = _classify(release, path, "--verify")
    assert done.returncode == 1 and "NOT equal" in done.stdout and "1 different" in done.stdout


def test_an_artefact_without_preprocessing(release: Path, tmp_path: Path) -> None:
    path = toy_artifact(tmp_path / "bare.so", change={"preprocess": None, "labels": None})
    image = _save(tmp_path)[0]
    done = _classify(release, path, image)
    assert done.returncode == 2 and "no preprocessing" in done.stderr
    assert _classify(release, path, "--verify").returncode == 0
    assert MODEL["preprocess"] is not None
