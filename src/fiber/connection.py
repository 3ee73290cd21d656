"""Connections: message pipes between processes, and sockets that listen for them.

    send ─► pickled, in pieces ─► length, pieces ─► socket or pipe ─► length, bytes ─► recv

The interface is `multiprocessing.connection`'s, and so is what goes over the wire: one end may be a
program of plain multiprocessing. What Fiber adds: `send` takes lambdas, closures and whatever else
Fiber can pickle; large messages are not copied on their way to the system; and a `Connection` can
be sent to other processes in any way in which an object can (see `runtime.descriptors`).
"""

from __future__ import annotations

import copyreg
import io
import itertools
import math
import os
import pickle
import select
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection as _mp
from multiprocessing import reduction, util
from multiprocessing.connection import answer_challenge, deliver_challenge, wait
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any

from fiber.errors import BufferTooShort
from fiber.runtime import places, session
from fiber.runtime.descriptors import lend
from fiber.wire.framing import Buffer
from fiber.wire.pickling import pieces, reduce_as_registered

if TYPE_CHECKING:
    _Base = _mp.Connection[Any, Any]
else:
    _Base = _mp.Connection

__all__ = [
    "Client",
    "Connection",
    "Listener",
    "Pipe",
    "address_type",
    "answer_challenge",
    "arbitrary_address",
    "deliver_challenge",
    "wait",
]

address_type = _mp.address_type  # type: ignore[attr-defined]

_CONNECT_TIMEOUT = 30.0  # seconds, to a listener on another host
_SIZE = struct.Struct("!i")
_LARGE_SIZE = struct.Struct("!iQ")  # the first is -1
_MAX_SIZE = 0x7FFFFFFF
_JOIN = 1 << 14  # bytes: a smaller message goes as one piece
_WHOLE = 1 << 16  # bytes: a smaller message is likely to be there as a whole
_PIECES = 512  # for one writev; the system's limit is 1024


def __getattr__(name: str) -> Any:
    """Return what else multiprocessing.connection has."""
    return getattr(_mp, name)


