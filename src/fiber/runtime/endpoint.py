"""The endpoint: where other processes of the session connect to this one.

    accept ─► (TLS) ─► ListenerHandshake ─► hello frame with a token ─► whoever expects that token

It is a Unix socket and, from when processes elsewhere are to reach it, a TCP port behind TLS.

Nothing of a peer is unpickled before its handshake is done. Handshakes have a deadline and are
limited in number: when there are too many the oldest goes, for those of our own take milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fiber.errors import AuthenticationError
from fiber.runtime.link import Link
from fiber.runtime.logs import DEBUG, WARNING, log
from fiber.runtime.loop import Loop
from fiber.runtime.poller import READ, WRITE
from fiber.wire.auth import ListenerHandshake
from fiber.wire.channel import Channel
from fiber.wire.framing import Buffer, Frame

if TYPE_CHECKING:
    import ssl

__all__ = ["HELLO", "Endpoint"]


HELLO = 1
"""Kind of the first frame of a caller: a pickled dictionary with its `token` or a `service`."""

HANDSHAKE_TIMEOUT = 10.0  # seconds
MAX_HANDSHAKES = 256
_MAX_REASONS = 12
_PAUSE = 0.1  # seconds

_CLOSED = "it closed the connection before it said who it is"  # as a worker does that is killed
_LATE = "nobody expects it any more"  # as when a pool is terminated while a worker starts

Expected = Callable[[Link, dict[str, Any]], object]


class Endpoint:
    """A listening socket in the loop. All methods within the loop.

    Args:
        loop: which one.
        path: of the Unix socket, in a folder that only this user can enter.
        secret: of the session.
    """

    def __init__(self, loop: Loop, path: str, secret: bytes) -> None:
        self.address = f"unix:{path}"
        self._loop = loop
        self._path = path
        self._secret = secret
        self._expected: dict[str, Expected] = {}
        self._services: dict[str, Expected] = {}
        self._strangers: dict[_Caller, None] = {}  # in the order of their arrival
        self._told: set[str] = set()
        self._port: _Port | None = None
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(path)
        self._sock.listen(4096)
        self._sock.setblocking(False)
        loop.register(self._sock.fileno(), READ, lambda events: self._accept(self._sock))

    def listen(self, context: ssl.SSLContext, port: int = 0) -> int:
        """Listen for TCP as well, on all interfaces; return the port, one that is free if 0.

        Raises:
            OSError: the port cannot be had.
        """
        if self._port is None:
            self._port = _Port(context, port)
            sock = self._port.sock
            self._loop.register(sock.fileno(), READ, lambda events: self._accept(sock, context))
        return self._port.number

    def expect(self, token: str, arrived: Expected) -> None:
        """Have `arrived(link, hello)` called, once, when the holder of `token` connects.

        It sets the link's `on_frame` and `on_lost`, or raises, which closes the link.
        """
        self._expected[token] = arrived

    def serve(self, service: str, arrived: Expected) -> None:
        """Have `arrived(link, hello)` called for every caller that asks for `service`."""
        self._services[service] = arrived

    def withdraw(self, service: str) -> None:
        """Serve it no more."""
        self._services.pop(service, None)

    def forget(self, token: str) -> None:
        """Expect `token` no more."""
        self._expected.pop(token, None)

    def drain(self) -> None:
        """Handle the hello of every caller that has sent it."""
        for caller in list(self._strangers):
            caller.drain()

    def close(self) -> None:
        """Stop listening and remove the socket's file."""
        for caller in list(self._strangers):
            caller.close()
        self._loop.unregister(self._sock.fileno())
        self._sock.close()
        if self._port is not None:
            self._loop.unregister(self._port.sock.fileno())
            self._port.sock.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def abandon(self) -> None:
        """After a fork, in the child: close our copies of what listens, and of who calls."""
        self._sock.close()
        if self._port is not None:
            self._port.sock.close()
        for caller in self._strangers:
            caller.abandon()

    def _accept(self, listener: socket.socket, context: ssl.SSLContext | None = None) -> None:
        for _ in range(64):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:  # it left while it waited, as some systems tell
                continue
            except OSError as error:  # out of descriptors: it stays in the queue, so wait a little
                self._refuse(f"it could not be accepted: {error.strerror}")
                self._loop.modify(listener.fileno(), 0)
                self._loop.call_later(_PAUSE, lambda: self._listen_again(listener))
                return
            if len(self._strangers) >= MAX_HANDSHAKES:
                oldest = next(iter(self._strangers))
                oldest.refuse("too many connections have not finished their handshake")
            caller = _Caller(self, sock, context)
            self._strangers[caller] = None
            caller.begin()

    def _listen_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.modify(listener.fileno(), READ)

    def _refuse(self, reason: str) -> None:
        """Say once for each reason that somebody was refused; more of the same is for debugging."""
        # A stranger can make up versions by the thousand: at some point it is enough.
        known = reason in self._told or len(self._told) >= _MAX_REASONS
        level = DEBUG if known or reason in (_CLOSED, _LATE) else WARNING
        if level == WARNING:
            self._told.add(reason)
        log(level, "refused a connection to %s: %s", self.address, reason)


