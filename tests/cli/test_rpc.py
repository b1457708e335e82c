"""``verify`` and ``bench`` on a board, on loopback; ``rpc-server``."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.artifact.toy import toy_artifact
from tests.cli.conftest import Cli
from tests.helpers.rpc import Running, free_port, native_server, tracker, wait_for
from tvm_vitq.remote.server import PROGRAM, package_server

Refused = Callable[..., str]
KEY = "pi"


@pytest.fixture(scope="session")
def program(build_once: Callable[..., Path]) -> Path:
    made = build_once("rpc_server", lambda f: package_server(f / "server") and None)
    return made / "server" / PROGRAM


@pytest.fixture(scope="session")
def server(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with native_server(program, tmp_path_factory.mktemp("rpc") / "s", KEY) as made:
        yield made


def test_verify(cli: Cli, server: Running, toy: Path, wrong_toy: Path) -> None:
    where = ("--rpc", server.address, "--key", KEY)
    done = cli("verify", toy, *where, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json() == {
        "equal": True,
        "vectors": 2,
        "logits_compared": 20,
        "logits_different": 0,
        "rounds": 2,
        "server": server.address,
    }
    assert f"equal on {server.address}: 2 golden vectors" in cli("verify", toy, *where).out
    done = cli("verify", wrong_toy, *where, "--threads", 1, "--json")
    assert done.code == 1 and done.json()["logits_different"] == 2


def test_bench(cli: Cli, server: Running, toy: Path) -> None:
    where = ("--rpc", server.address, "--key", KEY)
    done = cli("bench", toy, *where, "--pairs", 5, "--threads", 2, "--json")
    assert (done.code, done.err) == (0, "")
    document = done.json()
    assert document["server"] == server.address and document["board"]["cores"] >= 1
    assert document["threads"] == 2 and document["batch"] == 2 and document["pairs"] == 5
    (row,) = document["results"]
    assert row["runner"] == "tvm-vitq" and row["runs"] == 5 and "ratio" not in row
    assert 0 < row["min_ms"] <= row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    shown = cli("bench", toy, *where, "--pairs", 2).out
    assert server.address in shown and "median ms" in shown and "peers run on this machine" in shown


def test_uint8(cli: Cli, server: Running, tmp_path: Path) -> None:
    path = toy_artifact(tmp_path / "t8.so", dtype="uint8", batch=1)
    where = ("--rpc", server.address, "--key", KEY)
    assert cli("bench", path, *where, "--pairs", 2, "--warmup", 0).code == 0
    assert cli("verify", path, *where).code == 0


def test_through_a_tracker(cli: Cli, refused: Refused, program: Path, toy: Path,
                           tmp_path: Path) -> None:
    pytest.importorskip("tornado", reason="TVM's tracker needs tornado (pip install .[test])")
    with tracker(tmp_path / "t") as farm:
        where = ("--tracker", farm.address, "--key", KEY)
        with native_server(program, tmp_path / "s", KEY, "--tracker", farm.address) as server:
            wait_for("known to the tracker", server.log)
            for verb in ("verify", "bench"):
                done = cli(verb, toy, *where, "--json")
                assert done.code == 0 and done.json()["server"] == server.address
            assert "no board with the key 'tpu'; it knows pi" in refused(
                "verify", toy, "--tracker", farm.address, "--key", "tpu")


def test_refusals(refused: Refused, server: Running, toy: Path, tmp_path: Path) -> None:
    where = ("--rpc", server.address, "--key", KEY)
    for verb in ("verify", "bench"):
        assert "refuses the connection" in refused(verb, toy, "--rpc", f"localhost:{free_port()}")
        assert "give it with --key" in refused(verb, toy, *where[:2])
        assert "another key than 'x'" in refused(verb, toy, *where[:2], "--key", "x")
        assert "wants HOST:PORT" in refused(verb, toy, "--rpc", "board")
        assert "give one of them" in refused(verb, toy, *where, "--tracker", "a:1")
        assert "wants the --key" in refused(verb, toy, "--tracker", "a:1")
        assert "--key goes with --rpc" in refused(verb, toy, "--key", "x")
        assert "cannot read" in refused(verb, tmp_path / "gone.so", *where)
    assert "--with replays here" in refused("verify", toy, *where, "--with", "qemu-aarch64")
    assert "--batch 7" in refused("bench", toy, *where, "--batch", 7)
    for words in (("--peers", "ort-fp32"), ("--per-layer",), ("--plot", tmp_path / "x.png"),
                  ("--model", "m"), ("--checkpoint", "c")):  # fmt: skip
        assert f"{words[0]} is for this machine" in refused("bench", toy, *where, *words)


def test_rpc_server(cli: Cli, refused: Refused, toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "board"
    document = cli("rpc-server", "-o", folder, "--json").json()
    names = [PROGRAM, "lib/libtvm_ffi.so", "lib/libtvm_runtime.so"]
    assert sorted(document["files"]) == sorted(names)
    assert document["bytes"] == sum((folder / name).stat().st_size for name in names) < 8e6
    assert "the folder is not empty" in refused("rpc-server", "-o", folder)
    assert "there is no server for riscv" in refused("rpc-server", "-o", folder, "--arch", "riscv")
    assert "cannot write" in refused("rpc-server", "-o", tmp_path / "no" / "board")
    moved = folder.rename(tmp_path / "moved")
    with native_server(moved / PROGRAM, tmp_path / "s", KEY) as server:
        assert cli("verify", toy, "--rpc", server.address, "--key", KEY).code == 0


@pytest.mark.parametrize("words, why", [
    (["--port"], "--port is unknown or wants a value"),
    (["--port", "x"], "--port wants a number from 0 to 65535"),
    (["--colour", "red"], "unknown option --colour"),
    (["--threads", "100000"], "100000 threads are too many: this machine has"),
    (["serve"], "unknown argument serve"),
    (["--key", "a b"], "no spaces"),
    (["--tracker", "localhost:9190"], "--tracker wants HOST:PORT, and --key"),
    (["--host", "999.0.0.1"], "unknown address 999.0.0.1"),
])  # fmt: skip
def test_wrong_options_of_the_server(program: Path, words: list[str], why: str) -> None:
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("vitq_rpc_server: ") and done.stderr.count("\n") == 1
    assert why in done.stderr


def test_help_of_the_server(program: Path) -> None:
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: vitq_rpc_server ") and "--port-end" in done.stdout
