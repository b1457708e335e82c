"""run, eval, inspect and verify: documents, tables and exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tvm_vitq
from tests.artifact.toy import CLASSES
from tests.cli.conftest import Cli

ROOT = Path(__file__).resolve().parents[2]


def test_verify(cli: Cli, toy: Path) -> None:
    done = cli("verify", toy, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json() == {
        "equal": True,
        "vectors": 2,
        "logits_compared": 2 * CLASSES,
        "logits_different": 0,
    }
    table = cli("verify", toy)
    assert table.code == 0 and "equal" in table.out


def test_verify_that_fails(cli: Cli, wrong_toy: Path) -> None:
    done = cli("verify", wrong_toy, "--json")
    assert done.code == 1
    assert done.json()["equal"] is False and done.json()["logits_different"] == 1
    assert "NOT equal" in cli("verify", wrong_toy).out


def test_inspect(cli: Cli, toy: Path) -> None:
    report = cli("inspect", toy, "--json").json()
    assert report["integer_only"] is True and report["ranges_proved"] is True
    assert report["float_instructions"] == 0
    assert report["size_bytes"] == toy.stat().st_size
    shown = cli("inspect", toy, "--layers", "--ranges")
    assert shown.code == 0
    for word in ("vitq.linear", "boundary", "Proofs", "Proved ranges"):
        assert word in shown.out


def test_run(cli: Cli, toy: Path, pictures: Path) -> None:
    images = sorted((pictures / "img").iterdir())[:3]
    document = cli("run", toy, *images, "--top", 2, "--json").json()
    assert [entry["image"] for entry in document["images"]] == [str(p) for p in images]
    top = document["images"][0]["top"]
    assert len(top) == 2 and top[0]["logit"] >= top[1]["logit"]
    assert top[0]["label"] == f"class {top[0]['class']}"
    assert 0 < top[0]["probability"] <= 1
    shown = cli("run", toy, *images)
    assert shown.code == 0 and "class 1" in shown.out


def test_eval_without_a_float_model(cli: Cli, toy: Path, pictures: Path) -> None:
    found = cli("eval", toy, "--images", pictures, "--json").json()
    assert found["n"] == 7 and found["top5"] == 100.0
    artifact = tvm_vitq.load(toy)
    from tvm_vitq.evaluate import model_input

    x, _ = model_input(artifact, sorted((pictures / "img").iterdir()))
    right = artifact.run(x).argmax(-1) == np.arange(7) % CLASSES
    assert found["top1"] == pytest.approx(100 * right.mean(), abs=1e-3)
    assert found["float_top1"] is None and found["agreement"] is None


def test_eval_without_labels(cli: Cli, toy: Path, pictures: Path) -> None:
    (pictures / "labels.csv").unlink()
    found = cli("eval", toy, "--images", pictures / "img", "--json").json()
    assert found["n"] == 7 and found["top1"] is None


def test_eval_against_float(
    cli: Cli, toy: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float model that always says class 0: agreement and drop are counted from both."""
    import tvm_vitq.evaluate

    def constant(x: np.ndarray) -> np.ndarray:
        assert x.dtype == np.float32 and x.shape[1:] == (3, 8, 8)
        return np.tile(np.array([9, 1, 2, 3, 4], np.float32), (len(x), 1))

    monkeypatch.setattr(tvm_vitq.evaluate, "float_model", lambda *_: constant)
    words = ("eval", toy, "--images", pictures, "--labels", pictures / "labels.csv")
    found = cli(*words, "--against-float", "w.safetensors", "--json").json()
    assert found["float_top1"] == pytest.approx(100 * 2 / 7, abs=1e-3)
    assert found["agreement"] == pytest.approx(100 * (7 - found["changed"]) / 7, abs=1e-3)
    assert found["drop"] == pytest.approx(found["float_top1"] - found["top1"], abs=1e-3)
    failed = cli(*words, "--against-float", "w", "--min-agreement", 100.1)
    assert failed.code == 1 and "same prediction" in failed.out
    assert cli(*words, "--against-float", "w", "--max-drop", -200).code == 1
    assert cli(*words, "--against-float", "w", "--max-drop", 200).code == 0


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_in_a_pipe_there_is_json_and_no_progress(verb: str, toy: Path) -> None:
    import json

    done = subprocess.run(
        [sys.executable, "-m", "tvm_vitq.cli", verb, str(toy), "--json", "--debug"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stderr
