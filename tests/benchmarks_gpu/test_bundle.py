"""A bundle for this machine's processor: made, packed, unpacked, checked by the runner alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import bundle as bundles
from benchmarks.gpu.__main__ import main as command
from benchmarks.gpu.networks import Network, pooled_weights, prepare
from benchmarks.gpu.rebatch import batch_of, rebatch
from benchmarks.gpu.runner.tasks import digest
from relay_passes.errors import VitqError
from relay_passes.pipeline import lower
from relay_passes.split_boundary import SplitBoundary
from tvm_vitq.compiler import reference_logits
from tvm_vitq.saved import load_quantized

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2,
       "num_classes": 5}  # fmt: skip
SWIN = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2],
        "window_size": 4, "num_classes": 5}  # fmt: skip


def network(family: str) -> Network:
    made, arguments = {
        "vit": ("timm.models.vision_transformer:VisionTransformer", VIT),
        "swin": ("timm.models.swin_transformer:SwinTransformer", SWIN),
    }[family]  # fmt: skip
    preprocess = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    return Network(f"{made}?{json.dumps(arguments)}", {"family": family, **arguments},
                   preprocess=preprocess)  # fmt: skip


@pytest.fixture(scope="module", params=["vit", "swin"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("quantized") / "mini.vitq"
    prepare(network(request.param), 8, path)
    return load_quantized(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the unpacked archive of a bundle with one small network."""
    place = tmp_path_factory.mktemp("bundle")
    path = bundles.make(place / "made", {"mini": network("vit")}, [2], "native", inputs=9,
                        say=lambda _: None)  # fmt: skip
    with tarfile.open(path) as tar:
        tar.extractall(place / "unpacked", filter="data")
    return place / "unpacked" / "made"


def logits(module, codes: np.ndarray) -> np.ndarray:
    import tvm

    split = tvm.transform.Sequential([SplitBoundary()])(lower(module))
    return reference_logits(split, codes, batch_of(module))


def test_rebatching_changes_no_logit(quantized) -> None:
    import tvm

    codes = np.random.default_rng(0).integers(-127, 128, (3, 3, 16, 16)).astype(np.int8)
    one = rebatch(quantized, 1)
    assert json.loads(str(one.attrs["vitq.model"]))["input"]["shape"][0] == batch_of(one) == 1
    wanted = logits(one, codes)
    assert len(np.unique(wanted)) > 5
    np.testing.assert_array_equal(logits(rebatch(quantized, 3), codes), wanted)
    tvm.ir.assert_structural_equal(
        rebatch(one, 8)["main"].without_attr("global_symbol"),
        quantized["main"].without_attr("global_symbol"),
    )


def test_pooled_weights_differ_and_keep_the_structure(quantized) -> None:
    from relay_passes.dialect.registry import constant_of

    def weights(module) -> list[np.ndarray]:
        calls = (b.value for block in module["main"].body.blocks for b in block.bindings)
        calls = (call for call in calls if hasattr(call, "op"))
        found = [constant_of(c.args[0]) for c in calls if c.op.name == "relax.dequantize"]
        return [w for w in found if w is not None and w.dtype == np.int8 and w.ndim == 2]

    again = pooled_weights(quantized, tiles=40)
    before, after = weights(quantized), weights(again)
    assert [w.shape for w in before] == [w.shape for w in after]
    assert len({w.tobytes() for w in after}) == len(after) >= 6
    assert all(abs(w.astype(int)).max() <= 127 for w in after)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "runner", *arguments], cwd=folder, text=True,
                          capture_output=True, check=False)  # fmt: skip


