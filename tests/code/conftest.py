"""A master that answers questions of code on a real TLS socket, and jobs on a bare interpreter."""

from __future__ import annotations

import contextlib
import marshal
import os
import pickle
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fiber.code import bootstrap, bundle, protocol
from fiber.code.project import Project
from fiber.code.server import Server
from fiber.errors import AuthenticationError
from fiber.wire.auth import ListenerHandshake, new_secret
from fiber.wire.channel import Channel
from fiber.wire.framing import Frame
from fiber.wire.tls import TlsSocket, make_certificate, server_context

ELSEWHERE = "fiber.runtime.elsewhere"


class Master:
    """Listens on a port of this machine.

    Attributes:
        asked: the questions, as kind and body.
        hellos: what came first on each connection.
        elsewhere: the source of a `fiber.runtime.elsewhere` that stands in for the real one.
        away: whether the files of Fiber get names that this machine does not have.
    """

    def __init__(self, project: Project, host: str = "127.0.0.1") -> None:
        self.secret = new_secret()
        self.certificate, self.key = make_certificate()
        self.context = server_context(self.certificate, self.key)
        self.asked: list[tuple[int, bytes]] = []
        self.hellos: list[dict[str, Any]] = []
        self.elsewhere: str | None = None
        self.away = False
        self.greeting: Callable[[bytes], bytes] = lambda greeting: greeting
        self._server = Server(project)
        self._sock = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        self._threads = [threading.Thread(target=self._accept)]
        self._connections: list[socket.socket] = []
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._sock.getsockname()[1]}"
        self._threads[0].start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(10)

    def hang_up(self) -> None:
        """Cut all connections."""
        for sock in self._connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def modules_asked(self) -> list[str]:
        return [body[4:].decode() for kind, body in self.asked if kind == protocol.MODULE]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, plain: socket.socket) -> None:
        self._connections.append(plain)
        sock = TlsSocket(plain, self.context, server_side=True)
        try:
            with contextlib.suppress(OSError, EOFError, AuthenticationError):
                sock.handshake()
                self._answer(sock)
        finally:
            sock.close()

    def _answer(self, sock: TlsSocket) -> None:
        handshake = ListenerHandshake(self.secret)
        sock.sendall(self.greeting(handshake.greeting))
        proof = None
        while proof is None:
            data = sock.recv(handshake.wants)
            if not data:
                return
            proof = handshake.feed(data)
        sock.sendall(proof)
        channel = Channel(sock)  # type: ignore[arg-type]
        first = True
        while True:
            for frame in channel.read():
                if first:
                    assert frame.kind == 1
                    self.hellos.append(pickle.loads(frame.body))
                    first = False
                else:
                    channel.send(*self._reply(frame))

    def _reply(self, frame: Frame) -> tuple[int, bytes]:
        body = bytes(frame.body)
        self.asked.append((frame.kind, body))
        kind, answer = self._server.answer(frame.kind, body)
        if kind == protocol.BUNDLE and self.elsewhere is not None:
            modules = marshal.loads(zlib.decompress(answer))
            if self.away:
                modules = {
                    name: (is_package, f"/nowhere{file}", source, None)
                    for name, (is_package, file, source, _) in modules.items()
                }
            modules[ELSEWHERE] = (False, "/home/elsewhere.py", self.elsewhere, None)
            answer = zlib.compress(marshal.dumps(modules))
        return kind, answer


@pytest.fixture
def master() -> Iterator[Master]:
    master = Master(Project())
    yield master
    master.close()


def bare_python() -> str:
    """Return the interpreter without the virtual environment that the tests run in."""
    return os.path.realpath(sys.executable)


Job = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def job(master: Master, tmp_path: Path) -> Job:
    """Run a job against `master` to its end: `job(elsewhere, environment={}, ...)`."""

    def run(
        elsewhere: str | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        python: str | None = None,
        flags: tuple[str, ...] = ("-I", "-S"),
        edit: Callable[[str], str] = lambda text: text,
    ) -> subprocess.CompletedProcess[str]:
        master.elsewhere = elsewhere
        secret = tmp_path / "secret"
        if not secret.exists():
            secret.write_bytes(master.secret)
        here = tmp_path / "job"
        here.mkdir(exist_ok=True)
        return subprocess.run(
            [python or bare_python(), *flags, "-c", edit(bootstrap.text())],
            env={
                "TESTS_OF_FIBER": os.environ["TESTS_OF_FIBER"],
                "FIBER_INTERNAL_MASTER": master.address,
                "FIBER_INTERNAL_CERTIFICATE": master.certificate.decode(),
                "FIBER_INTERNAL_SECRET_FILE": str(secret),
                "FIBER_INTERNAL_CODE": bundle.content_hash(),
                **(environment or {}),
            },
            cwd=here,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def other_python(version: str) -> str | None:
    """Return an interpreter of another version, None if this machine has none."""
    root = Path(bare_python()).parents[2]
    found = sorted(root.glob(f"{version}.*/bin/python{version}"))
    return str(found[0]) if found else None
