"""Servers and trackers of TVM's RPC on loopback, each a process group that ends with its test."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BOUND = re.compile(r"(?:bind to|listening on) \S+?:(\d+)")


@dataclass
class Running:
    """A started program."""

    process: subprocess.Popen[str]
    log: Path
    port: int = 0
    folder: Path = field(default_factory=Path)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def children(self) -> list[int]:
        """Return the process numbers of its descendants, the youngest generation last."""
        found, asked = [], [self.process.pid]
        while asked:
            for path in Path(f"/proc/{asked.pop(0)}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    asked += (more := [int(word) for word in path.read_text().split()])
                    found += more
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and all its descendants, those too whose parents have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@contextlib.contextmanager
def running(folder: Path, *command: object, **environment: str) -> Iterator[Running]:
    """Start a server in ``folder`` and wait until it says its port; kill it at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=output, text=True,
            start_new_session=True, cwd=folder,
            env={**os.environ, "TMPDIR": str(folder), "TVM_NUM_THREADS": "1", **environment},
        )  # fmt: skip
    made = Running(process, log, folder=folder)
    try:
        end = time.monotonic() + 120
        while made.port == 0:
            found = _BOUND.search(log.read_text())
            made.port = int(found[1]) if found else 0
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        yield made
    finally:
        made.signal(signal.SIGCONT)
        made.signal(signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def python_server(folder: Path, key: str, *words: object) -> Any:
    """Start TVM's own server; its ports begin at a free one."""
    port = free_port()
    return running(folder, sys.executable, "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1",
                   "--port", port, "--port-end", port + 100, "--key", key, *words)  # fmt: skip


def native_server(program: Path, folder: Path, key: str, *words: object) -> Any:
    """Start ``vitq_rpc_server``; the system chooses the port."""
    return running(folder, program, "--port", 0, "--key", key, *words)


def emulated_server(program: Path, folder: Path, key: str, cpu: str, *words: object) -> Any:
    """Start the server for AArch64 under qemu."""
    return running(folder, "qemu-aarch64", "-cpu", cpu, program, "--port", 0, "--key", key, *words,
                   QEMU_LD_PREFIX="/usr/aarch64-linux-gnu")  # fmt: skip


def tracker(folder: Path, port: int = 0) -> Any:
    """Start TVM's tracker; port 0 takes a free one."""
    port = port or free_port()
    return running(folder, sys.executable, "-m", "tvm.exec.rpc_tracker", "--host", "127.0.0.1",
                   "--port", port, "--port-end", port + 100)  # fmt: skip


def wait_for(what: str, log: Path, seconds: float = 30) -> None:
    """Wait until a log says something."""
    end = time.monotonic() + seconds
    while what not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)
