"""One sitting at the device: tasks by importance, under a time limit, saved as they are done.

The tasks run in a child process. A kernel that hangs or ruins the CUDA context ends that child
only: its task is noted as failed, and another child goes on with the rest. The child never outlives
the sitting, however that ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .device import describe
from .results import Results
from .tasks import EXPECTED, LONGEST, Bundle, Ruined, Task, perform

__all__ = ["alone", "bound", "estimate", "pending", "sit", "work"]

_RUINED = 75
"""Exit status of a child whose CUDA context is no longer good."""
_GRACE = 5.0
_PR_SET_PDEATHSIG = 1


@contextmanager
def alone(bundle: Path) -> Iterator[None]:
    """Keep other sittings with the same bundle out, and turn SIGTERM into KeyboardInterrupt.

    Raises
    ------
    ValueError
        If there is another one.
    """
    handle = os.open(bundle, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"another run with {bundle} is under way: wait for it or end it") from None
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(handle)


def bound(parent: int) -> None:
    """Let the kernel end this process with its parent, whose process number is given."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the run that started this has ended")


def _stage(task: Task) -> str:
    return task.stage.partition("-")[0]


def estimate(task: Task, done: dict[str, float]) -> float:
    """Return the seconds a task will take: the longest of its stage so far, or a guess."""
    known = [seconds for key, seconds in done.items() if key.split("/")[0] == task.stage]
    return 1.2 * max(known) if known else float(EXPECTED[_stage(task)])


def pending(tasks: Sequence[Task], results: Results) -> list[Task]:
    """Return the tasks that are neither done nor failed."""
    state = results.document["tasks"]
    return [task for task in tasks if task.key not in state["done"]
            and task.key not in state["failed"]]  # fmt: skip


def work(
    bundle: Bundle, tasks: Sequence[Task], out: Path, device: str, deadline: float,
    note: Callable[[Task], None] = lambda _: None,
) -> int:  # fmt: skip
    """Do tasks in this process until the time is up.

    Parameters
    ----------
    bundle, tasks
    out
        The results file.
    device
        ``cuda`` or ``cpu``.
    deadline
        ``time.time()`` at which the last task should have ended.
    note
        Called with each task before it begins.

    Returns
    -------
    int
        0, or the status of a process that must not go on.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(bundle.folder / ".cache" / "inductor"))
    results = Results.open(out, describe(device), bundle.identity())
    state = results.document["tasks"]
    left = pending(tasks, results)
    for place, task in enumerate(left, 1):
        needs = estimate(task, state["done"])
        if time.time() + needs > deadline:
            state["skipped"][task.key] = f"no time left: about {needs:.0f} s needed"
            results.save()
            continue
        state["skipped"].pop(task.key, None)
        note(task)
        print(f"[{place}/{len(left)}] {task.key}", flush=True)
        start = time.time()
        try:
            perform(task, bundle, results, device,
                    lambda text: print(f"    {text}", flush=True))  # fmt: skip
        except Ruined:
            results.save()
            return _RUINED
        except Exception as why:
            lines = [line for line in str(why).splitlines() if line.strip()]
            state["failed"][task.key] = f"{type(why).__name__}: {(lines or [''])[0][:300]}"
            results.save()
            traceback.print_exc()
            if device == "cuda" and "CUDA" in str(why):
                return _RUINED
        else:
            state["done"][task.key] = round(time.time() - start, 1)
            results.save()
    results.save()
    return 0


def sit(
    bundle: Bundle, tasks: Sequence[Task], out: Path, device: str, budget: float,
    arguments: Sequence[str],
) -> Results:  # fmt: skip
    """Do tasks in child processes until the time is up.

    Parameters
    ----------
    bundle, tasks, out, device
        As for :func:`work`.
    budget
        Seconds.
    arguments
        Command line of the child, which calls :func:`work` with ``--current FILE``.

    Returns
    -------
    Results
        What is known now.

    Raises
    ------
    ValueError
        If the results file is of another device or bundle.
    """
    deadline = time.time() + budget
    identity: tuple[dict[str, Any], dict[str, Any]] = (describe(device), bundle.identity())
    results = Results.open(out, *identity)
    results.save()
    current = out.with_name(out.name + ".current")
    while pending(tasks, results) and time.time() < deadline:
        current.unlink(missing_ok=True)
        child = subprocess.Popen(
            [*arguments, "--current", str(current), "--deadline", str(deadline),
             "--parent", str(os.getpid())],
            start_new_session=True,
        )  # fmt: skip
        try:
            ended = _watch(child, current, tasks, deadline)
        except BaseException:
            _end(child)
            current.unlink(missing_ok=True)
            raise
        results = Results.open(out, *identity)
        if ended is None and child.returncode == 0:
            break
        if ended is None and child.returncode == _RUINED:
            continue  # the worker has noted what failed
        key = current.read_text(encoding="utf-8").split()[0] if current.is_file() else ""
        if not key:
            print(f"the worker ended with status {child.returncode}", file=sys.stderr)
            break
        state = results.document["tasks"]
        if key not in state["done"] and key not in state["failed"]:
            if ended == "the time was up":
                state["skipped"][key] = ended
            else:
                state["failed"][key] = ended or f"the process ended with status {child.returncode}"
                print(f"    failed: {state['failed'][key]}", flush=True)
            results.save()
    current.unlink(missing_ok=True)
    return results


def _watch(
    child: subprocess.Popen[bytes], current: Path, tasks: Sequence[Task], deadline: float
) -> str | None:
    """Wait for a child; end it, and say why, when its task or the whole takes too long."""
    longest = {task.key: LONGEST[_stage(task)] for task in tasks}
    while True:
        try:
            child.wait(0.3)
            return None
        except subprocess.TimeoutExpired:
            pass
        why = ""
        if time.time() > deadline + _GRACE:
            why = "the time was up"
        elif current.is_file():
            key, _, since = current.read_text(encoding="utf-8").partition(" ")
            if since and time.time() - float(since) > longest[key]:
                why = f"no answer in {longest[key]} s"
        if why:
            _end(child)
            return why


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child and what it started."""
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
