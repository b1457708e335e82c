"""The other end of :mod:`tvm_vitq.tuning.worker`: a process that is started anew when it fails."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

__all__ = ["Child", "ChildFault"]

_START_SECONDS = 120.0


class ChildFault(Exception):
    """A request failed: an error in the worker, its end, or no answer in time."""


class Child:
    """One worker process; it starts with the first request, and again after a fault.

    Parameters
    ----------
    mode
        ``"build"`` or ``"run"``.
    target
        Name of the target.
    threads
        Of the kernels.
    cores
        Cores that it may use; none for all.
    """

    def __init__(
        self, mode: str, target: str, threads: int = 1, cores: Sequence[int] = ()
    ) -> None:
        self.mode = mode
        self.spec = {"target": target, "threads": threads, "cores": list(cores)}
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def ask(self, timeout: float, **request: Any) -> Any:
        """Send a request and return its reply.

        Raises
        ------
        ChildFault
            If there is an error or no reply in ``timeout`` seconds; then the process is ended.
        """
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self.close()
            raise ChildFault("the process has ended") from None
        reply = self._reply(timeout)
        if "error" in reply:
            if reply.get("ends"):
                self.close()
            raise ChildFault(reply["error"])
        return reply["value"]

    @property
    def alive(self) -> bool:
        """Whether the process runs: what it had loaded is still there."""
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        threads = str(self.spec["threads"])
        pools = ("OMP", "MKL", "OPENBLAS", "TVM")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._rest = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tvm_vitq.tuning.worker", self.mode, json.dumps(self.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends this
            env={
                **os.environ,
                **{f"{pool}_NUM_THREADS": threads for pool in pools},
                "TVM_BIND_THREADS": "0",
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            },
        )
        self._reply(_START_SECONDS)

    def _reply(self, timeout: float) -> Any:
        assert self._process is not None and self._process.stdout is not None
        end = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, end - time.monotonic())):
                    self.close()
                    raise ChildFault(f"no answer within {timeout:g} s")
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    said = self._last_words()
                    self.close()
                    raise ChildFault(f"the process has ended: {said}")
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def _last_words(self) -> str:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        status = self._process.returncode
        if status is not None and status < 0:
            return signal.Signals(-status).name
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line]
        return (lines or ["no message"])[-1][:200]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and compilers that it has started
        process.wait()
        for stream in (process.stdin, process.stdout, self._log):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
