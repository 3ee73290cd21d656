"""Frames on a stream: however it is cut, the same frames come out, and no size is trusted."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiber.wire.framing import (
    HEADER,
    MAX_BUFFERS,
    MAX_SIZE,
    READ_SIZE,
    Frame,
    FrameError,
    FrameReader,
    encode,
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Message = tuple[int, bytes, list[bytes]]

messages = st.lists(
    st.tuples(
        st.integers(0, 255),
        st.binary(max_size=40),
        st.lists(st.binary(max_size=20), max_size=4),
    ),
    max_size=8,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def stream_of(sent: Sequence[Message]) -> bytes:
    return b"".join(bytes(piece) for message in sent for piece in encode(*message))


def plain(frames: Sequence[Frame]) -> list[Message]:
    return [(f.kind, bytes(f.body), [bytes(b) for b in f.buffers]) for f in frames]


def reader() -> FrameReader:
    return FrameReader(None)  # type: ignore[arg-type]  # `feed` alone needs no socket


@given(messages, st.data())
def test_frames_do_not_depend_on_how_the_stream_is_cut(
    sent: list[Message], data: st.DataObject
) -> None:
    stream = stream_of(sent)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20).map(sorted))
    receiver, received = reader(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += receiver.feed(stream[start:stop])
    assert plain(received) == sent


@given(messages)
def test_frames_arrive_byte_by_byte(sent: list[Message]) -> None:
    receiver, received = reader(), []
    for byte in stream_of(sent):
        received += receiver.feed(bytes([byte]))
    assert plain(received) == sent


@given(messages)
def test_frames_come_as_soon_as_their_last_byte(sent: list[Message]) -> None:
    receiver = reader()
    for message in sent:
        stream = stream_of([message])
        assert receiver.feed(stream[:-1]) == []
        assert plain(receiver.feed(stream[-1:])) == [message]


@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [1 << 16],
        [(1 << 16) - 1, (1 << 16) + 1],
        [READ_SIZE, 0, READ_SIZE + 1],
        [50 << 20],
        [5, 3 << 20, 0, 0, 70_000, 1],
    ],
    ids=str,
)
@pytest.mark.parametrize("body", [0, 1, 100_000])
def test_large_buffers_arrive_whole(
    pair: tuple[socket.socket, socket.socket], sizes: list[int], body: int
) -> None:
    sent: list[Message] = [
        (7, b"b" * body, [bytes([65 + i]) * size for i, size in enumerate(sizes)]),
        (8, b"and then a small one", []),
        (9, b"x" * body, []),
    ]
    sender = threading.Thread(target=pair[0].sendall, args=(stream_of(sent),))
    sender.start()
    receiver, received = FrameReader(pair[1]), []
    while len(received) < len(sent):
        received += receiver.read()
    sender.join()
    assert plain(received) == sent


def test_large_buffers_are_received_in_place(pair: tuple[socket.socket, socket.socket]) -> None:
    size = 40 << 20
    payload = stream_of([(1, b"", [bytes(size)])])
    sender = threading.Thread(target=pair[0].sendall, args=(payload,))
    receiver, received = FrameReader(pair[1]), []
    tracemalloc.start()
    try:
        sender.start()
        while not received:
            received += receiver.read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        sender.join()
    assert peak < size + (4 << 20)


def test_received_buffers_can_be_written_to() -> None:
    [frame] = reader().feed(stream_of([(1, b"", [b"abc"])]))
    frame.buffers[0][0:1] = b"x"  # type: ignore[index]
    assert bytes(frame.buffers[0]) == b"xbc"


@pytest.mark.parametrize("size", [MAX_SIZE + 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("where", ["body", "buffer"])
def test_a_size_over_the_limit_is_refused_before_memory_is_taken(size: int, where: str) -> None:
    if where == "body":
        stream = HEADER.pack(1, 0, size)
    else:
        stream = HEADER.pack(1, 2, 10) + struct.pack("!2Q", 10, size)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match=str(size)):
            reader().feed(stream)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_size_for_which_there_is_no_memory_is_a_frame_error(run_script: Run) -> None:
    """So that it costs one channel, and not the process. In a program of its own, with a limit."""
    program = """
import resource, struct
from fiber.wire.framing import HEADER, FrameError, FrameReader
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for stream in (HEADER.pack(1, 0, 1 << 37), HEADER.pack(1, 1, 1) + struct.pack("!Q", 1 << 33)):
    try:
        FrameReader(None).feed(stream)
    except FrameError as error:
        print(error)
"""
    done = run_script(program, timeout=20)
    assert done.stdout.count("memory") == 2, done.stderr


def test_more_buffers_than_a_frame_holds_are_refused_by_the_sender() -> None:
    with pytest.raises(ValueError, match=str(MAX_BUFFERS)):
        encode(1, b"", [b"x"] * (MAX_BUFFERS + 1))
    assert len(stream_of([(1, b"", [b""] * MAX_BUFFERS)])) == 16 + 8 * MAX_BUFFERS


def test_the_end_of_the_stream_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(stream_of([(1, b"whole", [])]) + b"half of a hea")
    pair[0].close()
    receiver = FrameReader(pair[1])
    assert plain(receiver.read()) == [(1, b"whole", [])]
    with pytest.raises(EOFError):
        receiver.read()


def test_the_end_within_a_large_buffer_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(stream_of([(1, b"", [bytes(100_000)])])[:1_000])
    pair[0].close()
    receiver = FrameReader(pair[1])
    with pytest.raises(EOFError):
        list(iter(receiver.read, None))


def test_a_socket_that_does_not_block_says_so(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        FrameReader(pair[1]).read()


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=10))
def test_noise_never_takes_more_than_it_is_worth(noise: list[bytes]) -> None:
    """Bytes without meaning are either refused or waited for; small headers keep memory small."""
    receiver = reader()
    for piece in noise:
        # Sizes of at most 24 bits, so that no piece of noise asks for gigabytes.
        stream = HEADER.pack(piece[0], 0, len(piece)) + piece
        assert plain(receiver.feed(stream)) == [(piece[0], piece, [])]
