"""One runner in a process of its own: ``python -m tvm_vitq.bench.worker SPEC``.

A process a runner keeps thread pools, environment variables and memory of the runtimes apart; all
but one sleep at any time. :class:`Worker` is the other end. Requests and replies are one JSON
document a line; whatever libraries print goes to standard error.

A *turn* is one run that brings the runner's weights back into the caches, and one that is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relay_passes.errors import VitqError

__all__ = ["Worker", "cores", "main"]


def cores(threads: int) -> list[int]:
    """Choose cores to pin to: of those this process may use, one thread of each core first.

    Raises
    ------
    VitqError
        If there are fewer than ``threads``.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise VitqError(f"--threads {threads}: this process may use {len(allowed)} cores only")

    def place_among_siblings(cpu: int) -> int:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            first = path.read_text().replace("-", ",").split(",")[0]
        except OSError:
            return 0
        return int(int(first) != cpu)

    return sorted(sorted(allowed, key=place_among_siblings)[:threads])


class Worker:
    """A runner in a child process; use it as a context manager.

    Parameters
    ----------
    name
        Name of the runner, for errors.
    spec
        What :func:`main` reads.
    """

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        self.name = name
        threads = str(spec["threads"])
        folder = Path(spec["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        pools = ("OMP", "MKL", "OPENBLAS", "TVM")
        self._log = (folder / "log.txt").open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tvm_vitq.bench.worker", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={
                **os.environ,
                **{f"{pool}_NUM_THREADS": threads for pool in pools},
                "TVM_BIND_THREADS": "0",  # the process is pinned as a whole
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            },
        )

    def __enter__(self) -> Worker:
        """Wait until the runner is prepared."""
        try:
            self._reply()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def ask(self, do: str, **more: Any) -> Any:
        """Send one request and return its reply."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def turn(self) -> float:
        """Run once untimed and once timed; return the seconds of the second."""
        return float(self.ask("turn"))

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = [text.strip() for text in self._log.read().splitlines() if text.strip()]
            raise VitqError(f"{self.name} ended with status {self._process.wait()}: "
                            + (said[-1][:200] if said else "no message"))  # fmt: skip
        reply = json.loads(line)
        if "error" in reply:
            raise VitqError(f"{self.name}: {reply['error']}")
        return reply["value"]


def _prepare(spec: dict[str, Any]) -> Callable[[], Any]:
    """Return a function that runs the spec's runner once."""
    if spec["runner"] == "tvm-vitq":
        from .compiled import Compiled

        return Compiled(spec["artifact"], spec["threads"]).run
    from .peer import FloatSource, Job
    from .peers import PEERS

    job = Job(
        FloatSource(**spec["model"]),
        None if spec["onnx"] is None else Path(spec["onnx"]),
        tuple(spec["shape"]),
        spec["threads"],
        Path(spec["folder"]),
    )
    return PEERS[spec["runner"]].prepare(job)


def _serve(spec: dict[str, Any], say: Callable[[Any], None]) -> None:
    run = _prepare(spec)
    run()
    say({"value": "ready"})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "warm":
            for _ in range(request["runs"]):
                run()
            say({"value": None})
        elif request["do"] == "turn":
            run()
            start = time.perf_counter()
            run()
            say({"value": time.perf_counter() - start})
        else:
            from .layers import profile

            say({"value": profile(spec["artifact"], spec["threads"], request["runs"])})


def main(arguments: list[str] | None = None) -> int:
    """Serve the runner that a JSON file describes; see :func:`tvm_vitq.bench.compare.compare`."""
    (path,) = arguments if arguments is not None else sys.argv[1:]
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    os.sched_setaffinity(0, spec["cores"])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: Any) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    try:
        _serve(spec, say)
    except Exception as why:
        lines = [line for line in str(why).splitlines() if line.strip()] or ["no message"]
        kind = "" if isinstance(why, VitqError) else f"{type(why).__name__}: "
        say({"error": kind + lines[-1].strip()[:300]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
