"""Write a file whole or not at all, and find out before the long work that it cannot be."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relay_passes.errors import VitqError

__all__ = ["atomic_output", "check_output"]


def _reason(why: OSError) -> str:
    return why.strerror or str(why)


def check_output(path: str | Path) -> Path:
    """Return ``path`` if a file can be written there.

    Raises
    ------
    VitqError
        If its folder is missing or not writable, or ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise VitqError(f"cannot write {path}: it is a folder; name a file")
    if not path.parent.is_dir():
        raise VitqError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    try:
        descriptor, probe = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as why:
        raise VitqError(f"cannot write {path}: {_reason(why)}") from why
    os.close(descriptor)
    Path(probe).unlink()
    return path


@contextmanager
def atomic_output(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file to fill; it takes the place of ``path`` only if nothing is raised.

    The temporary file lies in a folder of its own until it is whole; then it is copied beside
    ``path`` and renamed, so that a reader sees the old file or the new one and nothing between.
    """
    path = check_output(path)
    with tempfile.TemporaryDirectory(prefix="tvm-vitq-") as folder:
        draft = Path(folder) / (path.name if path.suffix == ".so" else f"{path.name}.so")
        yield draft
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        beside = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as target, draft.open("rb") as source:
                shutil.copyfileobj(source, target)
            beside.chmod(draft.stat().st_mode & 0o777)
            beside.replace(path)
        except OSError as why:
            raise VitqError(f"cannot write {path}: {_reason(why)}") from why
        finally:
            beside.unlink(missing_ok=True)
