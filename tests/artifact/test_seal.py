"""A byte that changes anywhere in an artefact is noticed by all that speak of what was proved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relay_passes.errors import VitqError
from tests.artifact.toy import toy_quantized
from tvm_vitq.artifact.load import Artifact
from tvm_vitq.artifact.package import package
from tvm_vitq.artifact.seal import UNSEALED, check_seal, seal
from tvm_vitq.artifact.stored import StoredArtifact
from tvm_vitq.compiler import compile_module


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seal") / "toy.so"
    compile_module(toy_quantized(), "native", path)
    return path


def test_whole(toy: Path) -> None:
    digest = StoredArtifact(toy).metadata["digest"]
    assert len(digest) == 64 and digest != UNSEALED
    assert Artifact(toy).verify()["equal"] and Artifact(toy).inspect()["digest"] == digest
    data = toy.read_bytes()
    assert data.count(digest.encode()) == 1 and UNSEALED.encode() not in data


def test_any_byte(toy: Path, tmp_path: Path) -> None:
    data, metadata = toy.read_bytes(), StoredArtifact(toy).metadata
    rng = np.random.default_rng(0)
    other = tmp_path / "other.so"
    for at in [0, len(data) - 1, *rng.integers(0, len(data), 60)]:
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        other.write_bytes(changed)
        with pytest.raises(VitqError, match="is damaged"):
            check_seal(other, metadata)


def test_weights(toy: Path, tmp_path: Path) -> None:
    """Range proofs rest on the weights: of others nothing is told."""
    data, whole = bytearray(toy.read_bytes()), StoredArtifact(toy)
    golden = whole.golden[0].astype(np.int8).tobytes()[:16]
    data[data.index(golden)] ^= 1
    other = tmp_path / "other.so"
    other.write_bytes(data)
    for speak in (StoredArtifact, lambda path: Artifact(path).verify(),
                  lambda path: package(path, tmp_path / "bundle")):  # fmt: skip
        with pytest.raises(VitqError, match="is damaged: it is not what was compiled"):
            speak(other)
    assert not (tmp_path / "bundle").exists()


def test_without_a_place(tmp_path: Path) -> None:
    for text in (b"nothing", b'"digest":"' + UNSEALED.encode() + b'",' * 2):
        (tmp_path / "x").write_bytes(text if text == b"nothing" else text + text)
        with pytest.raises(VitqError, match="cannot be sealed"):
            seal(tmp_path / "x")
    with pytest.raises(VitqError, match="does not say what it held"):
        check_seal(tmp_path / "x", {})
