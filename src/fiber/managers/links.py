"""Connections between proxies and the server of a manager, in multiprocessing's protocol.

    BaseProxy ─► Remote.call ─► this thread's Link ─► socket ─► Link ─► Server

A message is a length and a pickle, a request is `(ident, method, args, kwds)` and a reply
`(kind, result)`, as multiprocessing has them; so either side may be multiprocessing. Each thread
has a connection of its own, as there, so that a lock that the server keeps knows its owner.

A server of Fiber tells that it is one in its reply to ACCEPT_CONNECTION, and the client then says
HELLO. From then on, requests without an ident call functions of the server itself, on the same
connection. With a server of multiprocessing that takes a connection for each.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from multiprocessing import managers as _mp
from multiprocessing.process import current_process
from typing import Any
from weakref import WeakValueDictionary

from fiber.connection import Client, Connection, answer_challenge, deliver_challenge
from fiber.errors import AuthenticationError, PeerDied
from fiber.runtime import folders, session
from fiber.wire.framing import Buffer
from fiber.wire.pickling import PLAIN, pieces

__all__ = [
    "HELLO",
    "TOKEN",
    "Link",
    "Remote",
    "is_for_strangers",
    "is_ours",
    "limit",
    "remember",
    "remote_at",
]

TOKEN = "#TOKEN"
"""Kind of a reply, in a session, that stands for a proxy.

