"""wait: for connections, sockets and the ends of processes together."""

from __future__ import annotations

import multiprocessing.connection
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.connection import targets

import fiber
from fiber.connection import Connection, wait

MakePipe = Callable[..., tuple[Connection, Connection]]
Start = Callable[..., fiber.Process]
Receive = Callable[[Any], Any]

DEADLINE = 20


def test_for_messages_of_many_processes(pipe: MakePipe, start: Start) -> None:
    readers = []
    for number in range(4):
        reader, writer = pipe(False)
        start(say_some, writer, number)
        writer.close()
        readers.append(reader)
    found: list[tuple[int, int]] = []
    while readers:
        ready = wait(readers, DEADLINE)
        assert ready
        for reader in ready:
            try:
                found.append(reader.recv())
            except EOFError:
                readers.remove(reader)
    assert sorted(found) == [(number, i) for number in range(4) for i in range(10)]


def say_some(writer: Connection, number: int) -> None:
    for i in range(10):
        writer.send((number, i))


@pytest.mark.parametrize("way", ["wait of fiber", "wait of multiprocessing"])
def test_for_the_end_of_a_process(way: str, pipe: MakePipe, start: Start, receive: Receive) -> None:
    wait_for = wait if way == "wait of fiber" else multiprocessing.connection.wait
    ours, theirs = pipe()
    first = start(targets.echo, theirs)
    second = start(targets.hold)
    assert wait_for([first.sentinel, second.sentinel], 0.1) == []
    second.kill()
    assert wait_for([first.sentinel, ours, second.sentinel], DEADLINE) == [second.sentinel]
    second.join(DEADLINE)
    assert second.exitcode == -9
    assert wait_for([second.sentinel], 0) == [second.sentinel]  # it stays ended
    ours.send("message")
    assert wait_for([ours, first.sentinel], DEADLINE) == [ours]
    assert receive(ours) == "message"
    theirs.close()
    ours.close()
    assert wait_for([first.sentinel], DEADLINE) == [first.sentinel]


def test_a_sentinel_of_what_has_ended_is_ready(start: Start) -> None:
    process = start(os._exit, 3)
    process.join(DEADLINE)
    assert wait([process.sentinel], DEADLINE) == [process.sentinel]


def test_for_all_that_has_a_descriptor(pipe: MakePipe) -> None:
    one, other = pipe()
    first, second = socket.socketpair()
    reader, writer = os.pipe()
    with first, second:
        try:
            everything = [one, first, reader]
            assert wait(everything, 0) == []
            other.send(1)
            second.send(b"2")
            os.write(writer, b"3")
            assert wait(everything, DEADLINE) == everything
        finally:
            os.close(reader)
            os.close(writer)


@pytest.mark.parametrize("timeout", [0, -1, 0.05])
def test_it_waits_no_longer_than_it_is_told_to(timeout: float, pipe: MakePipe) -> None:
    began = time.monotonic()
    assert wait(list(pipe()), timeout) == []
    assert max(timeout, 0) <= time.monotonic() - began < 5


def test_without_a_time_out_it_waits(pipe: MakePipe) -> None:
    one, other = pipe()
    threading.Timer(0.2, other.send, [1]).start()
    assert wait([one]) == [one]


def test_for_a_connection_that_was_sent(pipe: MakePipe, start: Start, receive: Receive) -> None:
    control, theirs = pipe()
    process = start(targets.send_an_end_and_wait, theirs)
    theirs.close()
    with receive(control) as given:
        given.send(1)
        assert wait([control, given], DEADLINE)
        assert receive(control) == 2
        assert wait([given, process.sentinel], DEADLINE)
        process.join(DEADLINE)
        assert set(wait([given, process.sentinel], DEADLINE)) == {given, process.sentinel}