def script(folder: Path, code: str) -> Any:
    """Run code where the bundle is, apart: its libraries are a second TVM. Return its last line."""
    begin = """
import json
from pathlib import Path
import numpy as np
from runner.artifact import Artifact
from runner.ffi import Runtime, RuntimeFailure
from runner.results import Results
from runner.tasks import Bundle, Task, check, perform
bundle, runtime = Bundle(Path()), Runtime(Path("lib"), "cpu")
"""
    done = subprocess.run([sys.executable, "-c", begin + code], cwd=folder, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_the_runner_finds(folder: Path, tmp_path: Path) -> None:
    code = """
results = Results.open(Path({out!r}), {{"name": "x"}}, bundle.identity())
said = []
for stage in ("check", "kernels", "quick"):
    perform(Task(stage, "mini", 2), bundle, results, "cpu", said.append)
results.save()
print(json.dumps(said))
"""
    said = script(folder, code.format(out=str(tmp_path / "r.json")))
    assert said[0] == "0 of 105 logits different"
    document = json.loads((tmp_path / "r.json").read_text())
    found = document["checks"]["mini"]["2"]
    assert found["equal"] and found["golden"] == {"inputs": 2, "logits": 10, "different": 0}
    assert found["derived"]["logits"] == 45 and found["repeated"]["inputs"] == 10
    assert document["kernels"]["mini"]["2"]["launches"] > 8
    runners = document["times"]["mini"]["2"]["runners"]
    assert runners["ours"]["ratio"] == 1.0 and runners["torch fp32"]["median_us"] > 0


@contextmanager
def changed(folder: Path, name: str, data: bytes | None, known: bool = True) -> Iterator[None]:
    """Replace a file of a bundle (None: remove it), with its digest if ``known``."""
    path, manifest = folder / name, folder / "bundle.json"
    before = path.read_bytes(), manifest.read_text()
    try:
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        if known:
            document = json.loads(before[1])
            document["sha256"][name] = digest(path)
            manifest.write_text(json.dumps(document))
        yield
    finally:
        path.write_bytes(before[0])
        manifest.write_text(before[1])


def test_a_wrong_logit_is_found(folder: Path, tmp_path: Path) -> None:
    checks = folder / "checks" / "mini.npz"
    with np.load(checks) as file:
        wrong = file["logits"]
    wrong[7, 2] += 1
    np.savez_compressed(tmp_path / "wrong.npz", logits=wrong)
    with changed(folder, "checks/mini.npz", (tmp_path / "wrong.npz").read_bytes()):
        done = run(folder, "check")
    assert done.returncode == 1 and "derived 1 of 45 different" in done.stdout


@pytest.mark.parametrize("name", ["checks/mini.npz", "artifacts/mini_b2.so",
                                  "lib/libtvm_runtime.so"])
def test_changed_files_are_refused(folder: Path, name: str) -> None:
    """Before anything runs: a changed artefact would look like wrong kernels."""
    right = (folder / name).read_bytes()
    for wrong in (right[:100], right[:70] + bytes([right[70] ^ 1]) + right[71:], None):
        with changed(folder, name, wrong, known=False):
            done = run(folder, "check")
        what = "missing" if wrong is None else "damaged"
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"{name} is {what}: unpack or copy the bundle again" in done.stderr


def test_what_could_not_be_compared_is_no_success(folder: Path, tmp_path: Path) -> None:
    """Nor is it one if the same command goes on."""
    with changed(folder, "checks/mini.npz", b"no archive"):
        for _ in range(2):
            done = run(folder, "--stages", "check", "--out", str(tmp_path / "r.json"))
            assert done.returncode == 1 and "check/mini/b2" in done.stdout


def test_without_numpy(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-S", "-m", "runner", "check"], cwd=folder, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: the runner needs numpy: pip install numpy\n"


def test_command_line(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "r.json")
    done = run(folder, "--stages", "check", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "[1/1] check/mini/b2\n    0 of 105 logits different" in done.stdout
    assert "not shown" in done.stdout  # a processor meets no bar of a GPU
    again = run(folder, "--stages", "check", "--out", out)
    assert again.returncode == 0 and "[1/1]" not in again.stdout
    wrong = run(folder, "--models", "none")
    assert wrong.returncode == 2 and wrong.stderr == "error: no model none; there are mini\n"


def test_runtime_says_what_is_wrong(folder: Path) -> None:
    said = script(folder, """
artifact = Artifact(bundle.artifact("mini", 2), runtime)
said = []
for attempt in (
    lambda: runtime.function("nothing"),
    lambda: artifact.run_codes(np.zeros((2, 3, 16, 16), np.float32)),
    lambda: runtime.tensor(np.zeros(3, np.float32)).fill(np.zeros(4, np.float32)),
    lambda: Runtime(Path("nowhere"), "cpu"),
):
    try:
        attempt()
    except RuntimeFailure as why:
        said.append(str(why))
print(json.dumps(said))
""")  # fmt: skip
    for text, part in zip(said, ("no function nothing", "fn=main_codes", "does not fit",
                                 "libtvm_ffi"), strict=True):  # fmt: skip
        assert part in text


def test_archive_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "noise").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(VitqError, match="MiB, more than 0: leave out models"):
        bundles.archive(tmp_path / "made", limit=1000)
    assert bundles.archive(tmp_path / "made").stat().st_size > 5000


@pytest.mark.parametrize(("options", "said"), [
    (["--arch", "sm_61"], "unknown CUDA target 'sm_61'"),
    (["--batch", "8", "0"], "--batch 0: it must be at least 1"),
    (["--inputs", "0"], "--inputs 0: it must be at least 1"),
    (["--models", "resnet"], "no model resnet; there are deit_tiny"),
    (["--verify-with", "qemu-aarch64"], "'qemu-aarch64' cannot replay this target's code"),
])  # fmt: skip
def test_refused_before_any_work(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["bundle", "-o", str(tmp_path / "made"), *options]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {said}") and told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_folder_in_use(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VitqError, match="is there already"):
        bundles.make(folder, {}, [1], "native")
    (tmp_path / "made.tar.xz").touch()
    with pytest.raises(VitqError, match=r"made.tar.xz is there already"):
        bundles.make(tmp_path / "made", {}, [1], "native")
    with pytest.raises(VitqError, match="cannot write /proc/made: "):
        bundles.make(Path("/proc/made"), {}, [1], "native")


def test_a_failed_bundle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise VitqError("it fails")

    monkeypatch.setattr(bundles, "finish", fail)
    with pytest.raises(VitqError, match="it fails"):
        bundles.make(tmp_path / "made", {}, [1], "native")
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_is_one_line() -> None:
    with pytest.raises(VitqError, match="is there enough memory"):
        bundles.apart(os.abort)
    assert bundles.apart(abs, -1) == 1
