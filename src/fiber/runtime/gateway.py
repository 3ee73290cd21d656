"""The gateway: the way from outside into a place, to the sockets of its processes.

    a process elsewhere ─ TLS ─► endpoint ─ hello with a path ─► Gateway ─ splice ─► that socket

A *place* is a session's folder on one host: that of the master, or of an agent in a container or
pod. The sockets in it can be reached from there only, so each place has one endpoint that listens
for TCP, and this service. A path in another place is answered by where that place's own gateway
is; if whoever asks cannot get there, the master has a stream brought from there (see
`runtime.network`).
"""

from __future__ import annotations

import errno
import os
import pickle
import socket
import stat
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from fiber.runtime.endpoint import HELLO, Endpoint
from fiber.runtime.link import Link
from fiber.runtime.loop import Loop
from fiber.runtime.splice import Splice
from fiber.wire.channel import connect
from fiber.wire.framing import HEADER

if TYPE_CHECKING:
    import ssl

__all__ = ["SERVICE", "Elsewhere", "Gateway", "Refused", "open_stream", "read_frame"]

SERVICE = "gateway"
"""What a caller of the endpoint asks for in its hello."""

OPENED, REFUSED, ELSEWHERE = range(80, 83)
"""Kinds of the one frame that answers: from then on the bytes are those of the stream; or why there
is none; or the addresses of the gateway that has it."""

Bring = Callable[[str, Callable[[Any], object]], object]
"""Brings a stream to a path in another place: called with the path and with what takes the stream,
or an exception."""


class Gateway:
    """Serves the sockets in `folder` at `endpoint`. All methods within the loop.

    Args:
        loop: of this process.
        endpoint: where it is asked for.
        folder: of this place.
        where: returns the addresses of the gateway of another place, if they are known.
        bring: brings a stream from another place, if that can be done.
    """

    def __init__(
        self,
        loop: Loop,
        endpoint: Endpoint,
        folder: str,
        where: Callable[[str], Sequence[str]] = lambda folder: (),
        bring: Bring | None = None,
    ) -> None:
        self._loop = loop
        self._folder = folder
        self._where = where
        self._bring = bring
        self._splices: set[Splice] = set()
        endpoint.serve(SERVICE, self._arrived)

    def _arrived(self, link: Link, hello: dict[str, Any]) -> None:
        path = hello.get("to")
        if not isinstance(path, str) or "\0" in path:
            raise ValueError(f"the gateway was asked for {path!r}, which is no path")
        link.on_frame, link.on_lost = _ignore, _nothing
        folder = os.path.dirname(path)
        if folder == self._folder:
            try:
                self._join(link, connect_here(path, self._folder))
            except OSError as error:
                self._refuse(link, error)
            return
        addresses = self._where(folder) if hello.get("redirect") else ()
        if addresses:
            link.post(ELSEWHERE, pickle.dumps(list(addresses)))
        elif self._bring is None:
            self._refuse(link, FileNotFoundError(2, "no such place"))
        else:
            self._bring(path, lambda stream: self._brought(link, stream))

    def _brought(self, link: Link, stream: Any) -> None:
        if isinstance(stream, OSError):
            self._refuse(link, stream)
        elif link.lost:
            stream.close()
        else:
            self._join(link, stream)

    def _refuse(self, link: Link, error: OSError) -> None:
        link.post(REFUSED, pickle.dumps((error.errno, error.strerror or str(error))))

    def _join(self, link: Link, stream: Any) -> None:
        link.post(OPENED, b"")
        self.carry(link.release(), stream)

    def carry(self, one: Any, other: Any) -> None:
        """Splice two streams for as long as they last."""
        splice = Splice(self._loop, one, other, on_end=self._splices.discard)
        if not splice.closed:
            self._splices.add(splice)

    def close(self) -> None:
        """Close all that is spliced."""
        for splice in list(self._splices):
            splice.close()

    def abandon(self) -> None:
        """After a fork, in the child: close our copies, and leave the streams as they are."""
        for splice in self._splices:
            splice.abandon()


def _ignore(frame: object) -> None:
    """Whoever asks has nothing more to say until it is answered."""


def _nothing() -> None:
    """Whoever asked is gone before it was answered."""


def connect_here(path: str, folder: str) -> socket.socket:
    """Connect to a socket of this place, which is `folder`, without blocking; raises OSError.

    What is no socket itself, such as a link to one, is none of this place: it may lead out of it.
    """
    if os.path.dirname(path) != folder:
        raise FileNotFoundError(errno.ENOENT, "that is not in this place")
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "that is no socket of a session")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


class Refused(OSError):
    """The gateway answered that nobody listens at the path."""


class Elsewhere(Exception):
    """The path is in a place whose gateway has these addresses."""

    def __init__(self, addresses: list[str]) -> None:
        super().__init__(addresses)
        self.addresses = addresses


def open_stream(
    address: str,
    path: str,
    secret: bytes,
    context: ssl.SSLContext | None,
    timeout: float,
    *,
    redirect: bool = True,
) -> Any:
    """Ask a gateway for a stream to the socket at `path`; return it, blocking.

    Args:
        address: of the gateway's endpoint.
        path: of the socket.
        secret: of the session.
        context: TLS's, of a client; None for a Unix socket.
        timeout: seconds that it may take.
        redirect: whether to be told where the path's own gateway is.

    Raises:
        Elsewhere: it is in another place.
        OSError: nobody listens there, or the gateway cannot be reached.
        AuthenticationError: the gateway is not of this session.
    """
    deadline = monotonic() + timeout
    channel = connect(address, secret, timeout, context)
    sock: Any = channel.sock
    try:
        sock.settimeout(max(deadline - monotonic(), 0.001))
        channel.send(HELLO, pickle.dumps({"service": SERVICE, "to": path, "redirect": redirect}))
        kind, body = read_frame(sock)
        if kind == REFUSED:
            raise Refused(*pickle.loads(body))
        if kind == ELSEWHERE:
            raise Elsewhere(pickle.loads(body))
        sock.settimeout(None)
    except BaseException:
        channel.close()
        raise
    return sock


def read_frame(sock: Any) -> tuple[int, bytes]:
    """Read one frame without buffers and nothing of what follows; return its kind and body."""
    kind, _, size = HEADER.unpack(_exactly(sock, HEADER.size))
    return kind, _exactly(sock, size)


def _exactly(sock: Any, size: int) -> bytes:
    """Read so many bytes and no more: what follows is the stream's."""
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionResetError("the gateway closed the connection")
        data += more
    return data
