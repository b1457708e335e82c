"""Targets that this machine is not: compiled, and said not to be replayed, or replayed by qemu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tvm_vitq
from relay_passes.errors import VitqError
from schedules.host import host_architecture
from tests.artifact.toy import toy_quantized
from tests.cli.conftest import Cli
from tests.helpers.arm import QEMU, needs_compiler, needs_qemu
from tvm_vitq.artifact.foreign import ForeignArtifact
from tvm_vitq.saved import save_quantized

Refused = Callable[..., str]
on_x86 = pytest.mark.skipif(host_architecture() != "x86_64", reason="AArch64 isn't foreign here")


@on_x86
@needs_compiler
def test_compiled_but_not_replayed(cli: Cli, refused: Refused, tmp_path: Path) -> None:
    saved = save_quantized(toy_quantized(), tmp_path / "q.json")
    out = tmp_path / "toy.so"
    done = cli("compile", saved, "-o", out, "--target", "aarch64", "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert report["equal"] is None and report["replayed_with"] is None
    assert report["vectors"] == 2 and report["logits_compared"] == 0
    assert "for aarch64 and this machine is x86_64" in report["not_replayed"]
    words = cli("compile", saved, "-o", out, "--target", "cortex-a76").out
    assert "2 golden vectors stored, not replayed here" in words and "equal" not in words
    for verb in ("verify", "inspect", "run"):
        line = refused(verb, out, *(["x.png"] if verb == "run" else []))
        assert "was built for aarch64" in line and "--with qemu-aarch64" in line


@on_x86
@needs_qemu
def test_replayed_by_qemu(cli: Cli, tmp_path: Path) -> None:
    saved = save_quantized(toy_quantized(), tmp_path / "q.json")
    out = tmp_path / "toy.so"
    done = cli("compile", saved, "-o", out, "--target", "aarch64", "--verify-with", QEMU, "--json")
    assert done.code == 0, done.err
    assert done.json()["equal"] is True and done.json()["replayed_with"] == QEMU
    again = cli("verify", out, "--with", f"{QEMU} -cpu cortex-a53", "--json")
    assert again.code == 0 and again.json()["logits_compared"] == 10


@needs_qemu
def test_an_emulator_of_another_architecture(refused: Refused, toy: Path) -> None:
    assert f"fails under {QEMU}" in refused("verify", toy, "--with", QEMU)


def test_a_processor_that_lacks_a_feature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvm_vitq.artifact.load._cpu_flags", lambda: frozenset({"avx", "sse41"}))
    made = tvm_vitq.compile(toy_quantized(), "x86-64-v4", tmp_path / "toy.so")
    assert isinstance(made, ForeignArtifact)
    assert made.verify()["equal"] is None and made.metadata["golden"]["replayed_with"] is None
    assert "which this processor lacks" in made.verify()["not_replayed"]
    with pytest.raises(VitqError, match=r"cannot run here: the code needs .*avx512f"):
        made.run(None)
