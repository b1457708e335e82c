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
    for verb, more in (("verify", ()), ("run", ("x.png",)), ("bench", ("--peers", "none"))):
        line = refused(verb, out, *more)
        assert "was built for aarch64" in line and "--with qemu-aarch64" in line
        assert "bench a board with --rpc" in line
    described = cli("inspect", out, "--json").json()
    assert described["target"]["name"] == "cortex-a76" and described["golden_vectors"] == 2
    assert described["integer_only"] and len(described["bounds"]) == described["claims"]
    assert described["float_instructions"] == 0


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


@on_x86
@needs_qemu
def test_emulators_that_will_not_do(refused: Refused, toy: Path, tmp_path: Path) -> None:
    assert "was built for x86_64: leave out --with" in refused("verify", toy, "--with", QEMU)
    out = tmp_path / "toy.so"
    tvm_vitq.compile(toy_quantized(), "aarch64+dotprod", out)
    line = refused("verify", out, "--with", "/bin/true")
    assert "/bin/true ended without running the code; is it an emulator for aarch64?" in line
    other = tmp_path / "qemu-arm"
    other.symlink_to("/bin/true")
    assert "aarch64: give --with qemu-aarch64" in refused("verify", out, "--with", other)
    line = refused("verify", out, "--with", f"{QEMU} -cpu cortex-a53")
    assert "has instructions that qemu-aarch64 -cpu cortex-a53 lacks" in line
    assert "it needs asimddp" in line and "-cpu max" in line


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
