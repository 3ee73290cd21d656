"""A channel: what is posted arrives once and in order, whatever the socket takes at a time."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber.errors import AuthenticationError
from fiber.wire.auth import ListenerHandshake, new_secret
from fiber.wire.channel import Channel, connect
from fiber.wire.framing import Frame, encode


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = (Channel(sock) for sock in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def read(channel: Channel, count: int) -> list[Frame]:
    frames: list[Frame] = []
    while len(frames) < count:
        frames += channel.read()
    return frames


def test_frames_arrive_in_order(channels: tuple[Channel, Channel]) -> None:
    ours, theirs = channels
    for number in range(1_000):
        ours.post(number % 256, str(number).encode())
    assert ours.flush()
    assert [int(bytes(f.body)) for f in read(theirs, 1_000)] == list(range(1_000))


def test_both_ends_may_speak(channels: tuple[Channel, Channel]) -> None:
    ours, theirs = channels
    ours.send(1, b"ping", [b"with", b"", b"buffers"])
    [frame] = read(theirs, 1)
    theirs.send(frame.kind + 1, b"pong", frame.buffers)
    [frame] = read(ours, 1)
    assert (frame.kind, bytes(frame.body)) == (2, b"pong")
    assert [bytes(b) for b in frame.buffers] == [b"with", b"", b"buffers"]


def test_what_the_socket_does_not_take_stays_in_the_outbox(
    channels: tuple[Channel, Channel],
) -> None:
    ours, theirs = channels
    ours.sock.setblocking(False)
    theirs.sock.setblocking(False)
    sent = [(n % 200, os.urandom(n * 997 % 90_000), [os.urandom(n * 31)]) for n in range(100)]
    for message in sent:
        ours.post(*message)
    received: list[Frame] = []
    blocked = 0
    whole = False
    while not whole or len(received) < len(sent):
        whole = ours.flush()
        blocked += not whole
        try:
            received += theirs.read()
        except BlockingIOError:
            assert not whole
    assert blocked > 5
    assert [(f.kind, bytes(f.body), [bytes(f.buffers[0])]) for f in received] == sent


class Stingy(socket.socket):
    """A socket that takes as many bytes at a time as it is told to."""

    takes: Iterator[int]

    def _take(self, data: bytes) -> int:
        try:
            count = next(self.takes, len(data))
        except TypeError:
            count = len(data)
        if not count:
            raise BlockingIOError
        return super().send(data[:count])

    def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]
        return self._take(bytes(data))

    def sendmsg(self, buffers, *rest) -> int:  # type: ignore[no-untyped-def, override]
        return self._take(b"".join(bytes(b) for b in buffers))


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 255),
            st.binary(max_size=30),
            st.lists(st.binary(max_size=9), max_size=3),
        ),
        max_size=6,
    ),
    st.lists(st.integers(0, 40), max_size=40),
)
def test_partial_sends_lose_and_repeat_nothing(
    sent: list[tuple[int, bytes, list[bytes]]], takes: list[int]
) -> None:
    left, right = socket.socketpair()
    stingy = Stingy(fileno=left.detach())
    stingy.takes = iter(takes)
    ours, theirs = Channel(stingy), Channel(right)
    try:
        for message in sent:
            ours.post(*message)
        while not ours.flush():
            pass
        frames = read(theirs, len(sent))
        assert [(f.kind, bytes(f.body), [bytes(b) for b in f.buffers]) for f in frames] == sent
    finally:
        ours.close()
        theirs.close()


def test_more_pieces_than_one_system_call_takes(channels: tuple[Channel, Channel]) -> None:
    ours, theirs = channels
    buffers = [bytes([n % 256]) * 3 for n in range(5_000)]
    sender = threading.Thread(target=ours.send, args=(1, b"many", buffers))
    sender.start()
    [frame] = read(theirs, 1)
    sender.join()
    assert [bytes(b) for b in frame.buffers] == buffers


# Descriptors ------------------------------------------------------------------------------------


def pipes(count: int) -> list[tuple[int, int]]:
    return [os.pipe() for _ in range(count)]


def test_descriptors_arrive_with_their_frame_and_in_order(
    channels: tuple[Channel, Channel],
) -> None:
    ours, theirs = channels
    theirs.takes_fds = True
    made = pipes(4)
    for number, (_, write) in enumerate(made):
        ours.post(number, b"x" * 100, (), [write])
        ours.post(99, b"one without")
    ours.flush()
    frames = read(theirs, 8)
    assert [frame.kind for frame in frames] == [0, 99, 1, 99, 2, 99, 3, 99]
    assert len(theirs.fds) == 4
    for number, (read_end, write_end) in enumerate(made):
        fd = theirs.fds.popleft()
        os.write(fd, str(number).encode())
        os.close(fd)
        assert os.read(read_end, 10) == str(number).encode()
        os.close(write_end)  # what is sent stays the sender's
        assert os.read(read_end, 10) == b""
        os.close(read_end)


def test_descriptors_travel_once_though_the_frame_goes_in_parts(
    channels: tuple[Channel, Channel],
) -> None:
    ours, theirs = channels
    ours.sock.setblocking(False)
    theirs.takes_fds = True
    [(read_end, write_end)] = pipes(1)
    ours.post(1, b"y" * 5_000_000, (), [write_end])
    frames: list[Frame] = []
    while not frames:
        ours.flush()
        frames += theirs.read()
    assert len(frames[0].body) == 5_000_000
    assert len(theirs.fds) == 1
    os.close(write_end)
    os.close(read_end)


def test_close_closes_the_descriptors_that_nobody_took(
    channels: tuple[Channel, Channel],
) -> None:
    ours, theirs = channels
    theirs.takes_fds = True
    (first, first_write), (second, second_write) = pipes(2)
    ours.post(1, b"sent", (), [first_write])
    ours.flush()
    ours.post(1, b"never sent", (), [second_write])
    read(theirs, 1)
    ours.close()
    theirs.close()
    os.close(first_write)  # the sender's own
    os.close(second_write)
    for fd in (first, second):
        assert os.read(fd, 1) == b""  # no writer is left
        os.close(fd)


def test_a_peer_that_is_gone_is_an_error(channels: tuple[Channel, Channel]) -> None:
    ours, theirs = channels
    theirs.close()
    with pytest.raises(OSError):
        ours.send(1, b"hello?")
    with pytest.raises((EOFError, OSError)):
        ours.read()


# Connecting -------------------------------------------------------------------------------------


@pytest.fixture
def listener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_UNIX) as sock:
        path = tmp_path_factory.mktemp("s") / "s"
        sock.bind(str(path))
        sock.listen()
        yield sock, f"unix:{path}"


def serve(sock: socket.socket, secret: bytes, pieces: int, trailer: bytes = b"") -> None:
    """Do the listener's part of one handshake, `pieces` bytes at a time."""
    peer, _ = sock.accept()
    with peer:
        handshake = ListenerHandshake(secret)
        for at in range(0, len(handshake.greeting), pieces):
            peer.sendall(handshake.greeting[at : at + pieces])
        try:
            while (proof := handshake.feed(peer.recv(min(handshake.wants, pieces)))) is None:
                pass
        except AuthenticationError:
            return
        peer.sendall(proof + trailer)


