"""A connection by itself: its interface is multiprocessing's, and so is what it writes."""

from __future__ import annotations

import array
import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.connection import targets

import fiber
from fiber import connection
from fiber.connection import Connection

MakePipe = Callable[..., tuple[Connection, Connection]]
Start = Callable[..., fiber.Process]
Receive = Callable[[Any], Any]

MESSAGES = [
    None,
    0,
    "text " * 1000,
    b"\0" * 4095,
    b"\1" * 4096,
    b"\2" * 16_384,
    bytearray(b"\3" * 65_537),
    "ü" * 200_000,
    [b"a" * 100_000, "b" * 100_000, {"c": bytearray(c for c in b"c" * 100_000)}],
    list(range(50_000)),
]


def in_background(call: Callable[..., object], *args: object) -> threading.Thread:
    thread = threading.Thread(target=call, args=args, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("duplex", [True, False])
@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_what_is_sent_is_received(
    message: object, duplex: bool, pipe: MakePipe, receive: Receive
) -> None:
    receiver, sender = pipe(duplex)
    thread = in_background(sender.send, message)
    assert receive(receiver) == message
    thread.join(20)


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 16_385, 65_535, 65_536, 5_000_000])
def test_bytes_arrive_as_they_are(size: int, pipe: MakePipe) -> None:
    receiver, sender = pipe()
    data = os.urandom(size)
    thread = in_background(sender.send_bytes, data)
    assert receiver.recv_bytes() == data
    thread.join(20)
    thread = in_background(sender.send_bytes, data)
    room = bytearray(size + 3)
    assert receiver.recv_bytes_into(room, 3) == size
    assert room == b"\0\0\0" + data
    thread.join(20)


def test_lambdas_closures_and_what_they_hold_travel(pipe: MakePipe, receive: Receive) -> None:
    receiver, sender = pipe()
    factor = [3]
    sender.send({"triple": lambda x: factor[0] * x})
    assert receive(receiver)["triple"](7) == 21


def test_large_arrays_arrive(pipe: MakePipe, receive: Receive) -> None:
    numpy = pytest.importorskip("numpy")
    receiver, sender = pipe()
    arrays = [
        numpy.arange(200_000.0),
        numpy.arange(60_000).reshape(200, 300).T,  # Fortran's order
        numpy.arange(60_000)[::2],  # not in one piece
        numpy.zeros((0, 3)),
    ]
    thread = in_background(sender.send, arrays)
    received = receive(receiver)
    thread.join(20)
    for one, other in zip(arrays, received, strict=True):
        assert one.dtype == other.dtype
        assert (one == other).all()
        other += 1  # what was received is ours


@pytest.mark.parametrize("ours", ["fiber", "multiprocessing"])
@pytest.mark.parametrize("size", [1, 20_000, 3_000_000])
def test_the_other_end_may_be_of_multiprocessing(ours: str, size: int, pipe: MakePipe) -> None:
    one, other = pipe()
    plain = multiprocessing.connection.Connection(os.dup(other.fileno()))
    ends = (one, plain) if ours == "fiber" else (plain, one)
    with plain:
        for message in (b"x" * size, ["x" * size, size]):
            thread = in_background(ends[0].send, message)
            assert ends[1].recv() == message
            thread.join(20)


def test_it_is_a_connection_of_multiprocessing(pipe: MakePipe) -> None:
    one, other = pipe()
    assert isinstance(one, multiprocessing.connection.Connection)
    other.send("there")
    assert multiprocessing.connection.wait([one, other], 20) == [one]


def test_what_a_pipe_can_do(pipe: MakePipe) -> None:
    one, other = pipe()
    assert (one.readable, one.writable, other.readable, other.writable) == (True,) * 4
    reader, writer = pipe(False)
    assert (reader.readable, reader.writable) == (True, False)
    assert (writer.readable, writer.writable) == (False, True)
    with pytest.raises(OSError, match="read-only"):
        reader.send(1)
    with pytest.raises(OSError, match="write-only"):
        writer.recv()
    with pytest.raises(OSError, match="write-only"):
        writer.poll()


@pytest.mark.parametrize(
    "use",
    [
        lambda c: c.send(1),
        lambda c: c.send([1]),
        lambda c: c.recv(),
        lambda c: c.send_bytes(b"1"),
        lambda c: c.recv_bytes(),
        lambda c: c.recv_bytes_into(bytearray(1)),
        lambda c: c.poll(),
        lambda c: c.fileno(),
        lambda c: c.__enter__() and c.fileno(),
        pickle.dumps,
    ],
)
def test_a_closed_connection_says_so(use: Callable[[Connection], object], pipe: MakePipe) -> None:
    one, _ = pipe()
    assert not one.closed
    one.close()
    one.close()
    assert one.closed
    with pytest.raises(OSError, match="handle is closed"):
        use(one)


