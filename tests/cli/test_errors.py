"""Every wrong input is one line on standard error, exit status 2, nothing on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.artifact.toy import toy_quantized
from tests.cli.conftest import Cli
from tvm_vitq.saved import save_quantized

ROOT = Path(__file__).resolve().parents[2]
Refused = Callable[..., str]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("polish",),
        ("compile",),
        ("compile", "m"),
        ("compile", "m", "-o", "x.so", "--nonlinear", "cubic"),
        ("compile", "m", "-o", "x.so", "--batch", "0"),
        ("compile", "m", "-o", "x.so", "--samples", "many"),
        ("compile", "m", "-o", "x.so", "--fast"),
        ("run", "a.so"),
        ("eval", "a.so"),
        ("verify",),
        ("verify", "a.so", "--threads", "0"),
    ],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_usage(refused: Refused, words: tuple[str, ...]) -> None:
    refused(*words)


@pytest.mark.parametrize("verb", ["run", "eval", "inspect", "verify"])
@pytest.mark.parametrize("kind", ["absent", "text", "truncated"])
def test_bad_artefact(
    refused: Refused, toy: Path, pictures: Path, tmp_path: Path, verb: str, kind: str
) -> None:
    path = tmp_path / "bad.so"
    if kind == "text":
        path.write_text("not a library")
    elif kind == "truncated":
        path.write_bytes(toy.read_bytes()[:-100])
    more = {"run": [pictures / "img" / "0.png"], "eval": ["--images", pictures]}.get(verb, [])
    assert str(path) in refused(verb, path, *more, "--json")


def test_bad_images(refused: Refused, toy: Path, pictures: Path, tmp_path: Path) -> None:
    good = pictures / "img" / "0.png"
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:100])
    assert "cut.png" in refused("run", toy, good, cut)
    assert "no such image" in refused("run", toy, tmp_path / "absent.png")
    assert "no such folder" in refused("eval", toy, "--images", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no image" in refused("eval", toy, "--images", tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "header"),
        ("image,label\n", "header"),
        ("name,class\n0.png,1\n", "header"),
        ("image,label\nabsent.png,1\n", "line 2"),
        ("image,label\n0.png,1\n1.png,5\n", "line 3"),
        ("image,label\n0.png,-1\n", "line 2"),
        ("image,label\n0.png,cat\n", "line 2"),
        ("image,label\n0.png\n", "line 2"),
        (None, "cannot read"),
    ],
)
def test_bad_labels(
    refused: Refused, toy: Path, pictures: Path, tmp_path: Path, text: str | None, words: str
) -> None:
    labels = tmp_path / "labels.csv"
    if text is not None:
        labels.write_text(text)
    assert words in refused("eval", toy, "--images", pictures, "--labels", labels)


def test_bad_float_model(refused: Refused, toy: Path, pictures: Path, tmp_path: Path) -> None:
    words = ("eval", toy, "--images", pictures)
    absent = refused(*words, "--against-float", tmp_path / "absent.safetensors")
    assert "no such file" in absent
    weights = tmp_path / "w.safetensors"
    weights.touch()
    assert "no checkpoint" in refused(*words, "--against-float", weights)
    assert "--against-float" in refused(*words, "--max-drop", 1)


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    path = tmp_path / "calib.npy"
    np.save(path, np.zeros((2, 3, 8, 8), np.float32))
    return path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "z80"], "unknown target"),
        (["--mean", "a,b,c"], "--mean"),
        (["--std", "1,2"], "--std"),
        (["--input-size", "1,2,3,4"], "--input-size"),
        (["--resize", "big"], "--resize"),
        (["--labels", "absent.txt"], "absent.txt"),
        (["--recipe", "absent"], "--recipe"),
        (["--checkpoint", "absent.pth"], "absent.pth"),
        (["--save-quantized", "/absent/q.json"], "/absent"),
        (["--crop-mode", "round"], "crop_mode"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_compile_flags(
    refused: Refused, calib: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    """All are found out before the model is touched, and nothing is left behind."""
    before = sorted(tmp_path.iterdir())
    model = "tvm_vitq.demo:digits_vit"
    line = refused("compile", model, "--calib", calib, "-o", tmp_path / "o.so", *flags)
    assert words in line
    assert sorted(tmp_path.iterdir()) == before


def test_compile_output_and_calibration(refused: Refused, calib: Path, tmp_path: Path) -> None:
    words = ("compile", "tvm_vitq.demo:digits_vit")
    assert "no folder" in refused(*words, "--calib", calib, "-o", tmp_path / "no" / "o.so")
    assert "is a folder" in refused(*words, "--calib", calib, "-o", tmp_path)
    assert "--calib is missing" in refused(*words, "-o", tmp_path / "o.so")
    assert "there is no" in refused(*words, "--calib", tmp_path / "x", "-o", tmp_path / "o.so")


def test_unknown_models(refused: Refused, calib: Path, tmp_path: Path) -> None:
    for model in ("no_such_model", "no.package:factory", "absent.onnx", "absent.pt2"):
        line = refused("compile", model, "--calib", calib, "-o", tmp_path / "o.so")
        assert model.split(":")[0] in line


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".json"])
def test_damaged_model_files(refused: Refused, calib: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text('{"nodes": [1, 2' if suffix == ".json" else "not a model")
    assert "model" + suffix in refused("compile", path, "--calib", calib, "-o", tmp_path / "o.so")


def test_a_saved_module_takes_no_quantization_options(refused: Refused, tmp_path: Path) -> None:
    saved = save_quantized(toy_quantized(), tmp_path / "q.json")
    line = refused("compile", saved, "-o", tmp_path / "o.so", "--nonlinear", "shift", "--mean", 0)
    assert "--nonlinear" in line and "--mean" in line


def test_a_module_that_is_not_quantized(refused: Refused, tmp_path: Path) -> None:
    saved = save_quantized(toy_quantized(spoil="logits"), tmp_path / "q.json")
    assert "not quantized" in refused("compile", saved, "-o", tmp_path / "o.so")
    assert not (tmp_path / "o.so").exists()


def test_wrong_labels_count(refused: Refused, tmp_path: Path) -> None:
    saved = save_quantized(toy_quantized(), tmp_path / "q.json")
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    assert "2 labels" in refused("compile", saved, "-o", tmp_path / "o.so", "--labels", names)


def test_the_uint8_form_of_a_saved_module(refused: Refused, tmp_path: Path) -> None:
    saved = save_quantized(toy_quantized(), tmp_path / "q.json")
    line = refused("compile", saved, "-o", tmp_path / "o.so", "--input", "uint8")
    assert "compile the model itself with --input" in line and "--save-quantized" in line


@pytest.mark.parametrize("model", ["nope.vitq", "absent/vit_tiny", "weights.safetensors"])
def test_a_model_that_is_no_file(refused: Refused, tmp_path: Path, model: str) -> None:
    """A path is looked for before anything else is asked for."""
    line = refused("compile", model, "-o", tmp_path / "o.so")
    assert f"there is no file {model}" in line
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"\0")
    assert "is no model: give a timm name" in refused("compile", weights, "-o", tmp_path / "o.so")


def test_what_is_known_before_tvm(tmp_path: Path) -> None:
    """An emulator or a cross compiler that is absent is said without an import of TVM."""
    (tmp_path / "tvm.py").write_text("raise RuntimeError('TVM was imported')")
    words = ["compile", "a:b", "--calib", str(tmp_path), "-o", str(tmp_path / "o.so")]
    for more, why in ((["--verify-with", "qemu-nothing"], "no emulator qemu-nothing"),
                      (["--target", "aarch64+dotprod"], "no compiler to link for aarch64")):
        done = subprocess.run(
            [sys.executable, "-m", "tvm_vitq.cli", *words, *more], cwd=ROOT, text=True,
            env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": str(tmp_path)}, capture_output=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 2 and why in done.stderr, done.stderr


def test_usage_errors_name_the_help(refused: Refused, cli: Cli) -> None:
    assert "'tvm-vitq verify --help' lists its options" in refused("verify", "a.so", "--threads", 0)
    assert "'tvm-vitq --help' lists verbs" in refused("polish")
    done = cli("--version")
    assert done.code == 0 and done.out.startswith("tvm-vitq ") and done.out.count("\n") == 1


def test_more_threads_than_any_use(refused: Refused, toy: Path, pictures: Path) -> None:
    image = pictures / "img" / "0.png"
    for words in (("verify", toy), ("run", toy, image), ("eval", toy, "--images", pictures),
                  ("tune", "vit", "--records", pictures, "--trials", 1)):
        line = refused(*words, "--threads", 100_000)
        assert f"this machine has {os.cpu_count()} CPUs" in line


def test_bad_recipe_files(refused: Refused, calib: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    words = ("compile", "tvm_vitq.demo:digits_vit", "--calib", calib, "-o", tmp_path / "o.so")
    for text in ("{", "[1]", json.dumps({"colour": "red"}), json.dumps({"observer": "none"})):
        recipe.write_text(text)
        refused(*words, "--recipe", recipe)


def test_debug_shows_the_traceback(cli: Cli, tmp_path: Path) -> None:
    done = cli("verify", tmp_path / "absent.so", "--debug")
    assert done.code == 2 and "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("error: ")


def test_a_defect_is_one_line_too(
    refused: Refused, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvm_vitq.artifact.load import Artifact

    def broken(_self: Artifact) -> None:
        raise RuntimeError("first\nlast line")

    monkeypatch.setattr(Artifact, "verify", broken)
    line = refused("verify", toy)
    assert "RuntimeError: last line" in line and "--debug" in line


def test_in_another_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tvm_vitq.cli", "verify", str(tmp_path / "absent.so"), "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_images_of_another_kind(refused: Refused, toy: Path, tmp_path: Path) -> None:
    """A float image with NaN cannot become pixels silently."""
    path = tmp_path / "nan.tiff"
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(path)
    assert "nan.tiff" in refused("run", toy, path)


def test_a_drop_needs_labels(refused: Refused, toy: Path, pictures: Path) -> None:
    (pictures / "labels.csv").unlink()
    words = ("eval", toy, "--images", pictures, "--against-float", "w.safetensors")
    assert "needs --labels" in refused(*words, "--max-drop", "0.5")


def test_output_and_quantized_file_differ(refused: Refused, calib: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.so"
    words = ("compile", "vit_tiny_patch16_224", "--calib", calib, "-o", out)
    assert "the same file" in refused(*words, "--save-quantized", out)
    (tmp_path / "dump").write_text("")
    assert "it is a file" in refused(*words, "--dump-ir", tmp_path / "dump")


def test_no_cross_compiler(
    refused: Refused, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvm_vitq.artifact.toolchain.shutil.which", lambda _name: None)
    words = ("compile", "vit_tiny_patch16_224", "--calib", calib, "-o", tmp_path / "o.so")
    assert "apt-get install g++-aarch64-linux-gnu" in refused(*words, "--target", "aarch64")


def test_no_emulator(refused: Refused, calib: Path, tmp_path: Path) -> None:
    words = ("compile", "vit_tiny_patch16_224", "--calib", calib, "-o", tmp_path / "o.so")
    assert "apt-get install qemu-user" in refused(*words, "--verify-with", "qemu-nothing -cpu max")
    other = tmp_path / "qemu-riscv"
    other.symlink_to("/bin/true")
    line = refused(*words, "--verify-with", other)
    assert "code for native" in line and "leave out --verify-with" in line
