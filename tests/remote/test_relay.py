"""The relay and time: replies that stop halfway, long requests, clients that are slow to read."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable

from tvm_vitq.remote.relay import MAGIC, Relay, receive

LIMIT = 0.6
Serve = Callable[[socket.socket], None]


def _open(serve: Serve) -> tuple[Relay, socket.socket]:
    """Return a relay to a board that shakes hands and then does as told, and its client."""
    listening = socket.create_server(("127.0.0.1", 0))

    def board() -> None:
        with listening, listening.accept()[0] as end:
            _, size = struct.unpack("<ii", receive(end, 8))
            receive(end, size)
            end.sendall(struct.pack("<ii", MAGIC, 6) + b"server")
            serve(end)

    threading.Thread(target=board, daemon=True).start()
    relay = Relay("127.0.0.1", listening.getsockname()[1], "", 5, LIMIT)
    client = socket.create_connection(("127.0.0.1", relay.port), 10)
    key = f"client:{relay.token}".encode()
    client.sendall(struct.pack("<ii", MAGIC, len(key)) + key)
    assert receive(client, 14) == struct.pack("<ii", MAGIC, 6) + b"server"
    return relay, client


def _packet(body: bytes) -> bytes:
    return struct.pack("<Q", len(body)) + body


def test_a_reply_that_is_begun_and_not_ended() -> None:
    for begun in (_packet(bytes(99))[:50], _packet(bytes(99))[:5],
                  _packet(b"first") + _packet(b"second")[:9]):  # fmt: skip
        over = threading.Event()

        def serve(end: socket.socket, begun: bytes = begun, over: threading.Event = over) -> None:
            end.recv(99)
            end.sendall(begun)
            over.wait(10)

        relay, client = _open(serve)
        with client:
            client.sendall(_packet(b"request"))
            start = time.monotonic()
            assert receive(client, len(begun)) == begun
            assert client.recv(1) == b"" and relay.late and not relay.gone
            assert LIMIT <= time.monotonic() - start < 5
        over.set()


def test_a_whole_reply_may_be_followed_by_silence() -> None:
    reply = _packet(b"first") + _packet(b"") + _packet(bytes(300_000))

    def serve(end: socket.socket) -> None:
        end.recv(99)
        for start in (0, 3, 8, 100, 200_000):  # in parts that no packet ends with
            stop = {0: 3, 3: 8, 8: 100, 100: 200_000}.get(start, len(reply))
            end.sendall(reply[start:stop])
        end.recv(99)

    relay, client = _open(serve)
    with client:
        client.sendall(_packet(b"request"))
        assert receive(client, len(reply)) == reply
        time.sleep(2 * LIMIT)
        assert not relay.late


def test_a_client_that_does_not_read_is_not_the_board_s_silence() -> None:
    reply = _packet(bytes(32 << 20))  # more than the system's queues hold

    def serve(end: socket.socket) -> None:
        end.recv(99)
        end.sendall(reply)
        end.recv(99)

    relay, client = _open(serve)
    with client:
        client.sendall(_packet(b"request"))
        time.sleep(3 * LIMIT)
        assert receive(client, len(reply)) == reply and not relay.late


def test_a_long_request_may_be_followed_by_silence() -> None:
    """Bytes that leave the queue late, when the reply is there already, owe nothing."""
    request = _packet(bytes(32 << 20))

    def serve(end: socket.socket) -> None:
        time.sleep(LIMIT / 2)  # the queue fills
        receive(end, len(request))
        end.sendall(_packet(b"reply"))
        end.recv(99)

    relay, client = _open(serve)
    with client:
        client.sendall(request)
        assert receive(client, 13) == _packet(b"reply")
        time.sleep(2 * LIMIT)
        assert not relay.late
