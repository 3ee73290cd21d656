"""Fixtures of the tests of connections: pipes and processes, which do not outlive the test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fiber
from fiber.connection import Connection, Pipe

DEADLINE = 20.0


@pytest.fixture
def pipe() -> Iterator[Callable[..., tuple[Connection, Connection]]]:
    """`pipe(duplex=True)` returns the ends of a pipe; they are closed after the test."""
    made: list[Connection] = []

    def make(duplex: bool = True) -> tuple[Connection, Connection]:
        ends = Pipe(duplex)
        made.extend(ends)
        return ends

    yield make
    for connection in made:
        connection.close()


@pytest.fixture
def start() -> Iterator[Callable[..., fiber.Process]]:
    """`start(target, *args)` starts a process; what still runs after the test is killed."""
    processes: list[fiber.Process] = []

    def run(target: Callable[..., Any], *args: Any) -> fiber.Process:
        process = fiber.Process(target=target, args=args)
        process.start()
        processes.append(process)
        return process

    yield run
    for process in processes:
        with contextlib.suppress(ValueError):  # the test has closed it
            process.kill()
            process.join(DEADLINE)
            process.close()


@pytest.fixture
def receive() -> Callable[[Any], Any]:
    """`receive(connection)` returns the next message, or fails when none comes in 20 s."""
    return _receive


def _receive(connection: Any) -> Any:
    assert connection.poll(DEADLINE), f"nothing came in {DEADLINE:g} s"
    return connection.recv()


@pytest.fixture
def ended() -> Callable[[Any], None]:
    """`ended(connection)` fails unless the other end is closed, everywhere, within 20 s."""

    def check(connection: Any) -> None:
        with pytest.raises(EOFError):
            pytest.fail(f"there is a message: {_receive(connection)}")

    return check
