"""The runner's child ends with the sitting, however that ends; one sitting at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.runner import __main__ as command
from benchmarks.gpu.runner.session import alone

ROOT = Path(__file__).parents[2]
MODEL = {"architecture": {"family": "vit"}, "weights": "random", "recipe": "minmax", "blocks": 1,
         "bars": True, "checks": "c.npz", "artifacts": {"8": "b"}}  # fmt: skip

SITTING = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.runner import __main__ as command, session
session.perform = lambda *_: (Path("pid").write_text(str(os.getpid())), time.sleep(99))
command.why_not = lambda _: ""
session.describe = lambda _: {"kind": "cpu", "name": "x"}
sys.executable = __file__  # the child is this very program
raise SystemExit(command.main([word for word in sys.argv[1:] if not word.startswith("-m")
                               and word != "benchmarks.gpu.runner"]))
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    manifest = {"made": "now", "arch": "native", "device": "cpu", "versions": {},
                "models": {"mini": MODEL}}  # fmt: skip
    (tmp_path / "bundle.json").write_text(json.dumps(manifest))
    return tmp_path


def begin(bundle: Path) -> tuple[subprocess.Popen[str], int]:
    """Start a sitting whose child does not end by itself; return it and the child's number."""
    script = bundle / "sitting"
    script.write_text(f"#!{sys.executable}\n{SITTING}")
    script.chmod(0o755)
    sitting = subprocess.Popen(
        [str(script), "--bundle", str(bundle), "--out", "r.json"], cwd=bundle, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    end = time.monotonic() + 30
    while not (bundle / "pid").exists() or not (bundle / "pid").read_text():
        assert time.monotonic() < end and sitting.poll() is None, sitting.communicate()
        time.sleep(0.05)
    return sitting, int((bundle / "pid").read_text())


def gone(number: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2][0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_child_ends_too(bundle: Path, number: signal.Signals) -> None:
    sitting, child = begin(bundle)
    sitting.send_signal(number)
    _, said = sitting.communicate(timeout=20)
    assert gone(child)
    if number is not signal.SIGKILL:
        assert sitting.returncode == 130
        assert said == ("stopped: what was measured is in r.json, and the same command goes on\n")
        assert json.loads((bundle / "r.json").read_text())["tasks"]["failed"] == {}
        assert not (bundle / "r.json.current").exists()


def test_one_at_a_time(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone(bundle):
        assert command.main(["--bundle", str(bundle), "--out", str(bundle / "r.json")]) == 2
    assert capsys.readouterr().err == (
        f"error: another run with {bundle} is under way: wait for it or end it\n")  # fmt: skip
    assert not (bundle / "r.json").exists()


def test_unknown_batches(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--bundle", str(bundle), "--batches", "3", "8"]) == 2
    assert capsys.readouterr().err == "error: no artefact for batch 3 in this bundle\n"


@pytest.mark.parametrize(("options", "said"), [
    (["check", "--inputs", "0"], "--inputs 0: it must be at least 1"),
    (["check", "--inputs", "-1"], "--inputs -1: it must be at least 1"),
    (["check", "--replays", "0"], "--replays 0: it must be at least 1"),
    (["--budget", "0"], "--budget 0: give the seconds that may be taken"),
    (["check", "extra"], "check takes no extra; files are for table"),
    (["table", "nothing.json"], "there is no nothing.json"),
    (["--bundle", "nowhere"], "there is no nowhere/bundle.json"),
])  # fmt: skip
def test_wrong_input_is_one_line(
    bundle: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [] if "--bundle" in options else ["--bundle", str(bundle)]
    assert command.main([*options, *where]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_damaged_files_are_named(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bundle.json", "r.json"):
        (bundle / name).write_text("{")
    for words in (["check"], ["table", str(bundle / "r.json")]):
        assert command.main([*words, "--bundle", str(bundle)]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "is damaged: unpack or make it again" in line
