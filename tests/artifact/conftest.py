"""Toy artefacts, built once for the session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.artifact.toy import toy_artifact

BuildOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def toy(build_once: BuildOnce) -> Path:
    """Return an artefact with float32 input and batch 2."""
    return build_once("toy", lambda f: toy_artifact(f / "toy.so")) / "toy.so"


@pytest.fixture(scope="session")
def toy_uint8(build_once: BuildOnce) -> Path:
    """Return an artefact with uint8 input and batch 1."""
    return (
        build_once("toy8", lambda f: toy_artifact(f / "toy8.so", dtype="uint8", batch=1))
        / "toy8.so"
    )
