"""An artefact's seal: the SHA-256 of the whole file, kept in its metadata.

What ``inspect`` tells (ranges, integers only, a GPU's registers) was proved when the artefact was
compiled: of these weights and this machine code. It is true of a file only if nothing in it has
changed. The digest is that of the file with zeros where the digest itself stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relay_passes.errors import VitqError

__all__ = ["UNSEALED", "check_seal", "seal"]

UNSEALED = "0" * 64
"""The metadata's ``digest`` before the file is sealed."""


def _mark(digest: str) -> bytes:
    return b'"digest":"' + digest.encode() + b'"'


def _digest(data: bytes, mark: bytes) -> tuple[str, int]:
    """Return the digest of a file, and where it stands in it; -1 if it does not, or twice."""
    at = data.find(mark)
    if at < 0 or data.find(mark, at + 1) >= 0:
        return "", -1
    found = hashlib.sha256(memoryview(data)[:at])
    found.update(_mark(UNSEALED))
    found.update(memoryview(data)[at + len(mark) :])
    return found.hexdigest(), at


def seal(path: str | Path) -> None:
    """Write a file's digest into its metadata, which has :data:`UNSEALED` there.

    Raises
    ------
    VitqError
        If there is no such place.
    """
    data = Path(path).read_bytes()
    digest, at = _digest(data, _mark(UNSEALED))
    if at < 0:
        raise VitqError(f"{path} cannot be sealed: a defect of tvm-vitq")
    with Path(path).open("r+b") as file:
        file.seek(at)
        file.write(_mark(digest))


def check_seal(path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Refuse an artefact that has changed since it was compiled.

    Raises
    ------
    VitqError
        If a byte of it is another, or its metadata has no digest.
    """
    said = metadata.get("digest")
    if not isinstance(said, str) or len(said) != len(UNSEALED):
        raise VitqError(f"{path} does not say what it held when it was made; compile it again")
    if _digest(Path(path).read_bytes(), _mark(said))[0] != said:
        raise VitqError(
            f"{path} is damaged: it is not what was compiled and checked; copy it again or compile "
            "it again"
        )
