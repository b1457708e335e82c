"""Options, markers and fixtures that every test may use."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

# Several workers share the cores: one thread each, set before torch and tvm start their pools
# (two pools that wait for each other's cores are many times slower than one thread).
for pool in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
    os.environ.setdefault(pool, "1")

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("VITQ_DATA") or ROOT.parent / "shared" / "data").expanduser()
NO_DATA = f"needs the weights and images of VITQ_DATA, and {DATA} is not there"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_slow = pytest.mark.skip(reason="slow: run with --slow (make slow)")
    no_data = pytest.mark.skip(reason=NO_DATA)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(no_slow)
        if "data" in item.keywords and not DATA.is_dir():
            item.add_marker(no_data)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real weights and images; skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(NO_DATA)
    return DATA


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` against the other worker processes."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def build_once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return ``build(name, make)``: a folder that ``make(folder)`` filled once per test run.

    All xdist workers share the folder; the first one that asks fills it while the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "built"
    shared.mkdir(exist_ok=True)

    def build(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / name
        done = folder / ".done"
        with locked(shared / f"{name}.lock"):
            if not done.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                done.touch()
        return folder

    return build


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give every test the same random numbers, whatever ran before it on its worker."""
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
