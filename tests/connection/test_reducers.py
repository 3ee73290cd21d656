"""What is registered with multiprocessing's ForkingPickler, and when Fiber heeds it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import pickle
import socket
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
from tests.connection import targets

import fiber
from fiber.connection import Connection
from fiber.wire.pickling import dumps, loads, pieces

MakePipe = Callable[..., tuple[Connection, Connection]]
Start = Callable[..., fiber.Process]
Receive = Callable[[Any], Any]


def say_how(connection: Connection, thing: Any) -> None:
    connection.send(thing.how)


def how(thing: Any) -> str:
    found: str = thing.how
    return found


@pytest.mark.parametrize("by_value", [False, True])
def test_what_is_passed_to_a_process_is_shared(
    by_value: bool, pipe: MakePipe, start: Start, receive: Receive
) -> None:
    ours, theirs = pipe()
    thing = targets.Registered("copied")
    if by_value:
        start(lambda: theirs.send(thing.how))
    else:
        start(say_how, theirs, thing)
    assert receive(ours) == "shared"


@pytest.mark.parametrize("beside", [None, lambda: None], ids=["by name", "by value"])
def test_what_is_sent_by_a_connection_is_shared(
    beside: object, pipe: MakePipe, receive: Receive
) -> None:
    ours, theirs = pipe()
    theirs.send([targets.Registered("copied"), beside])
    assert receive(ours)[0].how == "shared"


@pytest.mark.parametrize("beside", [None, lambda: None], ids=["by name", "by value"])
def test_a_pool_copies(beside: object) -> None:
    """A task may be run a second time elsewhere, and then what was shared might be gone."""
    thing = targets.Registered("copied")
    with fiber.Pool(1) as pool:
        assert pool.apply(how, (thing,)) == "copied"
        assert pool.apply(lambda: (thing.how, beside))[0] == "copied"


def test_what_is_registered_later_and_again() -> None:
    class Late:
        value = 0

    def of(value: int) -> tuple[Any, ...]:
        return int, (value,)

    ForkingPickler.register(Late, lambda late: of(1))
    try:
        assert loads(*dumps(Late(), share=True)[:2]) == 1
        ForkingPickler.register(Late, lambda late: of(2))
        assert loads(*dumps(Late(), share=True)[:2]) == 2
        assert pickle.loads(b"".join(pieces(Late()))) == 2
        assert loads(*dumps([Late(), lambda: None], share=True)[:2])[0] == 2
    finally:
        del ForkingPickler._extra_reducers[Late]  # type: ignore[attr-defined]
    assert type(loads(*dumps(Late(), share=True)[:2])).__name__ == "Late"


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("beside", [None, lambda: None], ids=["by name", "by value"])
def test_what_cannot_be_copied_is_handed_over(share: bool, beside: object) -> None:
    one, other = socket.socketpair()
    reader, writer = multiprocessing.Pipe(False)
    with one, other, reader, writer:
        packed = dumps([other, writer, beside], share=share)
        other.close()
        writer.close()
        sock, connection, _ = loads(packed.data, packed.buffers)
        with sock, connection:
            sock.sendall(b"hello")
            assert type(connection) is multiprocessing.connection.Connection
            connection.send("hello")
        one.settimeout(20)
        assert (one.recv(10), one.recv(10)) == (b"hello", b"")
        assert reader.poll(20)
        assert reader.recv() == "hello"
        with pytest.raises(EOFError):
            reader.recv()


def test_methods_and_partials_go_as_ever() -> None:
    """They are registered as well, for Pythons of long ago."""
    text = "a b"
    assert loads(*dumps(text.split, share=True)[:2])() == ["a", "b"]
    assert loads(*dumps(list.append, share=True)[:2]) is list.append
    assert loads(*dumps([text.split, lambda: None], share=True)[:2])[0]() == ["a", "b"]


@pytest.mark.parametrize("size", [10, 5_000, 70_000, 1_000_000])
def test_pieces_are_one_pickle(size: int) -> None:
    message = {
        "bytes": b"b" * size,
        "bytearray": bytearray(b"c" * size),
        "text": "t" * size,
        "numbers": list(range(size // 10)),
    }
    assert pickle.loads(b"".join(pieces(message))) == message
    for value in message.values():
        assert pickle.loads(b"".join(pieces(value))) == value


def test_large_pieces_are_the_objects_own_memory() -> None:
    memory = bytearray(1_000_000)
    packed = pieces(["before", memory])
    memory[:5] = b"later"  # nobody shall do this; it shows that there is no copy
    assert b"later" in b"".join(packed)