@pytest.mark.parametrize("pieces", [1, 7, 1_000])
def test_connect_proves_itself_and_checks_the_listener(
    listener: tuple[socket.socket, str], pieces: int
) -> None:
    sock, address = listener
    secret = new_secret()
    trailer = b"".join(bytes(piece) for piece in encode(5, b"right behind"))
    thread = threading.Thread(target=serve, args=(sock, secret, pieces, trailer))
    thread.start()
    channel = connect(address, secret, 10)
    [frame] = read(channel, 1)
    assert (frame.kind, bytes(frame.body)) == (5, b"right behind")
    assert channel.sock.gettimeout() is None
    channel.close()
    thread.join()


def test_connect_with_another_secret_is_refused(listener: tuple[socket.socket, str]) -> None:
    sock, address = listener
    thread = threading.Thread(target=serve, args=(sock, new_secret(), 1_000))
    thread.start()
    with pytest.raises((AuthenticationError, OSError)):
        connect(address, new_secret(), 10)
    thread.join()


def test_connect_gives_up_on_a_listener_that_says_nothing(
    listener: tuple[socket.socket, str],
) -> None:
    with pytest.raises(TimeoutError):
        connect(listener[1], new_secret(), 0.2)


def test_connect_says_where_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect(f"unix:{tmp_path}/nobody", new_secret(), 1)


@pytest.mark.parametrize("address", ["", "http://example.org", "/tmp/x"])
def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(ValueError):
        connect(address, new_secret(), 1)
