"""``vitq_rpc_server`` under the sanitizers: sessions, and clients that are none."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.rpc import native_server, wait_for
from tvm_vitq.remote import Unreachable, connect
from tvm_vitq.remote.artifact import RemoteArtifact

KEY = "pi"
MAGIC = 0xFF271


def test_sessions_and_noise(sanitized: Path, toy: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [b"", b"GET / HTTP/1.1\r\n\r\n", struct.pack("<i", MAGIC),
             struct.pack("<ii", MAGIC, -1), struct.pack("<ii", MAGIC, 1 << 30),
             struct.pack("<ii", MAGIC, 0), struct.pack("<ii", MAGIC, 9) + b"client:pi",
             *(rng.bytes(int(size)) for size in rng.integers(1, 200, 20))]  # fmt: skip
    # What comes after a good handshake: a packet that lies about its size, or is none.
    hello = struct.pack("<ii", MAGIC, 9) + b"client:pi"
    noise += [hello + struct.pack("<Q", 2**62), hello + rng.bytes(64), hello + bytes(64)]
    program = sanitized / "vitq_rpc_server"
    with native_server(program, tmp_path / "s", KEY, "--accept-timeout", 1) as server:
        for text in noise:
            with (contextlib.suppress(OSError),
                  socket.create_connection(("127.0.0.1", server.port), 5) as client):  # fmt: skip
                client.sendall(text)
        with connect(server.address, KEY) as session:
            assert RemoteArtifact(toy, session).verify()["equal"]
        with pytest.raises(Unreachable, match="another key"):
            connect(server.address, "other")
        wait_for("it has another key", server.log)
        assert server.process.poll() is None
        said = server.log.read_text()
        assert "it does not speak TVM's RPC" in said and "left" in said
        # A packet of 2^62 bytes, if it is read before its client has gone: elsewhere an exception,
        # here the allocator's report; either ends that session's process and no other.
        said = re.sub(r"==\d+==ERROR: AddressSanitizer: requested allocation size 0x4c.*?ABORTING",
                      "", said, flags=re.DOTALL)  # fmt: skip
        assert "Sanitizer" not in said and "runtime error" not in said, said
    assert not list((tmp_path / "s").glob("vitq-rpc-*"))
