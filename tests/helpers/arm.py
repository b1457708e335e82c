"""Cross-compiling for AArch64 and running under qemu, for tests; skips say what is missing."""

from __future__ import annotations

import shutil

import pytest

COMPILER = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"
MISSING = [name for name in (COMPILER, QEMU) if shutil.which(name) is None]

needs_compiler = pytest.mark.skipif(
    COMPILER in MISSING, reason=f"no {COMPILER} (Debian: g++-aarch64-linux-gnu)")
needs_qemu = pytest.mark.skipif(
    bool(MISSING),
    reason=f"no {' and no '.join(MISSING)} (Debian: g++-aarch64-linux-gnu, qemu-user)")

LEVELS = {
    "aarch64": f"{QEMU} -cpu cortex-a53",
    "aarch64+dotprod": f"{QEMU} -cpu neoverse-n1",
    "aarch64+i8mm": f"{QEMU} -cpu max",
}
"""Targets, each with the emulator of a processor that has no more than it needs."""
