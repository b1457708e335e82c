"""Whole models for NVIDIA GPUs, on a machine without one: built, counted, replayed by emulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

import tvm_vitq
from relay_passes.errors import VitqError
from relay_passes.pipeline import build_passes, lower
from schedules.cuda.nvcc import ptx
from schedules.isa import CUDA, resolve_target
from tests.artifact.toy import toy_quantized
from tests.cli.conftest import Cli, cli, refused
from tests.helpers.cuda import needs_nvcc
from tests.helpers.fake_cuda import replay
from tests.integration.models import random_model
from tvm_vitq.artifact import gpu
from tvm_vitq.artifact.foreign import ForeignArtifact
from tvm_vitq.artifact.gpu import architecture_here
from tvm_vitq.artifact.gpu_kernels import Launches, check_ptx, float_mnemonics
from tvm_vitq.artifact.load import Artifact
from tvm_vitq.saved import save_quantized

assert cli and refused  # fixtures
no_gpu = pytest.mark.skipif(bool(architecture_here()), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model for sm_80, compared with the reference by emulation when it was compiled."""
    from tvm_vitq import demo

    model = tvm_vitq.load_model("tvm_vitq.demo:digits_vit")
    calibration = demo.normalise(demo.pixels(demo.digits("calib")[0]))
    quantized = tvm_vitq.quantize(model, calibration)
    path = tmp_path_factory.mktemp("gpu") / "digits.so"
    made = tvm_vitq.compile(quantized, "cuda", path, verify_with="emulator")
    report = made.verify()
    assert report["equal"] is True and report["logits_different"] == 0
    assert report["replayed_with"] == "emulator" and report["vectors"] == 2
    return path


@needs_nvcc
def test_digits(digits: Path, cli: Cli) -> None:
    report = Artifact(digits, describe_only=True).inspect()
    assert report["target"]["arch"] == "sm_80" and report["float_instructions"] == 0
    assert report["gpu"]["launches"]["typical"] == 7
    assert set(report["gpu"]["float_boundary"]) == {"vitq_quantize_kernel",
                                                    "vitq_dequantize_kernel"}
    kernels = list(report["kernels"].values())
    assert all(kernel["local_bytes"] == 0 and kernel["registers"] > 0 for kernel in kernels)
    shapes = [kernel["shape"] for kernel in kernels if "linear" in kernel["op"]]
    assert [65, 192, 64] in shapes and [65, 64, 256] in shapes  # Q, K and V together; fc2
    assert all(kernel["macs"] == np.prod(kernel["shape"]) for kernel in kernels if "macs" in kernel)
    assert {kernel.get("products") for kernel in kernels} == {None, "mma.sync", "dp4a"}
    shown = cli("inspect", digits).out
    assert "mma.sync in" in shown
    assert "launches of" in shown and "the machine code had not run on a GPU" in shown
    assert "not shown: the machine code has not run" in cli("verify", digits, "--with",
                                                            "emulator").out


