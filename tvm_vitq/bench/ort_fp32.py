"""ONNX Runtime on the float model; the other ONNX Runtime peers open their sessions here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .peer import Job, Peer

__all__ = ["PEER", "prepare", "session"]


def session(job: Job, path: Path) -> Callable[[], Any]:
    """Open ``path`` with all graph optimisations; return a function that runs it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Between runs other runtimes have the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {found.get_inputs()[0].name: job.x}
    return lambda: found.run(None, feed)


def prepare(job: Job) -> Callable[[], Any]:
    """Open the float model."""
    return session(job, job.onnx_file)


PEER = Peer("ort-fp32", "fp32", "ONNX Runtime", ("onnxruntime",), prepare)
