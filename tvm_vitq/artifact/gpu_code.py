"""A GPU artefact's code: its digests when it was compiled, and whether the file still holds it.

What ``inspect`` tells of kernels for a GPU (registers, launches, no floats) was found when they
were compiled. It is true of what is in the file only if that is the same code.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relay_passes.errors import VitqError

__all__ = ["check_gpu_code", "digests", "fat_binary"]

# Magic number, version, size of this header, size of what follows (``fatbinary_section.h``).
_HEADER = struct.Struct("<IHHQ")
_MAGIC = struct.pack("<I", 0xBA55ED50)


def digests(binary: bytes, source: str) -> dict[str, str]:
    """Return the SHA-256 of the fat binary, ``code``, and of the CUDA C++ text, ``source``."""
    return {"code": hashlib.sha256(binary).hexdigest(),
            "source": hashlib.sha256(source.encode()).hexdigest()}  # fmt: skip


def fat_binary(data: bytes) -> bytes:
    """Return the first fat binary in a file's bytes, ``b""`` if there is no whole one."""
    at = data.find(_MAGIC)
    while at >= 0:
        if at + _HEADER.size <= len(data):
            _, version, header, size = _HEADER.unpack_from(data, at)
            if version == 1 and header == _HEADER.size and at + header + size <= len(data):
                return data[at : at + header + size]
        at = data.find(_MAGIC, at + 1)
    return b""


def check_gpu_code(path: str | Path, metadata: Mapping[str, Any], source: str | None) -> None:
    """Refuse an artefact for a GPU whose code is not what was compiled and checked.

    Parameters
    ----------
    path
        The file.
    metadata
        Its metadata.
    source
        Its kernels' CUDA C++ text; None if that cannot be read.

    Raises
    ------
    VitqError
        If machine code or text is another, or the artefact does not say what they were.
    """
    said = metadata.get("gpu", {}).get("sha256")
    if said is None:
        raise VitqError(f"{path} does not say what its GPU code was; compile it again")
    binary = fat_binary(Path(path).read_bytes())
    found = digests(binary, source or "")
    for part, name in (("code", "GPU machine code"), ("source", "CUDA text")):
        if found[part] != said[part]:
            raise VitqError(f"{path} is damaged: its {name} is not what was compiled and checked; "
                            "copy it again or compile it again")
