"""The architecture of this machine, in the words of LLVM triples; costs no import of TVM."""

from __future__ import annotations

import platform

__all__ = ["host_architecture"]


def host_architecture() -> str:
    """Return this machine's architecture, for example ``"x86_64"`` or ``"aarch64"``."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