Its parts are the reference to the object, as address and identity, and what else there is to know
of the proxy, pickled apart; so it can be read without running the code of users.
"""

HELLO = "#HELLO"
"""A request, without a reply, by which a client of Fiber says that it is one."""

_SIZE = struct.Struct("!i")  # before each message; -1 if it is too large for that, and
_LARGE_SIZE = struct.Struct("!Q")  # this follows
_CHUNK = 1 << 16  # bytes: what one read takes at the most


def _xml_dumps(message: object) -> bytes:
    from xmlrpc import client

    return client.dumps((message,), allow_none=True).encode()  # type: ignore[arg-type]


def _xml_loads(data: Any) -> Any:
    from xmlrpc import client

    return client.loads(bytes(data).decode())[0][0]


_packing = threading.local()


def is_for_strangers() -> bool:
    """Whether this thread is pickling what somebody without Fiber shall be able to unpickle."""
    return getattr(_packing, "for_strangers", False)


class _Unpickler(pickle.Unpickler):
    """Takes proxies of multiprocessing for ours, which know the authkeys of their managers."""

    def find_class(self, module: str, name: str) -> Any:
        if module == _mp.__name__ and name.endswith("Proxy"):
            module = "fiber.managers"
        return super().find_class(module, name)


class Link(Connection):
    """One connection, at either end, mutually authenticated.

    Args:
        handle: file descriptor of its socket.
        serializer: "pickle" or "xmlrpclib".

    Attributes:
        fiber: whether the other side is Fiber, too.
        ours: whether it is of the same session.
        pid: of the process that has it.
    """

    def __init__(self, handle: int, serializer: str) -> None:
        super().__init__(handle)
        self.fiber = self.ours = False
        self.pid = os.getpid()
        self._fd = handle
        self._pickles = serializer == "pickle"
        self._rest: Buffer = b""  # what came behind the last message

    @classmethod
    def of(cls, connection: Connection, serializer: str) -> Link:
        """Return a link that has the socket of a connection, which is of no use any more."""
        with connection:
            return cls(os.dup(connection.fileno()), serializer)

    def dumps(self, message: Any, plain: bool = False) -> list[Buffer]:
        """Return a message as bytes, in pieces.

        Args:
            message: a request or a reply.
            plain: whether it is known that nothing but plain values is in it.
        """
        if not self._pickles:
            return [_xml_dumps(message)]
        if plain:
            return [pickle.dumps(message)]
        if self.fiber:
            return pieces(message, session.known_names() if self.ours else None)
        _packing.for_strangers = True
        try:
            return pieces(message)
        finally:
            _packing.for_strangers = False

    def loads(self, data: Buffer) -> Any:
        """Return the message that `data` is."""
        if self.fiber:
            return pickle.loads(data)
        return _Unpickler(io.BytesIO(data)).load() if self._pickles else _xml_loads(data)

    def write(self, data: list[Buffer]) -> None:
        """Send a message; by one call of the system, if it is small."""
        if len(data) > 1 or len(data[0]) > _CHUNK:
            self._send_pieces(data)
            return
        message = _SIZE.pack(len(data[0])) + data[0]
        while message:
            message = message[os.write(self._fd, message) :]

    def read(self) -> Buffer:
        """Wait for a message and return it; by one call of the system, if it is small.

        Raises:
            EOFError: the other side has closed the connection.
        """
        data, self._rest = self._rest, b""
        if not data:
            data = os.read(self._fd, _CHUNK)
            if not data:
                raise EOFError
        size = len(data) - 4
        if size > 0 and _SIZE.unpack_from(data)[0] == size:
            return memoryview(data)[4:]
        return self._read_on(bytes(data))

    def _read_on(self, data: bytes) -> Buffer:
        """As `read`, where `data` is part of a message, or more than one."""
        if len(data) < 4:
            data = self._recv_exactly(4, data)
        (size,) = _SIZE.unpack_from(data)
        head = 4
        if size == -1:
            head = 12
            if len(data) < head:
                data = self._recv_exactly(head, data)
            (size,) = _LARGE_SIZE.unpack_from(data, 4)
        end = head + size
        if end <= len(data):
            self._rest = data[end:]
            return data[head:end]
        return self._recv_exactly(size, data[head:])

    def send(self, obj: Any) -> None:
        """Send a message."""
        self.write(self.dumps(obj))

    def recv(self) -> Any:
        """Wait for a message and return it."""
        return self.loads(self.read())


def limit(connection: Any, seconds: float) -> None:
    """Have a read from a socket fail after `seconds`, 0 for never; learn if the other host died."""
    sock = socket.socket(fileno=connection.fileno())
    try:
        interval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # A message may follow another without an answer in between, which would wait for an
            # acknowledgement: 40 ms, several times when a connection is made.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    finally:
        sock.detach()


# A server, as its clients know it ---------------------------------------------------------------


class Remote:
    """The server of a manager, as this process knows it, with a connection for each thread.

    Args:
        address: of the server.
        serializer: "pickle" or "xmlrpclib".
        authkey: None for this process's own.
        name: the manager and its process, for messages.
    """

    def __init__(
        self, address: Any, serializer: str, authkey: bytes | None = None, name: str = ""
    ) -> None:
        self.address = address
        self.serializer = serializer
        self.authkey = authkey
        self.name = name or f"the manager at {address!r}"
        self.has_shut_down: Callable[[], bool] = lambda: False
        self._local = threading.local()

    def key(self) -> bytes:
        """Return the authkey, as bytes."""
        return bytes(current_process().authkey if self.authkey is None else self.authkey)

    def connect(self) -> Link:
        """Return a new connection, on which the server answers requests.

        Raises:
            OSError, EOFError: the server cannot be reached.
            AuthenticationError: it has another authkey.
        """
        link = Link.of(Client(self.address, authkey=self.key()), self.serializer)
        limit(link, 0)
        name = current_process().name
        thread = threading.current_thread().name
        if thread != "MainThread":
            name += f"|{thread}"
        link.send((None, "accept_connection", (name,), {}))
        kind, facts = link.recv()
        if kind != "#RETURN":
            raise _mp.convert_to_error(kind, facts)  # type: ignore[attr-defined]
        if facts:
            self.name = facts["name"]
            link.fiber, link.ours = True, is_ours(facts["home"])
            link.send((None, HELLO, (link.ours,), {}))
        return link

    def open(self) -> None:
        """Connect this thread; raises as `connect`."""
        self._give(self.connect())

    def close(self) -> None:
        """Close the connections of all threads."""
        self._local = threading.local()

    @contextlib.contextmanager
    def failures_told(self) -> Iterator[None]:
        """Have what is raised when the server cannot be reached, or has another key, tell so."""
        try:
            yield
        except AuthenticationError as error:
            raise AuthenticationError(
                f"{self.name} has another authkey than this process was told; give the manager its "
                "authkey, or set current_process().authkey before processes are started"
            ) from error
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            raise self.died() from error

    def _take(self) -> Link:
        """Return this thread's connection, for nobody else until it is given back."""
        link: Link | None = self._local.__dict__.pop("link", None)
        if link is not None and link.pid == os.getpid():
            return link
        with self.failures_told():
            return self.connect()

    def _give(self, link: Link) -> None:
        self._local.link = link

    def call(self, ident: str | None, method: str, args: Any, kwds: Any) -> tuple[str, Any]:
        """Send a request and return the reply: its kind, and the result.

        Raises:
            PeerDied: the server has ended.
        """
        # A connection on which a call was interrupted is not given back: a late reply would be
        # taken for that to the next call. Nor is one found there by a finalizer that the collector
        # runs in the midst of a call.
        link = self._take()
        try:
            plain = not kwds and PLAIN.issuperset(map(type, args))
            data = link.dumps((ident, method, args, kwds), plain)
        except BaseException:
            self._give(link)
            raise
        try:
            link.write(data)
            reply = link.read()
        except BaseException as error:
            link.close()
            if _tells_of_death(error):
                raise self.died() from error
            raise  # of a signal handler
        self._give(link)
        result: tuple[str, Any] = link.loads(reply)
        return result

    def ask(self, function: str, args: Any = (), kwds: Any = {}) -> Any:  # noqa: B006
        """Call a public function of the server and return its result.

        Raises:
            PeerDied: the server has ended.
            RemoteError: the function raised an exception.
        """
        if self.kind().fiber:
            kind, result = self.call(None, function, args, kwds)
            if kind == "#RETURN":
                return result
            try:
                raise _mp.convert_to_error(kind, result)  # type: ignore[attr-defined]
            finally:
                del result  # it would refer to itself, by its traceback and this frame
        with self.failures_told():
            return self.ask_once(function, args, kwds)

    def ask_once(
        self,
        function: str,
        args: Any = (),
        kwds: Any = {},  # noqa: B006
        timeout: float = 0.0,
    ) -> Any:
        """As `ask`, on a connection for this alone, as multiprocessing does; raises what it does.

        Args:
            timeout: seconds to wait for each answer; 0 for as long as it takes.
        """
        with Link.of(Client(self.address), self.serializer) as link:
            limit(link, timeout)
            answer_challenge(link, self.key())
            deliver_challenge(link, self.key())
            return _mp.dispatch(link, None, function, args, kwds)  # type: ignore[attr-defined]

    def kind(self) -> Link:
        """Return this thread's connection, to see what the other side is."""
        link = self._take()
        self._give(link)
        return link

    def died(self) -> PeerDied:
        """Return the exception that tells of the server's end."""
        if self.has_shut_down():
            return PeerDied(f"{self.name} was shut down")
        return PeerDied(f"{self.name} has ended")


def _tells_of_death(error: BaseException) -> bool:
    """Whether it is what a socket raises when the other side is gone."""
    if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:
        return True  # the other host is silent
    return isinstance(error, (EOFError, ConnectionError))


_remotes: WeakValueDictionary[tuple[Any, str], Remote] = WeakValueDictionary()


def remote_at(
    address: Any, serializer: str, authkey: bytes | None = None, name: str = ""
) -> Remote:
    """Return what this process knows the server at `address` by, made if there is none yet."""
    key = (address, serializer)
    remote = _remotes.get(key)
    if remote is None or (None not in (authkey, remote.authkey) and authkey != remote.authkey):
        remote = _remotes[key] = Remote(address, serializer, authkey, name)
    elif authkey is not None:
        remote.authkey = authkey
    return remote


def remember(remote: Remote) -> None:
    """Have `remote_at` return this one: what was at its address before is gone."""
    _remotes[remote.address, remote.serializer] = remote


def is_ours(home: str) -> bool:
    """Whether the home of a process, by its address, is in this process's session."""
    folder = os.path.dirname(home.removeprefix("unix:"))
    known = {folders.session_of(folder) for folder in session.known_folders()}
    return folders.is_place(folder) and folders.session_of(folder) in known
