"""What an artefact says of itself, read from the file: the same as from the loaded library."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

import tvm_vitq
from relay_passes.errors import VitqError
from tests.artifact.toy import toy_artifact, toy_quantized
from tests.helpers.arm import needs_compiler
from tvm_vitq.artifact.load import load
from tvm_vitq.artifact.stored import StoredArtifact, _tensors


def _same(path: Path) -> None:
    stored, loaded = StoredArtifact(path), load(path)
    assert stored.metadata == loaded.metadata
    assert stored.bounds == loaded.bounds
    for ours, theirs in zip(stored.golden, loaded.golden, strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    assert stored.inspect() == loaded.inspect()


@pytest.mark.parametrize("dtype, batch", [("float32", 2), ("float32", 1), ("uint8", 1)])
def test_the_same_as_loaded(tmp_path: Path, dtype: str, batch: int) -> None:
    _same(toy_artifact(tmp_path / "toy.so", dtype=dtype, batch=batch))


def test_the_same_after_a_compile(tmp_path: Path) -> None:
    path = tmp_path / "toy.so"
    tvm_vitq.compile(toy_quantized(), "native", path)
    _same(path)


@needs_compiler
def test_of_another_architecture(tmp_path: Path) -> None:
    here, there = tmp_path / "here.so", tmp_path / "there.so"
    tvm_vitq.compile(toy_quantized(), "native", here)
    tvm_vitq.compile(toy_quantized(), "aarch64", there)
    ours, theirs = StoredArtifact(here), StoredArtifact(there)
    assert theirs.machine == "aarch64"
    assert theirs.metadata["target"]["name"] == "aarch64"
    assert ours.bounds == theirs.bounds
    assert all(map(np.array_equal, ours.golden, theirs.golden))
    assert theirs.inspect()["golden_vectors"] == 2


def _serialised(value: np.ndarray) -> bytes:
    kind = {"i": 0, "u": 1, "f": 2}[value.dtype.kind]
    head = struct.pack("<QQiiiBBH", 0xDD5E40F096B4A13F, 0, 1, 0, value.ndim, kind,
                       8 * value.dtype.itemsize, 1)  # fmt: skip
    return head + struct.pack(f"<{value.ndim}qq", *value.shape, value.nbytes) + value.tobytes()


def test_constants_in_any_surroundings() -> None:
    """A mark within a tensor's data, or before no tensor, hides none and makes none."""
    mark = _serialised(np.zeros(0, np.int8))[:8]
    inside = np.frombuffer(b"x" + mark + b"y" * 60, np.uint8)
    values = [np.arange(6, dtype=np.int16).reshape(2, 3), inside, np.array(7, np.int32)]
    floats = _serialised(np.ones(3, np.float32))
    data = b"ab" + mark + b"\xff" * 40 + floats + b"".join(b"\0" + _serialised(v) for v in values)
    found = list(_tensors(data + mark + b"\0" * 5))
    assert [f.shape for f in found] == [v.shape for v in values]
    assert all(map(np.array_equal, found, values))


def test_parts_that_are_missing(tmp_path: Path) -> None:
    whole = toy_artifact(tmp_path / "toy.so").read_bytes()
    bounds = zlib.compress(json.dumps(StoredArtifact(tmp_path / "toy.so").bounds,
                                      separators=(",", ":")).encode(), 9)  # fmt: skip
    path = tmp_path / "cut.so"
    for part, why in ((b'{"format":', "no metadata"), (bounds, "is damaged")):
        assert whole.count(part) == 1
        path.write_bytes(whole.replace(part, bytes(len(part))))
        with pytest.raises(VitqError, match=why):
            StoredArtifact(path)