class Connection(_Base):
    """An end of a pipe, as `multiprocessing.connection.Connection`.

    It can be pickled for processes of this machine. Whoever sends one may close it at once, but
    must live until it was received.

    Args:
        handle: file descriptor of a stream socket or a pipe; the connection owns it.
        readable, writable: what it can do.
    """

    if TYPE_CHECKING:
        _handle: int | None
        _readable: bool
        _writable: bool

        def _check_closed(self) -> None: ...
        def _check_readable(self) -> None: ...
        def _check_writable(self) -> None: ...
        def _bad_message_length(self) -> None: ...

    def __reduce__(self) -> tuple[Any, ...]:
        fd = self.fileno()
        duplicate = lend(fd) if get_spawning_popen() is None else reduction.DupFd(fd)
        return _rebuild, (type(self), duplicate, self._readable, self._writable)

    def send(self, obj: Any) -> None:
        """Send an object.

        Raises:
            SerializationError: it cannot be pickled.
            OSError: the connection is closed, here or (BrokenPipeError) there.
        """
        self._check_closed()
        self._check_writable()
        self._send_pieces(pieces(obj, session.known_names()))

    def recv(self) -> Any:
        """Wait for an object and return it.

        Raises:
            EOFError: all copies of the other end are closed, and nothing is left to receive.
        """
        self._check_closed()
        self._check_readable()
        return pickle.loads(self._recv_message())

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Wait for a message of bytes and return it.

        Args:
            maxlength: if it has more bytes, OSError is raised and the connection is of no use.
        """
        self._check_closed()
        self._check_readable()
        if maxlength is not None and maxlength < 0:
            raise ValueError("negative maxlength")
        return self._recv_message(maxlength)

    def recv_bytes_into(self, buf: Any, offset: int = 0) -> int:
        """Wait for a message of bytes and put it into a buffer; return its size.

        Args:
            buf: what has a writable buffer.
            offset: bytes of it to leave as they are.

        Raises:
            BufferTooShort: it does not fit; it is the exception's first argument.
        """
        self._check_closed()
        self._check_readable()
        with memoryview(buf) as view:
            room = view.itemsize * len(view)
            if offset < 0:
                raise ValueError("negative offset")
            if offset > room:
                raise ValueError("offset too large")
            size = self._recv_size()
            if room < offset + size:
                raise BufferTooShort(self._recv_exactly(size))
            try:
                flat = view.cast("B")
            except TypeError:  # a format that memoryview does not know, as ctypes has
                first, last = offset // view.itemsize, (offset + size) // view.itemsize
                io.BytesIO(self._recv_exactly(size)).readinto(view[first:last])
            else:
                with flat:
                    self._fill(flat[offset : offset + size])
        return size

    # The wire ----------------------------------------------------------------------------------

    def _send_bytes(self, buf: memoryview) -> None:
        self._send_pieces([buf if buf.ndim == 1 else buf.cast("B")])

    def _send_pieces(self, data: Sequence[Buffer]) -> None:
        handle = self.fileno()
        size = sum(map(len, data))
        head = _SIZE.pack(size) if size <= _MAX_SIZE else _LARGE_SIZE.pack(-1, size)
        if size <= _JOIN:
            message: Buffer = b"".join((head, *data))
            sent = os.write(handle, message)
            while sent < len(message):
                message = memoryview(message)[sent:]
                sent = os.write(handle, message)
            return
        rest: list[Buffer] = [head, *data]
        while rest:
            sent = os.writev(handle, rest[:_PIECES])
            done = 0
            while done < len(rest) and sent >= len(rest[done]):
                sent -= len(rest[done])
                done += 1
            del rest[:done]
            if sent:
                rest[0] = memoryview(rest[0])[sent:]

    def _recv_message(self, most: int | None = None) -> bytes:
        size = self._recv_size()
        if most is not None and size > most:
            self._bad_message_length()
        if size < _WHOLE:
            message = os.read(self.fileno(), size) if size else b""
            if len(message) == size:
                return message
            return self._recv_exactly(size, message)
        return self._recv_exactly(size)

    def _recv_size(self) -> int:
        head = os.read(self.fileno(), 4)
        if len(head) < 4:
            if not head:
                raise EOFError
            head = self._recv_exactly(4, head)
        size: int = _SIZE.unpack(head)[0]
        if size == -1:
            size = struct.unpack("!Q", self._recv_exactly(8))[0]
        return size

    def _recv_exactly(self, size: int, begun: bytes = b"") -> bytes:
        """Return `size` bytes of the stream, the first of which are there."""
        whole = io.BytesIO(begun)
        if size > len(begun):
            whole.seek(size - 1)
            whole.write(b"\0")
        with whole.getbuffer() as view:  # of the very memory that getvalue returns
            self._fill(view, len(begun))
        return whole.getvalue()

    def _fill(self, view: memoryview, filled: int = 0) -> None:
        """Read as many bytes as `view` has room for after those that are there."""
        handle = self.fileno()
        while filled < len(view):
            count = os.readv(handle, [view[filled:]])
            if not count:
                raise OSError("got end of file during message") if filled else EOFError
            filled += count

    def _poll(self, timeout: float | None) -> bool:
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        milliseconds = None if timeout is None else math.ceil(max(timeout, 0) * 1000)
        return bool(poller.poll(milliseconds))


def _rebuild(kind: type[Connection], duplicate: Any, *can: bool) -> Connection:
    return kind(duplicate.detach(), *can)


# By plain pickle, which knows nothing of it, the number of its descriptor would be pickled.
copyreg.pickle(_mp.Connection, reduce_as_registered)


def _adopt(connection: _mp.Connection[Any, Any]) -> Connection:
    """Return a connection of Fiber that has the descriptor of one of multiprocessing."""
    fd = connection.fileno()
    connection._handle = None  # type: ignore[attr-defined]
    return Connection(fd)


def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:
    """Return the two ends of a pipe.

    Args:
        duplex: whether both can send and receive; otherwise the first one only receives.
    """
    if duplex:
        one, other = socket.socketpair()
        for sock in (one, other):
            sock.setblocking(True)
        return Connection(one.detach()), Connection(other.detach())
    reader, writer = os.pipe()
    return Connection(reader, writable=False), Connection(writer, readable=False)


# Listening -------------------------------------------------------------------------------------

_counter = itertools.count()


def arbitrary_address(family: str) -> Any:
    """Return an address that is free, for a `Listener`.

    Args:
        family: "AF_UNIX", for a file in the session's folder, or "AF_INET".
    """
    if family == "AF_UNIX":
        return os.path.join(session.current().folder, f"{os.getpid()}.{next(_counter)}")
    return _mp.arbitrary_address(family)  # type: ignore[attr-defined]


class Listener(_mp.Listener):
    """A socket that listens for connections, as `multiprocessing.connection.Listener`.

    Args:
        address: a path, a pair of host and port, or None for any that is free.
        family: "AF_UNIX" or "AF_INET"; what the address is, by default.
        backlog: how many may wait to be accepted.
        authkey: bytes that both sides must know.
    """

    def __init__(
        self,
        address: Any = None,
        family: str | None = None,
        backlog: int = 1,
        authkey: bytes | None = None,
    ) -> None:
        if authkey is not None and not isinstance(authkey, bytes):
            raise TypeError("authkey should be a byte string")
        if not address and (family or _mp.default_family) == "AF_UNIX":  # type: ignore[attr-defined]
            address, family = arbitrary_address("AF_UNIX"), "AF_UNIX"
        super().__init__(address, family, backlog, authkey)
        listener: Any = self._listener  # type: ignore[attr-defined]
        if listener._unlink is not None:
            listener._unlink.cancel()
            # The file may be gone: the session's folder goes when the session ends.
            listener._unlink = util.Finalize(
                listener, _unlink, args=(listener._address,), exitpriority=0
            )

    def accept(self) -> Connection:
        """Wait for somebody to connect, and return the connection.

        Raises:
            AuthenticationError: whoever connected does not know the key.
            OSError: the listener is closed.
        """
        return _adopt(super().accept())


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def Client(address: Any, family: str | None = None, authkey: bytes | None = None) -> Connection:
    """Connect to a `Listener`, and return the connection.

    One at a path in the folder of its process's session is found wherever that process runs.

    Args:
        address: of the listener.
        family: of the address, if that does not tell.
        authkey: bytes that both sides must know.

    Raises:
        AuthenticationError: the listener does not know the key.
        OSError: nobody listens there.
    """
    if isinstance(address, str) and places.is_far(address):
        connection = Connection(places.join(address, _CONNECT_TIMEOUT))
        if authkey is not None:
            try:
                answer_challenge(connection, authkey)
                deliver_challenge(connection, authkey)
            except BaseException:
                connection.close()
                raise
        return connection
    return _adopt(_mp.Client(address, family, authkey))
