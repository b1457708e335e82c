"""What an artefact of any machine says of itself, read from the file: nothing is loaded or run.

The library holds the virtual machine's constants as TVM serialises tensors: a mark, the shape and
the dtype, then the bytes. Those that :mod:`tvm_vitq.artifact.build` added are told from weights by
what they hold: JSON, JSON compressed, and golden vectors of the shapes that the metadata names.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from relay_passes.errors import VitqError

from .elf import METADATA_FORMAT, read_artifact
from .golden import expand
from .seal import check_seal

__all__ = ["StoredArtifact", "check_format"]

_MARK = struct.pack("<Q", 0xDD5E40F096B4A13F)
# After the mark: reserved, device type and number, dimensions, dtype's code, bits and lanes.
_HEAD = struct.Struct("<QiiiBBH")
_KINDS = {0: "int", 1: "uint"}
_JSON_START = b'{"format":'


def _tensors(data: bytes) -> Iterator[np.ndarray]:
    """Yield the integer constants of a library, in their order."""
    at = data.find(_MARK)
    while at >= 0:
        found, end = _tensor(data, at + len(_MARK))
        if found is not None:
            yield found
        at = data.find(_MARK, end)


def _tensor(data: bytes, at: int) -> tuple[np.ndarray | None, int]:
    """Read what may be a tensor; return it and where it ends, or None and ``at``."""
    if at + _HEAD.size > len(data):
        return None, at
    _, _, _, ndim, code, bits, lanes = _HEAD.unpack_from(data, at)
    start = at + _HEAD.size
    if not 0 <= ndim <= 8 or lanes != 1 or start + 8 * ndim + 8 > len(data):
        return None, at
    *shape, size = struct.unpack_from(f"<{ndim}qq", data, start)
    start += 8 * ndim + 8
    count = 1
    for extent in shape:
        count *= extent
    if min(shape, default=0) < 0 or size != count * bits // 8 or start + size > len(data):
        return None, at
    if code not in _KINDS or bits not in (8, 16, 32, 64):
        return None, start + size
    dtype = np.dtype(f"{_KINDS[code]}{bits}").newbyteorder("<")
    return np.frombuffer(data, dtype, count, start).reshape(shape), start + size


def check_format(path: str | Path, metadata: Any) -> None:
    """Refuse the metadata of an artefact in a form that this version does not read.

    Raises
    ------
    VitqError
        Naming the version that made it.
    """
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found == METADATA_FORMAT:
        return
    versions = metadata.get("versions") if isinstance(metadata, dict) else None
    made = versions.get("tvm_vitq", "unknown") if isinstance(versions, dict) else "unknown"
    age = "a newer" if isinstance(found, int) and found > METADATA_FORMAT else "an older"
    raise VitqError(
        f"{path} has artefact format {found}, this tvm-vitq reads {METADATA_FORMAT}: it "
        f"was made by {age} version ({made}); compile it again or install that version"
    )


class StoredArtifact:
    """An artefact of any architecture, unopened.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    path, metadata, bounds, golden
        As those of :class:`~tvm_vitq.artifact.load.Artifact`.
    machine : str
        Architecture, as in :data:`tvm_vitq.artifact.elf.MACHINES`.

    Raises
    ------
    VitqError
        If the file is missing, truncated, damaged or foreign, or from another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.machine = read_artifact(self.path).machine
        self.metadata: dict[str, Any] = {}
        self.bounds: list[dict[str, Any]] | None = None
        details: dict[str, Any] | None = None
        arrays = []
        for value in _tensors(self.path.read_bytes()):
            arrays.append(value)
            if value.dtype != np.uint8 or value.ndim != 1:
                continue
            text = value.tobytes()
            if text.startswith(_JSON_START):
                self.metadata = self._json(text)
            elif isinstance(found := _inflated(text), list):
                self.bounds = found
            elif isinstance(found, dict) and "launches" not in found:  # those are a GPU's kernels
                details = found
        if not self.metadata:
            raise VitqError(f"{path} has no metadata; compile it again")
        check_format(self.path, self.metadata)
        check_seal(self.path, self.metadata)
        golden = self._golden(arrays)
        if details is None or self.bounds is None or golden is None:
            raise VitqError(f"{path} lacks a part of its description; compile it again")
        self.metadata |= details
        self.golden: tuple[np.ndarray, np.ndarray] = golden

    def _json(self, text: bytes) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:
            raise VitqError(f"{self.path} has damaged metadata; compile it again") from None
        return found

    def _golden(self, arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """Find two neighbours that are golden inputs and their logits."""
        codes, out = self.metadata["input"]["codes"], self.metadata["output"]
        shift = int(self.metadata.get("golden", {}).get("shift", 0))
        for stored, logits in pairwise(arrays):
            if (
                list(stored.shape[1:]) == list(codes["shape"][1:])
                and logits.ndim == 2
                and list(logits.shape) == [len(stored), out["shape"][-1]]
                and str(logits.dtype) == out["dtype"]
                and str(stored.dtype) in (codes["dtype"], "int8")
            ):
                return expand(stored, shift, codes["dtype"]), logits
        return None

    def inspect(self) -> dict[str, Any]:
        """Describe the artefact: see :func:`tvm_vitq.artifact.inspect.inspect_artifact`."""
        from .inspect import inspect_artifact

        return inspect_artifact(self)


def _inflated(text: bytes) -> Any:
    """Return the JSON that is compressed in ``text``; None if it is something else."""
    try:
        return json.loads(zlib.decompress(text))
    except (zlib.error, ValueError):
        return None
