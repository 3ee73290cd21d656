"""Strangers for tests: what they send, and a session that works while they do their worst."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fiber.runtime import session
from fiber.runtime.endpoint import HELLO
from fiber.wire.auth import CallerHandshake, new_secret
from fiber.wire.framing import HEADER, encode

PATIENCE = 20.0
HELLO_SIZE = 44

looked_up: list[str] = []
"""What was looked up for pickles in this process, since a test emptied it."""


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        looked_up.append(f"{args[0]}.{args[1]}")


sys.addaudithook(_audit)


class Bomb:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Live:
    """A session with a pool that works all the time, and says at the end that all was right."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.path = sockets_of(session.current().folder)[0]
        self._stop = threading.Event()
        self._rounds = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._is_complete()
        self.goes_on()

    def _is_complete(self) -> None:
        """Wait until all workers have connected, who would be among the strangers otherwise."""
        deadline = time.monotonic() + PATIENCE
        while self.pool.stats().ready < self.pool.stats().processes:
            assert time.monotonic() < deadline, "some workers do not come"
            time.sleep(0.001)

    def _work(self) -> None:
        wanted = [math.factorial(n % 50) for n in range(1_000)]
        try:
            while not self._stop.is_set():
                items = [n % 50 for n in range(1_000)]
                assert self.pool.map_async(math.factorial, items).get(PATIENCE) == wanted
                self._rounds += 1
        except BaseException as error:
            self._error = error

    def goes_on(self) -> None:
        """Wait until a map has begun and ended after now."""
        wanted = self._rounds + 2
        deadline = time.monotonic() + PATIENCE
        while self._rounds < wanted:
            assert self._error is None, self._error
            assert time.monotonic() < deadline, "the pool hangs"
            time.sleep(0.001)

    def end(self) -> None:
        self.goes_on()
        self._stop.set()
        self._thread.join(PATIENCE)
        assert self._error is None


def sockets_of(folder: str | Path) -> list[str]:
    return [str(p) for p in Path(folder).iterdir() if stat.S_ISSOCK(p.stat().st_mode)]


def call(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(path)
    return sock


def read_to_the_end(sock: socket.socket) -> bytes:
    """Return all that comes until the other side closes; fails if it does not."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(1 << 16):
            data += piece
    return data


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece
        data += piece
    return data


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# What strangers do ------------------------------------------------------------------------------

Attack = Callable[[socket.socket, bytes], object]


def random_bytes(sock: socket.socket, bomb: bytes) -> None:
    sock.sendall(random.Random(1).randbytes(5_000) + bomb)


def a_pickle(sock: socket.socket, bomb: bytes) -> None:
    sock.sendall(bomb)


def a_frame(sock: socket.socket, bomb: bytes) -> None:
    sock.sendall(b"".join(bytes(piece) for piece in encode(HELLO, bomb)))


def a_huge_length(sock: socket.socket, bomb: bytes) -> None:
    sock.sendall(HEADER.pack(HELLO, 0, (1 << 64) - 1) + bomb)


def http(sock: socket.socket, bomb: bytes) -> None:
    sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


def multiprocessing_connection(sock: socket.socket, bomb: bytes) -> None:
    sock.sendall(len(bomb).to_bytes(4, "big") + bomb)


def the_wrong_secret(sock: socket.socket, bomb: bytes) -> None:
    caller = CallerHandshake(new_secret())
    sock.sendall(caller.feed(read_exactly(sock, HELLO_SIZE)))
    sock.sendall(b"".join(bytes(piece) for piece in encode(HELLO, bomb)))


def no_proof(sock: socket.socket, bomb: bytes) -> None:
    caller = CallerHandshake(new_secret())
    answer = caller.feed(read_exactly(sock, HELLO_SIZE))[:HELLO_SIZE]
    sock.sendall((answer + bomb).ljust(HELLO_SIZE + 32, b"\0"))


def the_greeting_sent_back(sock: socket.socket, bomb: bytes) -> None:
    sock.sendall(read_exactly(sock, HELLO_SIZE) + bomb)


def another_version(sock: socket.socket, bomb: bytes) -> None:
    caller = CallerHandshake(new_secret())
    answer = bytearray(caller.feed(read_exactly(sock, HELLO_SIZE)))
    answer[9] ^= 64
    sock.sendall(answer + bomb)


ATTACKS: list[Attack] = [
    random_bytes,
    a_pickle,
    a_frame,
    a_huge_length,
    http,
    multiprocessing_connection,
    the_wrong_secret,
    no_proof,
    the_greeting_sent_back,
    another_version,
]