def _unpickle(body: Buffer) -> Any:
    """Return what a peer that has proved itself sent; None if that cannot be read.

    A session's own processes send nothing of the kind; who does loses its connection, and no more.
    """
    try:
        return pickle.loads(body)
    except Exception as error:
        log(DEBUG, "a hello cannot be unpickled: %r", error)
        return None


class _Port:
    """A TCP port on all interfaces, of IPv6 as well where there is that."""

    def __init__(self, context: ssl.SSLContext, port: int) -> None:
        self.context = context
        try:
            self.sock = socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
            )
        except (OSError, ValueError):
            self.sock = socket.create_server(("", port), backlog=4096)
        self.sock.setblocking(False)
        self.number: int = self.sock.getsockname()[1]


class _Caller:
    """A connection whose handshake is not done."""

    def __init__(
        self, endpoint: Endpoint, sock: socket.socket, context: ssl.SSLContext | None
    ) -> None:
        self._endpoint = endpoint
        self._loop = endpoint._loop
        self._sock: Any = sock  # or a TlsSocket
        self._context = context
        self._handshake = ListenerHandshake(endpoint._secret)
        self._link: Link | None = None
        late = f"its handshake took more than {HANDSHAKE_TIMEOUT:.0f} seconds"
        self._timer = self._loop.call_later(HANDSHAKE_TIMEOUT, lambda: self.refuse(late))
        sock.setblocking(False)

    def begin(self) -> None:
        """Begin the handshake; with that of TLS, if there is one."""
        if self._context is None:
            self._loop.register(self._sock.fileno(), READ, self._ready)
            self._send(self._handshake.greeting)
            return
        from fiber.wire.tls import TlsSocket

        try:
            self._sock.getpeername()  # fails for one who has left: `ssl` would not close it
            self._sock = TlsSocket(self._sock, self._context, server_side=True)
        except OSError:
            self._forget()
            self._sock.close()
            self._endpoint._refuse(_CLOSED)
            return
        self._loop.register(self._sock.fileno(), READ, self._ready)
        self._secure()

    def _secure(self) -> None:
        try:
            self._sock.handshake()
        except BlockingIOError:
            self._loop.modify(self._sock.fileno(), WRITE if self._sock.wants_write else READ)
            return
        except ConnectionResetError:
            self.refuse(_CLOSED)
            return
        except OSError as error:
            self.refuse(str(error))
            return
        self._context = None
        self._loop.modify(self._sock.fileno(), READ)
        self._send(self._handshake.greeting)
        if not self.closed and self._sock.pending():
            self._ready(READ)

    def _send(self, data: bytes) -> None:
        # A fresh socket's buffer holds these few bytes; a peer for whom it does not is refused.
        try:
            whole = self._sock.send(data) == len(data)
        except OSError:
            whole = False
        if not whole:
            self.refuse(_CLOSED)

    def _ready(self, events: int) -> None:
        if self._context is not None:
            self._secure()
            return
        try:
            # Exactly what the handshake wants: what follows belongs to the channel.
            data = self._sock.recv(self._handshake.wants)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.refuse(_CLOSED)
            return
        try:
            proof = self._handshake.feed(data)
        except AuthenticationError as error:
            self.refuse(str(error))
            return
        if proof is not None:
            self._send(proof)
            if not self.closed:
                self._loop.unregister(self._sock.fileno())
                lost = lambda: self.refuse(_CLOSED)  # noqa: E731
                self._link = Link(self._loop, Channel(self._sock), self._greeted, lost)

    def _greeted(self, frame: Frame) -> None:
        """The peer belongs to the session: hand its link to who expects it."""
        assert self._link is not None
        hello = _unpickle(frame.body) if frame.kind == HELLO else None
        if not isinstance(hello, dict):
            self.refuse("its first message is no hello")
            return
        if "service" in hello:
            arrived = self._endpoint._services.get(str(hello["service"]))
        else:
            arrived = self._endpoint._expected.pop(str(hello.get("token", "")), None)
        if arrived is None:
            self.refuse(_LATE)
            return
        self._forget()
        try:
            arrived(self._link, hello)
        except Exception as error:  # as for a hello that lacks what the service wants to know
            self._link.close()
            self._link.on_lost()
            self._endpoint._refuse(f"its hello was of no use: {error!r}")

    def drain(self) -> None:
        """Handle its hello, if that is here."""
        if self._link is not None:
            self._link.drain()

    @property
    def closed(self) -> bool:
        """Whether it was refused, or handed over."""
        return self not in self._endpoint._strangers

    def _forget(self) -> None:
        self._timer.cancel()
        self._endpoint._strangers.pop(self, None)

    def refuse(self, reason: str) -> None:
        """Close it and say why."""
        if not self.closed:
            self.close()
            self._endpoint._refuse(reason)

    def close(self) -> None:
        """Close it."""
        self._forget()
        if self._link is not None:
            self._link.close()
        else:
            self._loop.unregister(self._sock.fileno())
            self._sock.close()

    def abandon(self) -> None:
        """After a fork, in the child: close our copy."""
        os.close(self._sock.fileno())
