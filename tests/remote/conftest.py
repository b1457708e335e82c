"""Servers of both kinds, and artefacts to run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.artifact.toy import toy_artifact
from tests.helpers.rpc import Running, native_server, python_server
from tvm_vitq.remote.server import PROGRAM, package_server

BuildOnce = Callable[..., Path]
KEY = "board-7"


@pytest.fixture(scope="session")
def program(build_once: BuildOnce) -> Path:
    """Return ``vitq_rpc_server`` for this machine."""
    made = build_once("rpc_server", lambda f: package_server(f / "server") and None)
    return made / "server" / PROGRAM


@pytest.fixture(scope="session")
def toy(build_once: BuildOnce) -> Path:
    """Return an artefact with float32 input and batch 2."""
    return build_once("remote_toy", lambda f: toy_artifact(f / "toy.so")) / "toy.so"


@pytest.fixture(scope="session")
def toy_uint8(build_once: BuildOnce) -> Path:
    """Return an artefact with uint8 input and batch 1."""
    made = build_once("remote_toy8", lambda f: toy_artifact(f / "t8.so", dtype="uint8", batch=1))
    return made / "t8.so"


@pytest.fixture(scope="session")
def _python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with python_server(tmp_path_factory.mktemp("python") / "s", KEY) as server:
        yield server


@pytest.fixture(scope="session")
def _native(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with native_server(program, tmp_path_factory.mktemp("native") / "s", KEY) as server:
        yield server


@pytest.fixture
def native(_native: Running) -> Running:
    """Return the server of ours that lives as long as the tests do."""
    return _native


@pytest.fixture(params=["python", "native"])
def server(request: pytest.FixtureRequest) -> Running:
    """Return a server that lives as long as the tests do: TVM's, or ours."""
    return request.getfixturevalue(f"_{request.param}")


@pytest.fixture(params=[pytest.param("python", marks=pytest.mark.slow), "native"])
def own_server(
    request: pytest.FixtureRequest, program: Path, tmp_path: Path
) -> Iterator[Running]:
    """Return a server that the test may spoil."""
    if request.param == "python":
        made = python_server(tmp_path / "server", KEY)
    else:
        made = native_server(program, tmp_path / "server", KEY)
    with made as server:
        yield server


@pytest.fixture
def own_native(program: Path, tmp_path: Path) -> Iterator[Running]:
    """Return a server of ours that the test may spoil."""
    with native_server(program, tmp_path / "server", KEY) as server:
        yield server
