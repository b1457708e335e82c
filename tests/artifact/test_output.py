"""A file is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relay_passes.errors import VitqError
from tvm_vitq.artifact.output import atomic_output, check_output


def test_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.so"
    target.write_text("old")
    with atomic_output(target) as draft:
        draft.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.so"]


def test_nothing_after_a_failure(tmp_path: Path) -> None:
    target = tmp_path / "a.so"
    with pytest.raises(RuntimeError), atomic_output(target) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_those_of_the_draft(tmp_path: Path) -> None:
    with atomic_output(tmp_path / "a.so") as draft:
        draft.write_text("x")
        draft.chmod(0o755)
    assert (tmp_path / "a.so").stat().st_mode & 0o777 == 0o755


def test_unwritable(tmp_path: Path) -> None:
    """No folder, a folder in the way, a file as the folder."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "no" / "a.so", tmp_path, tmp_path / "file" / "a.so"):
        with pytest.raises(VitqError, match="cannot write"):
            check_output(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(VitqError, match="Permission"):
            check_output(tmp_path / "a.so")
    finally:
        tmp_path.chmod(0o700)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(VitqError, match="No space"), atomic_output(tmp_path / "a.so") as draft:
        draft.write_text("x")
    assert list(tmp_path.iterdir()) == []
