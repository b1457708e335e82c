"""A packed module's kernels get the tag by which TVM's runtime lets launches overlap."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from schedules.cuda.overlap import TAG, overlapping


def text(value: bytes) -> bytes:
    return len(value).to_bytes(8, "little") + value


def function(name: bytes, tags: Sequence[bytes]) -> bytes:
    parameters = (2).to_bytes(8, "little") + b"\x03\x40\x01\x00" * 2
    numbers = (1).to_bytes(8, "little") + b"\x05\x00\x00\x00"
    return (text(name) * 2 + parameters + len(tags).to_bytes(8, "little")
            + b"".join(map(text, tags)) + numbers)


def test_each_kernel_gets_the_tag() -> None:
    """Before what must be the last; everything else stays."""
    dynamic = b"tirx.use_dyn_shared_memory"
    kernels = [(b"a", [b"blockIdx.x", b"threadIdx.x", dynamic]), (b"bb", [b"threadIdx.x"]),
               (b"", [])]
    count = len(kernels).to_bytes(8, "little")
    found = overlapping(count + b"".join(function(*kernel) for kernel in kernels))
    assert found == count + b"".join([
        function(b"a", [b"blockIdx.x", b"threadIdx.x", TAG, dynamic]),
        function(b"bb", [b"threadIdx.x", TAG]), function(b"", [TAG])])
    with pytest.raises(ValueError, match="not as expected"):
        overlapping(found + b"\x00")