@needs_nvcc
def test_a_changed_text_of_kernels_is_not_replayed(
    digits: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    data = bytearray(digits.read_bytes())
    held = Artifact(digits, describe_only=True)._stored("vitq_kernels").tobytes()
    data[data.index(held) + len(held) // 2] ^= 1
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(data)
    for words in (["verify", damaged, "--with", "emulator"], ["inspect", damaged]):
        line = refused(*words)
        assert "is damaged" in line and line.count("error:") == 1


@needs_nvcc
def test_tvm_runs_it(digits: Path, tmp_path: Path) -> None:
    """TVM's own CUDA runtime loads, allocates, records and replays; only the driver is a fake."""
    found = replay(digits, tmp_path)
    assert found["problems"] == [""]
    recorded = found["runs"][0]["counts"][1]
    assert recorded > 20
    # Each run has two vectors: the recorded launches are made once, then two outside of the graph.
    for i, run in enumerate(found["runs"]):
        assert run["different"] == 0
        assert run["counts"] == [recorded + 4 * (i + 1), recorded, 2 * i + 1, 0]
    assert found["logits"][0] == found["logits"][1]


@needs_nvcc
def test_launches_overlap_on_hopper(tmp_path: Path) -> None:
    """By an attribute of each launch; every kernel waits for those before it."""
    path = tmp_path / "toy.so"
    made = tvm_vitq.compile(toy_quantized(), "sm_90a", path, verify_with="emulator")
    assert made.verify()["equal"] is True
    found = replay(path, tmp_path)
    assert found["problems"] == [""] and [run["different"] for run in found["runs"]] == [0] * 3
    launched, recorded, _, overlapping = found["runs"][-1]["counts"]
    assert overlapping == launched + recorded
    source = Artifact(path, describe_only=True)._compressed("vitq_kernels")["source"]
    kernels = ptx(source, "sm_90a")
    assert kernels and all("griddepcontrol.wait" in text and "ld.global.nc" not in text
                           for text in kernels.values())


@needs_nvcc
@no_gpu
def test_without_a_gpu(digits: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused("verify", digits)
    assert "for an NVIDIA GPU (sm_80), and TVM finds none" in line and "--with emulator" in line
    made = tvm_vitq.compile(toy_quantized(), "sm_90", tmp_path / "toy.so")
    assert isinstance(made, ForeignArtifact) and made.verify()["equal"] is None
    assert made.metadata["golden"]["replayed_with"] is None
    with pytest.raises(VitqError, match="cannot run here"):
        made.run(np.zeros((1, 3, 8, 8), "float32"))


def test_what_tvm_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(gpu, "architecture_here", lambda: "")
    monkeypatch.setattr("ctypes.CDLL", missing)
    reason = gpu.reason_not_here({"arch": "sm_90"})
    assert reason.endswith("TVM finds none on this machine (without libcudart.so.13)")
    monkeypatch.setattr(gpu, "architecture_here", lambda: "sm_86")
    assert "for sm_90, and this machine's GPU is sm_86" in gpu.reason_not_here({"arch": "sm_90"})
    monkeypatch.setattr(gpu, "architecture_here", lambda: "sm_100")
    assert gpu.reason_not_here({"arch": "sm_90a"}).endswith(
        "for sm_90a alone, and this machine's GPU is sm_100: compile for sm_90")
    for arch, here in (("sm_90", "sm_100"), ("sm_90a", "sm_90")):
        monkeypatch.setattr(gpu, "architecture_here", lambda here=here: here)
        assert gpu.reason_not_here({"arch": arch}) == ""


@needs_nvcc
def test_emulators_are_for_their_targets(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    saved = save_quantized(toy_quantized(), tmp_path / "q.json")
    out = tmp_path / "toy.so"
    for target, emulator in (("native", "emulator"), ("sm_80", "qemu-aarch64")):
        line = refused("compile", saved, "-o", out, "--target", target, "--verify-with", emulator)
        assert "cannot replay this target's code" in line


def test_one_graph_and_no_allocation_in_a_run() -> None:
    """What is not recorded: the input's and the output's kernels, and the result's own storage."""
    with resolve_target("sm_80"):
        mod = tvm.transform.Sequential(build_passes(CUDA))(lower(_vit()))
    recorded = [gvar for gvar in mod.get_global_vars() if "capture" in gvar.name_hint]
    assert [gvar.name_hint for gvar in recorded] == ["main_codes_cuda_graph_capture"]

    def called(name: str) -> list[str]:
        return [b.value.op.name_hint if isinstance(b.value.op, tvm.ir.GlobalVar)
                else str(getattr(b.value.op, "name", "")) for part in mod[name].body.blocks
                for b in part.bindings if isinstance(b.value, relax.Call)]

    inside = called("main_codes_cuda_graph_capture")
    assert "relax.vm.alloc_storage" not in inside
    outside = called("main_codes")
    kernels = [name for name in outside if isinstance(name, str) and name.startswith("vitq")]
    assert len(kernels) == 2  # the patch embedding reads the input, the head writes the result
    assert outside.count("relax.vm.alloc_storage") == 1
    assert len([name for name in inside if name.startswith("vitq")]) > 10


def _vit() -> tvm.IRModule:
    from tests.helpers.tiny import tiny_vit_module

    images = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype("float32")
    return tvm_vitq.quantize(tiny_vit_module(pool="avg"), images)


@pytest.mark.parametrize("key", ["vit_small", "swin_tiny"])
def test_launches_of_a_block(key: str) -> None:
    """LayerNorm, Q K V, attention, projection, LayerNorm, fc1 with GELU, fc2.

    The last block of a model with a class token reads the rows of the others for keys and values
    only: its query is of one row, a launch more.
    """
    model = tvm_vitq.load_model(random_model(key, reduced=True))
    shape = [int(extent) for extent in model["main"].params[0].ty.shape.values]
    images = np.random.default_rng(0).standard_normal([2, *shape[1:]]).astype("float32")
    counts = _launches(tvm_vitq.quantize(model, images))
    assert counts["blocks"] >= 2
    assert counts["per_block"] == (7 if key == "swin_tiny" else 8)
    assert counts["typical"] == 7


def _launches(quantized: tvm.IRModule) -> dict[str, Any]:
    counts = Launches()
    passes = build_passes(CUDA)
    names = [one.info.name for one in passes]
    with resolve_target("sm_80"), tvm.transform.PassContext(instruments=[counts]):
        upto = names.index("vitq.ApplySchedules")
        counts.run_before_pass(tvm.transform.Sequential(passes[:upto])(lower(quantized)),
                               passes[upto].info)
    return counts.counts


def test_float_mnemonics() -> None:
    text = "  add.s32 %r1, %r2, %r3;\n@%p1 fma.rn.f32 %f1, %f2, %f3, %f4;\n  ld.global.v2.f64 {a};"
    assert float_mnemonics(text) == {"fma.rn.f32": 1, "ld.global.v2.f64": 1}
    assert check_ptx({"vitq_quantize_kernel": text, "vitq_add1_kernel": "add.s32 a, b, c;"}) == {
        "vitq_quantize_kernel": {"fma.rn.f32": 1, "ld.global.v2.f64": 1}}
    with pytest.raises(VitqError, match=r"vitq_add1_kernel: has fma\.rn\.f32"):
        check_ptx({"vitq_add1_kernel": text})