def test_a_with_statement_closes_it(pipe: MakePipe) -> None:
    one, other = pipe()
    with one, other:
        one.send(1)
        assert other.recv() == 1
    assert one.closed
    assert other.closed


def test_the_end_of_the_other_side(pipe: MakePipe, ended: Callable[[Any], None]) -> None:
    one, other = pipe()
    other.send("last words")
    other.close()
    assert one.recv() == "last words"
    ended(one)
    with pytest.raises(EOFError):
        one.recv_bytes()
    with pytest.raises(EOFError):
        one.recv_bytes_into(bytearray(10))
    with pytest.raises(BrokenPipeError):
        one.send("too late")
    with pytest.raises(BrokenPipeError):
        one.send(bytes(100_000))


@pytest.mark.parametrize("written", [b"\0", b"\0\0\0\4abc", b"\0\1\0\0" + b"x" * 65_535])
def test_an_end_within_a_message(written: bytes, pipe: MakePipe) -> None:
    reader, writer = pipe()
    os.write(writer.fileno(), written)
    writer.close()
    with pytest.raises(OSError, match="got end of file during message"):
        reader.recv_bytes()


def test_messages_that_do_not_fit(pipe: MakePipe) -> None:
    one, other = pipe()
    one.send_bytes(b"0123456789")
    room = bytearray(12)
    with pytest.raises(fiber.BufferTooShort) as caught:
        other.recv_bytes_into(room, 3)
    assert caught.value.args == (b"0123456789",)
    one.send_bytes(b"next")
    assert other.recv_bytes(4) == b"next"
    one.send_bytes(b"next")
    with pytest.raises(OSError, match="bad message length"):
        other.recv_bytes(3)
    assert not other.readable


@pytest.mark.parametrize(
    "room",
    [array.array("i", [0] * 6), (ctypes.c_int * 6)(), memoryview(bytearray(24))],
    ids=["array", "ctypes", "memoryview"],
)
def test_buffers_of_all_kinds(room: Any, pipe: MakePipe) -> None:
    one, other = pipe()
    sent = array.array("i", [1, 2, 3])
    one.send_bytes(sent)
    assert other.recv_bytes_into(room, 8) == 12
    assert bytes(room) == b"\0" * 8 + sent.tobytes() + b"\0" * 4


def test_wrong_arguments(pipe: MakePipe) -> None:
    one, other = pipe()
    for offset, size in [(-1, None), (5, None), (2, 3), (0, -1)]:
        with pytest.raises(ValueError):
            one.send_bytes(b"1234", offset, size)
    with pytest.raises(ValueError, match="negative maxlength"):
        other.recv_bytes(-1)
    for offset in (-1, 11):
        with pytest.raises(ValueError):
            other.recv_bytes_into(bytearray(10), offset)
    for handle in (-1, -7):
        with pytest.raises(ValueError):
            Connection(handle)
    with pytest.raises(ValueError):
        Connection(3, readable=False, writable=False)


def test_poll_waits_as_long_as_it_is_told_to(pipe: MakePipe) -> None:
    one, other = pipe()
    for timeout in (0, 0.0, -1, 0.05, 0.2):
        began = time.monotonic()
        assert one.poll(timeout) is False
        assert max(timeout, 0) <= time.monotonic() - began < 5
    threading.Timer(0.1, other.send, [1]).start()
    assert one.poll(None) is True
    assert one.poll() is True
    assert one.recv() == 1
    other.close()
    assert one.poll() is True  # there is an end to be received


def test_what_cannot_be_pickled_is_not_sent(pipe: MakePipe) -> None:
    one, other = pipe()
    with pytest.raises(fiber.SerializationError, match="this cannot be pickled"):
        one.send([1, targets.Unpicklable()])
    assert not other.poll()
    one.send("next")
    assert other.recv() == "next"


def test_two_processes_talk(pipe: MakePipe, start: Start, receive: Receive) -> None:
    ours, theirs = pipe()
    process = start(targets.echo, theirs)
    theirs.close()
    for message in MESSAGES:
        in_background(ours.send, message)
        assert receive(ours) == message
    ours.close()
    process.join(20)
    assert process.exitcode == 0


def test_what_multiprocessing_has_is_there() -> None:
    for name in dir(multiprocessing.connection):
        if not name.startswith("__"):
            assert hasattr(connection, name), name
    with pytest.raises(AttributeError):
        connection.nonsense  # noqa: B018
    assert connection.address_type(("localhost", 1)) == "AF_INET"
    assert connection.address_type("/tmp/a") == "AF_UNIX"


def test_a_connection_that_is_dropped_is_closed() -> None:
    one, other = connection.Pipe()
    del other
    with contextlib.closing(one), pytest.raises(EOFError):
        one.recv()
