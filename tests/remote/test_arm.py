"""The server for AArch64 under qemu: a board, as far as a machine without one can tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tvm_vitq
from relay_passes.errors import VitqError
from schedules.host import host_architecture
from tests.artifact.toy import toy_quantized
from tests.helpers.arm import needs_qemu
from tests.helpers.rpc import emulated_server
from tests.remote.conftest import KEY
from tvm_vitq.remote import connect
from tvm_vitq.remote.artifact import RemoteArtifact
from tvm_vitq.remote.bench import bench
from tvm_vitq.remote.server import PROGRAM, package_server

pytestmark = [needs_qemu, pytest.mark.skipif(
    host_architecture() != "x86_64", reason="AArch64 isn't foreign here")]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_board_of_another_architecture(
    dtype: str, toy: Path, build_once: Callable[..., Path], tmp_path: Path
) -> None:
    server = build_once("rpc_server_arm", lambda f: package_server(f / "s", "aarch64") and None)
    program = server / "s" / PROGRAM
    quantized = toy_quantized(dtype)
    here = tvm_vitq.compile(quantized, output=tmp_path / "here.so")
    for target in ("aarch64", "aarch64+i8mm"):
        tvm_vitq.compile(quantized, target, tmp_path / f"{target}.so")
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (3, *here.input_shape)).astype(dtype)
    if dtype == "float32":
        images = images / np.float32(64) - 2
    with (emulated_server(program, tmp_path / "old", KEY, "cortex-a53") as board,
          connect(board.address, KEY) as session):  # fmt: skip
        assert session.board.architecture == "aarch64"
        assert session.board.features == {"asimd"}
        artifact = RemoteArtifact(tmp_path / "aarch64.so", session, threads=1)
        assert artifact.verify()["equal"]
        assert np.array_equal(artifact.run(images), here.run(images))
        assert bench(tmp_path / "aarch64.so", session, runs=3)["results"][0]["min_ms"] > 0
        with pytest.raises(VitqError, match="needs a processor with asimddp, i8mm, which the"):
            RemoteArtifact(tmp_path / "aarch64+i8mm.so", session)
        with pytest.raises(VitqError, match="compile it again with --target aarch64"):
            RemoteArtifact(toy, session)
    with (emulated_server(program, tmp_path / "new", KEY, "max") as board,
          connect(board.address, KEY) as session):  # fmt: skip
        artifact = RemoteArtifact(tmp_path / "aarch64+i8mm.so", session)
        assert artifact.verify()["equal"]
        assert np.array_equal(artifact.run(images), here.run(images))
