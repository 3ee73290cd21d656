"""Splices carry every byte both ways, stop reading when nobody takes, and end with either side."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fiber.runtime.loop import Event, Loop
from fiber.runtime.splice import Pipe, Splice
from fiber.wire.tls import TlsSocket, client_context, make_certificate, server_context

Ends = tuple[Any, Any, Callable[[], Any]]

PATIENCE = 20.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def over_tls() -> tuple[Any, TlsSocket]:
    """Two ends of a TLS connection, each ready for use; the first blocks."""
    certificate, key = make_certificate()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    made: list[TlsSocket] = []

    def accept() -> None:
        made.append(TlsSocket(server, server_context(certificate, key), server_side=True))
        made[0].handshake()

    thread = threading.Thread(target=accept)
    thread.start()
    client.settimeout(PATIENCE)
    tls = TlsSocket(client, client_context(certificate), server_side=False)
    tls.handshake()
    thread.join(PATIENCE)
    return tls, made[0]


def plain() -> tuple[Any, Any]:
    one, other = socket.socketpair()
    one.settimeout(PATIENCE)
    return one, other


@pytest.fixture(params=[plain, over_tls], ids=["unix", "tls"])
def ends(request: pytest.FixtureRequest, loop: Loop) -> Iterator[Ends]:
    """The two outer ends of a splice, and what waits for its end."""
    far, one = request.param()
    near, other = plain()
    ended = Event()
    with loop:
        Splice(loop, one, other, on_end=lambda splice: ended.set())
    yield far, near, lambda: loop.wait(ended, PATIENCE)
    far.close()
    near.close()
    assert loop.wait(ended, PATIENCE)


def receive(sock: Any, size: int, step: int = 1 << 16) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = sock.recv(min(step, size - len(data)))
        if not more:
            break
        data += more
    return bytes(data)


def test_every_byte_arrives_in_both_directions_at_once(ends: Ends) -> None:
    far, near, _ = ends
    there, back = random.randbytes(3_000_000), random.randbytes(2_000_000)
    senders = [
        threading.Thread(target=far.sendall, args=(there,)),
        threading.Thread(target=near.sendall, args=(back,)),
    ]
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(receive(near, len(there), 1000)))
    for thread in (*senders, reader):
        thread.start()
    assert receive(far, len(back)) == back
    for thread in (*senders, reader):
        thread.join(PATIENCE)
    assert got == [there]


def test_small_messages_go_back_and_forth(ends: Ends) -> None:
    far, near, _ = ends
    for number in range(300):
        message = b"%04d" % number
        far.sendall(message)
        assert receive(near, 4) == message
        near.sendall(message)
        assert receive(far, 4) == message


@pytest.mark.parametrize("first", ["far", "near"])
def test_what_was_sent_before_the_end_arrives_though_more_is_unread(ends: Ends, first: str) -> None:
    far, near, ended = ends
    one, other = (far, near) if first == "far" else (near, far)
    other.sendall(b"never read")
    one.sendall(bytes(100_000))
    # TCP itself may drop what is on its way when something unread is closed over.
    if isinstance(one, TlsSocket):
        one.deliver(PATIENCE)
        one.half_close()
    else:
        one.close()
    assert len(receive(other, 200_000)) == 100_000
    other.close()
    one.close()
    assert ended()


def test_who_is_not_read_is_stopped(ends: Ends) -> None:
    far, near, _ = ends
    near.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError, BlockingIOError):
        while sent < 64_000_000:
            sent += near.send(bytes(1 << 16))
    assert sent < 32_000_000, "the splice keeps whatever it is sent"
    assert len(receive(far, sent)) == sent


@pytest.mark.parametrize("writes", [False, True])
def test_a_pipe_is_carried_in_its_one_direction(loop: Loop, writes: bool) -> None:
    far, one = over_tls()
    read_end, write_end = os.pipe()
    ended = Event()
    carried, ours = (write_end, read_end) if writes else (read_end, write_end)
    with loop:
        can = (not writes, writes)
        Splice(loop, one, Pipe(carried), can, on_end=lambda splice: ended.set())
    data = random.randbytes(500_000)
    if writes:
        thread = threading.Thread(target=lambda: (far.sendall(data), far.half_close()))
        thread.start()
        with open(ours, "rb") as file:
            assert file.read() == data  # up to the end, which came along
        thread.join(PATIENCE)
    else:
        with open(ours, "wb") as file:
            thread = threading.Thread(target=lambda: (file.write(data), file.close()))
            thread.start()
            assert receive(far, len(data) + 1) == data
            thread.join(PATIENCE)
    far.close()
    assert loop.wait(ended, PATIENCE)
