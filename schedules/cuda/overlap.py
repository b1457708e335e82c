"""Launches that overlap: the next kernel begins while the one before it ends.

A launch costs its kernel about a microsecond until the first load comes back, and a forward pass
has dozens of them. Hopper's "programmatic dependent launch" lets a kernel begin as soon as all
blocks of the one before have; every kernel of ours waits for that one's end before it reads what
may have been written (:meth:`.writer.CudaWriter.wait_for_launches`), and until then loads
constants. One wait is enough for all launches before: that one cannot end before its own wait, so
those before it are over. A launch is made so by a tag that TVM's runtime looks for in what a
library says of its kernels.

Nothing may be loaded through the read-only path, which knows of no writes during a kernel: such
kernels are compiled without ``__restrict__``.
"""

from __future__ import annotations

__all__ = ["OPTIONS", "overlapping", "packed_text"]

TAG = b"tirx.use_programtic_dependent_launch"
_SHARED = b"tirx.use_dyn_shared_memory"
OPTIONS = ("-D__restrict__=",)
"""Of nvcc: what could not be written by others would be loaded through the read-only path."""


def overlapping(functions: bytes) -> bytes:
    """Return what a packed CUDA module says of its kernels, with the tag in each.

    A count, and for each kernel its name twice, the dtypes of its parameters (4 bytes each), the
    launch's extents by name, and numbers (4 bytes each); counts and lengths are of 8 bytes.
    """
    read = _Reader(functions)
    out = [_number(count := read.number())]
    for _ in range(count):
        out += [packed_text(read.text()), packed_text(read.text()), read.items(4)]
        tags = [read.text() for _ in range(read.number())]
        # What says that shared memory is dynamic must stay the last.
        at = len(tags) - (tags[-1:] == [_SHARED])
        tags[at:at] = [TAG]
        out += [_number(len(tags)), *map(packed_text, tags), read.items(4)]
    if read.at != len(functions):
        raise ValueError("a packed CUDA module is not as TVM 0.27 writes it: install that version")
    return b"".join(out)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self) -> bytes:
        return self.take(self.number())

    def items(self, size: int) -> bytes:
        """Return a count and what it counts."""
        count = self.number()
        return _number(count) + self.take(size * count)


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def packed_text(value: bytes) -> bytes:
    """Return a string as it stands in packed modules: its length in 8 bytes, and itself."""
    return _number(len(value)) + value
