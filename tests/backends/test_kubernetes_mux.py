"""Many connections over one: the relay's two halves on real sockets, without a cluster."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fiber.backends.kubernetes import mux as module
from fiber.backends.kubernetes.forwarder import WebSocket, _frame
from fiber.backends.kubernetes.mux import FULL, WINDOW, Mux, Plain

Pair = tuple[socket.socket, socket.socket]
PATIENCE = 20.0


@pytest.fixture
def run() -> Iterator[Callable[[Mux, object], None]]:
    """Run a `Mux` in a thread; all are ended at the end of the test."""
    threads: list[tuple[Mux, threading.Thread]] = []

    def start(mux: Mux, carrier: object) -> None:
        def body() -> None:
            with contextlib.suppress(OSError):
                mux.run(carrier)

        thread = threading.Thread(target=body)
        thread.start()
        threads.append((mux, thread))

    yield start
    for mux, thread in threads:
        mux.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        mux.close()


@pytest.fixture
def target() -> Iterator[socket.socket]:
    """What the master listens on."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        listener.settimeout(PATIENCE)
        yield listener


@pytest.fixture
def way(run: Callable[[Mux, object], None], target: socket.socket) -> Iterator[Callable[[], Pair]]:
    """Return both ends of a new connection through the two halves: the worker's, the master's."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=200)
    listener.setblocking(False)
    near, far = socket.socketpair()
    address = target.getsockname()

    def connect() -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(address)
        return sock

    run(Mux(listener=listener), Plain(far))
    run(Mux(connect=connect), Plain(near))
    opened: list[socket.socket] = []

    def new() -> Pair:
        worker = socket.create_connection(listener.getsockname(), PATIENCE)
        master, _ = target.accept()
        master.settimeout(PATIENCE)
        opened.extend((worker, master))
        return worker, master

    yield new
    for sock in (*opened, listener):
        sock.close()


def receive(sock: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        data = sock.recv(size - len(found))
        assert data, f"it ended after {len(found)} of {size} bytes"
        found += data
    return bytes(found)


def stuff(sock: socket.socket, limit: int) -> int:
    """Send until it would block for a while; return how much went."""
    sock.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < limit:
            sent += sock.send(b"x" * 65536)
    return sent


def test_bytes_arrive_in_both_directions(way: Callable[[], Pair]) -> None:
    worker, master = way()
    worker.sendall(b"hello")
    assert receive(master, 5) == b"hello"
    master.sendall(b"world")
    assert receive(worker, 5) == b"world"


def test_many_connections_at_once(way: Callable[[], Pair]) -> None:
    pairs = [way() for _ in range(100)]
    for number, (worker, _) in enumerate(pairs):
        worker.sendall(b"%3d" % number)
    # They are accepted in the order in which they were opened.
    assert [int(receive(master, 3)) for _, master in pairs] == list(range(100))


def test_more_than_any_buffer_holds(way: Callable[[], Pair]) -> None:
    worker, master = way()
    data = os.urandom(8 * WINDOW)
    sender = threading.Thread(target=worker.sendall, args=(data,))
    sender.start()
    assert receive(master, len(data)) == data
    sender.join(PATIENCE)
    assert not sender.is_alive()


def test_an_end_is_the_end_of_one_direction(way: Callable[[], Pair]) -> None:
    worker, master = way()
    worker.sendall(b"question")
    worker.shutdown(socket.SHUT_WR)
    assert receive(master, 8) == b"question"
    assert master.recv(1) == b""
    master.sendall(b"answer")
    master.close()
    assert receive(worker, 6) == b"answer"
    assert worker.recv(1) == b""


def test_a_death_is_told_to_the_other_side(way: Callable[[], Pair]) -> None:
    worker, master = way()
    worker.close()
    assert master.recv(1) == b""
    worker, master = way()
    master.close()
    assert worker.recv(1) == b""


def test_a_connection_that_nobody_reads_holds_up_no_other(way: Callable[[], Pair]) -> None:
    stuck, unread = way()
    sent = stuff(stuck, 64 * WINDOW)
    # What went is in the kernel's buffers and in one credit, not in memory without a bound.
    assert sent < 32 * WINDOW
    worker, master = way()
    for _ in range(50):
        worker.sendall(b"x" * 100_000)
        assert len(receive(master, 100_000)) == 100_000
        master.sendall(b"y")
        assert receive(worker, 1) == b"y"
    # And when somebody reads, all of it is there.
    assert receive(unread, sent) == b"x" * sent


def test_nobody_listens(way: Callable[[], Pair], target: socket.socket) -> None:
    worker, _ = way()
    address = worker.getpeername()
    target.close()
    late = socket.create_connection(address, PATIENCE)
    with late, contextlib.suppress(ConnectionError):
        assert late.recv(1) == b""


def test_what_sends_more_than_it_may_loses_its_connection(
    run: Callable[[Mux, object], None], target: socket.socket
) -> None:
    near, far = socket.socketpair()
    far.settimeout(PATIENCE)

    def connect() -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock.setblocking(False)
        sock.connect_ex(target.getsockname())
        return sock

    run(Mux(connect=connect), Plain(near))
    far.sendall(module.HEADER.pack(7, module.OPEN, 0))
    master, _ = target.accept()
    chunk = module.HEADER.pack(7, module.DATA, 65536) + b"x" * 65536
    for _ in range(20 * WINDOW // 65536):
        far.sendall(chunk)
    kind = None
    while kind != module.RESET:
        _, kind, _ = module.HEADER.unpack(receive(far, module.HEADER.size))
    master.close()
    far.close()


def test_what_is_no_frame_ends_it(run: Callable[[Mux, object], None]) -> None:
    near, far = socket.socketpair()
    run(Mux(), Plain(near))
    far.settimeout(PATIENCE)
    far.sendall(module.HEADER.pack(1, module.DATA, FULL + 1))
    assert far.recv(100) == b""
    far.close()


def test_frames_of_a_websocket_in_any_pieces() -> None:
    near, far = socket.socketpair()
    websocket = WebSocket(near)
    bodies = [
        b"\0\x9e\x1b",
        b"\1\x9e\x1b",
        b"\0" + b"a" * 50,
        b"\0" + b"b" * 500,
        b"\0" + b"c" * 70_000,
    ]
    wire = b""
    for body in bodies:  # a server does not mask
        size = len(body)
        if size < 126:
            head = bytes([size])
        elif size < 65536:
            head = b"\x7e" + size.to_bytes(2, "big")
        else:
            head = b"\x7f" + size.to_bytes(8, "big")
        wire += b"\x82" + head + body
    found = b""
    for start in range(0, len(wire), 997):
        far.sendall(wire[start : start + 997])
        found += websocket.receive()
    assert found == b"a" * 50 + b"b" * 500 + b"c" * 70_000
    far.sendall(b"\x02\x03\0on" + b"\x80\x01e")  # one message in two fragments
    assert websocket.receive() == b"one"
    far.sendall(b"\x82\x05\1oops")
    with pytest.raises(ConnectionResetError, match="oops"):
        websocket.receive()
    near.close()
    far.close()


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
def test_what_a_websocket_sends_is_masked(size: int) -> None:
    body = os.urandom(size)
    frame = _frame(2, body)
    assert frame[0] == 0x82
    assert frame[1] & 0x80
    mask, masked = frame[len(frame) - size - 4 :][:4], frame[len(frame) - size :]
    assert bytes(byte ^ mask[i % 4] for i, byte in enumerate(masked)) == body


def relay(tmp_path: Path, candidates: list[str], **ports: int) -> subprocess.Popen[bytes]:
    import json

    about = {"candidates": candidates, "timeout": 2.0, "report": str(tmp_path / "report"), **ports}
    source = Path(module.__file__).read_text("utf-8")
    # As in a pod: the text alone, in a Python that has no Fiber.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", source, json.dumps(about)], cwd=tmp_path
    )


def test_a_relay_that_is_not_needed_says_so_and_ends(tmp_path: Path, target: socket.socket) -> None:
    port = target.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as other:
        closed = other.getsockname()[1]
    program = relay(tmp_path, [f"127.0.0.1:{closed}", f"127.0.0.1:{port}"], port=0, control=0)
    assert program.wait(PATIENCE) == 0
    assert (tmp_path / "report").read_text() == f'["127.0.0.1:{port}"]'


def test_a_new_connection_of_the_master_takes_the_place_of_the_old(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        port, control = a.getsockname()[1], b.getsockname()[1]
    program = relay(tmp_path, [], port=port, control=control)
    try:

        def connect() -> socket.socket:
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    sock = socket.create_connection(("127.0.0.1", control), PATIENCE)
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline
                    continue
                greeting = receive(sock, module.HEADER.size + 5)
                assert greeting.endswith(b"fiber")
                return sock

        with connect() as first, connect() as second:
            assert first.recv(100) == b""
            with socket.create_connection(("127.0.0.1", port), PATIENCE):
                number, kind, _ = module.HEADER.unpack(receive(second, module.HEADER.size))
                assert (number, kind) == (1, module.OPEN)
    finally:
        program.kill()
        program.wait()
