"""Runs the command line in this process; toy artefacts and images to run it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.artifact.toy import CLASSES, toy_artifact
from tvm_vitq.cli import app


@dataclass
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """Return standard output as exactly one JSON document."""
        return json.loads(self.out)


Cli = Callable[..., Outcome]


@pytest.fixture
def cli() -> Cli:
    """Return ``cli("verify", path, ...)``."""

    def run(*words: object) -> Outcome:
        result = CliRunner().invoke(app, [str(word) for word in words], prog_name="tvm-vitq")
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def refused(cli: Cli) -> Callable[..., str]:
    """Return ``refused(*words)``: the one line on standard error of a command that ends with 2."""

    def run(*words: object) -> str:
        done = cli(*words)
        assert done.code == 2, (done.out, done.err)
        assert done.out == ""
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        assert "Traceback" not in done.err
        return done.err

    return run


@pytest.fixture(scope="session")
def toy(build_once: Callable[..., Path]) -> Path:
    """Return a toy artefact."""
    return build_once("cli_toy", lambda f: toy_artifact(f / "toy.so")) / "toy.so"


@pytest.fixture(scope="session")
def wrong_toy(build_once: Callable[..., Path]) -> Path:
    """Return a toy artefact whose golden logits are not what it computes."""
    return build_once("cli_wrong", lambda f: toy_artifact(f / "toy.so", wrong=True)) / "toy.so"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of seven labelled images."""
    folder = tmp_path / "pictures"
    (folder / "img").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = ["image,label"]
    for i in range(7):
        pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "img" / f"{i}.png")
        rows.append(f"{i}.png,{i % CLASSES}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder
