"""An artefact on a board gives what it gives here, bit for bit, and leaves nothing there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import tvm_vitq
from relay_passes.errors import VitqError
from schedules.host import host_architecture
from tests.artifact.toy import toy_artifact, toy_quantized
from tests.helpers.arm import needs_compiler
from tests.helpers.rpc import Running
from tests.remote.conftest import KEY
from tvm_vitq.remote import Board, RemoteError, connect
from tvm_vitq.remote.artifact import RemoteArtifact

on_x86 = pytest.mark.skipif(host_architecture() != "x86_64", reason="AArch64 isn't foreign here")


@pytest.mark.parametrize("kind", ["toy", "toy_uint8"])
def test_the_same_as_here(server: Running, kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    here = tvm_vitq.load(path)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (5, *here.input_shape)).astype(here.input_dtype)
    if here.input_dtype == "float32":
        images = images / np.float32(64) - 2
    codes = here.golden[0]
    with connect(server.address, KEY) as session:
        there = RemoteArtifact(path, session, threads=1)
        assert there.metadata == here.metadata and there.bounds == here.bounds
        for several in (images, images[0]):
            found, expected = there.run(several), here.run(several)
            assert found.dtype == expected.dtype and np.array_equal(found, expected)
        assert np.array_equal(there.run_codes(codes), here.run_codes(codes))
        found = there.verify()
        assert found["equal"] is True and found["rounds"] == 2
        assert found["logits_compared"] == 2 * here.verify()["logits_compared"]
        assert not list(server.folder.rglob("*.so")), "the uploaded file is still there"
        there.set_input("main", images[: here.batch])
        assert 0 < there.time() < 1
        with pytest.raises(VitqError, match="shape"):
            there.run(images[..., :2])


def test_golden_vectors_that_are_not_met(server: Running, tmp_path: Path) -> None:
    wrong = toy_artifact(tmp_path / "wrong.so", wrong=True)
    with connect(server.address, KEY) as session:
        found = RemoteArtifact(wrong, session).verify()
        assert found["equal"] is False and found["logits_different"] == 2  # once a round
        with pytest.raises(VitqError, match="cannot be inspected"):
            RemoteArtifact(wrong, session).inspect()


def test_a_changed_file_of_the_same_name(server: Running, toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "toy.so"
    with connect(server.address, KEY) as session:
        path.write_bytes(toy.read_bytes())
        assert RemoteArtifact(path, session).verify()["equal"]
        toy_artifact(path, wrong=True)
        assert not RemoteArtifact(path, session).verify()["equal"]


def test_files_that_are_no_artefacts(server: Running, toy: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("not a library")
    cut = tmp_path / "cut.so"
    cut.write_bytes(toy.read_bytes()[:-100])
    new = toy_artifact(tmp_path / "new.so", change={"format": 99})
    with connect(server.address, KEY) as session:
        for path, why in ((text, "not a shared library"), (cut, "truncated"),
                          (tmp_path / "gone.so", "cannot read"), (new, "artefact format 99"),
                          (Path(os.path.realpath("/proc/self/exe")), "not")):  # fmt: skip
            with pytest.raises(VitqError, match=why):
                RemoteArtifact(path, session)
        with pytest.raises(RemoteError, match=r"loading text\.so: file too short"):
            session.load(text)
        assert RemoteArtifact(toy, session).verify()["equal"], "the session goes on"


@on_x86
@needs_compiler
def test_another_architecture(server: Running, tmp_path: Path) -> None:
    foreign = tmp_path / "arm.so"
    tvm_vitq.compile(toy_quantized(), "aarch64", foreign)
    with connect(server.address, KEY) as session:
        refusal = r"built for aarch64 and the board .* is x86_64; compile it .* --target x86-64-v3$"
        with pytest.raises(VitqError, match=refusal):
            RemoteArtifact(foreign, session)
        # A server that does not say what it is: its loader does.
        session.board = Board(None, None, None)
        with pytest.raises(VitqError, match=r"cannot load it: it has another architecture"):
            RemoteArtifact(foreign, session)
        assert not list(server.folder.rglob("*.so"))


def test_code_for_a_gpu(native: Running, tmp_path: Path) -> None:
    target = {"name": "cuda", "kind": "cuda", "arch": "sm_80", "features": []}
    path = toy_artifact(tmp_path / "gpu.so", change={"target": target})
    with connect(native.address, KEY) as session:
        with pytest.raises(VitqError, match=r"is for an NVIDIA GPU \(sm_80\)"):
            RemoteArtifact(path, session)
        assert not list(native.folder.rglob("*.so"))


def test_another_processor(server: Running, tmp_path: Path) -> None:
    target = {"name": "t", "architecture": "x86_64", "features": ["sse4_1", "quantum-8"]}
    strange = toy_artifact(tmp_path / "strange.so", change={"target": target})
    with connect(server.address, KEY) as session:
        assert session.board.architecture == host_architecture()
        with pytest.raises(VitqError, match=r"needs a processor with quantum-8, which the board"):
            RemoteArtifact(strange, session)
