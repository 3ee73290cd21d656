"""A channel: an authenticated stream socket that posts and reads frames.

    post ─► outbox ─► flush ─► socket ─► read ─► frames

The socket is a Unix one, or TCP under TLS (see `tls`). One that blocks makes `flush` send all; one
that does not makes it send what goes and say whether anything is left. Whoever shares a channel
among threads holds a lock of its own.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from fiber.errors import AuthenticationError
from fiber.wire.auth import CallerHandshake
from fiber.wire.framing import READ_SIZE, Buffer, Frame, FrameReader, RecordReader, encode

if TYPE_CHECKING:
    import ssl

    from fiber.wire.tls import TlsSocket

    Socket = socket.socket | TlsSocket

__all__ = ["Channel", "authenticate", "connect"]

_PIECES = 512  # pieces for one sendmsg; the system's limit is 1024
_MAX_FDS = 250  # descriptors for one sendmsg; Linux's limit is 253
_FDS_SIZE = socket.CMSG_LEN(_MAX_FDS * array.array("i").itemsize)
_CLOEXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_LOST = -1
_PATIENCE = 3.0  # seconds for the first try of each of several hosts


class Channel:
    """Posts and reads frames on `sock`, which it owns."""

    def __init__(self, sock: Socket, *, takes_fds: bool = False) -> None:
        self.sock = sock
        self.fds: deque[int] = deque()
        """File descriptors that came along, in order; theirs who takes them out."""
        self.takes_fds = takes_fds
        # A plain socket says itself what is there; one under TLS may hold bytes back.
        self._reader = FrameReader(sock) if isinstance(sock, socket.socket) else RecordReader(sock)
        self._outbox: deque[tuple[Buffer, Sequence[int]]] = deque()

    def fileno(self) -> int:
        """Return the descriptor of the socket, -1 when it is closed."""
        return self.sock.fileno()

    def post(
        self, kind: int, body: Buffer, buffers: Sequence[Buffer] = (), fds: Sequence[int] = ()
    ) -> None:
        """Put a frame into the outbox; `fds` (Unix sockets only) are sent with its first bytes.

        They may be objects that own a descriptor (see `runtime.descriptors`): what must live until
        it is sent.
        """
        first, *others = encode(kind, body, buffers)
        if len(fds) > _MAX_FDS * len(first):
            raise ValueError(f"{len(fds)} file descriptors are more than a frame can take along")
        while len(fds) > _MAX_FDS:
            self._outbox.append((first[:1], fds[:_MAX_FDS]))
            first, fds = first[1:], fds[_MAX_FDS:]
        self._outbox.append((first, fds))
        for piece in others:
            self._outbox.append((piece, ()))

    def flush(self) -> bool:
        """Send what is in the outbox; return whether all of it went.

        Raises:
            OSError: the peer is gone.
        """
        outbox = self._outbox
        while outbox:
            piece, fds = outbox[0]
            try:
                if fds:
                    sent = socket.send_fds(cast("socket.socket", self.sock), [piece], list(fds))
                elif len(outbox) == 1:
                    sent = self.sock.send(piece)
                else:
                    sent = self.sock.sendmsg(self._pieces())
            except BlockingIOError:
                return False
            while outbox and sent >= len(outbox[0][0]):
                sent -= len(outbox[0][0])
                outbox.popleft()
            if sent:
                outbox[0] = (memoryview(outbox[0][0])[sent:], ())
        return True

    def _pieces(self) -> list[Buffer]:
        pieces: list[Buffer] = []
        for piece, fds in self._outbox:
            if fds or len(pieces) == _PIECES:
                break
            pieces.append(piece)
        return pieces

    @property
    def idle(self) -> bool:
        """Whether the outbox is empty."""
        return not self._outbox

    def send(self, kind: int, body: Buffer, buffers: Sequence[Buffer] = ()) -> None:
        """Post one frame and flush."""
        self.post(kind, body, buffers)
        self.flush()

    def read(self) -> list[Frame]:
        """Return the frames that one `recv` completed, perhaps none; see `FrameReader.read`."""
        if not self.takes_fds:
            return self._reader.read()
        sock = cast("socket.socket", self.sock)
        data, extras, flags, _ = sock.recvmsg(READ_SIZE, _FDS_SIZE, _CLOEXEC)
        for _, _, extra in extras:
            fds = array.array("i")
            fds.frombytes(extra[: len(extra) - len(extra) % fds.itemsize])
            self.fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            self.fds.append(_LOST)
        if not data:
            raise EOFError
        return self._reader.feed(data)

    def take_fds(self, count: int) -> list[int]:
        """Take out the descriptors of a frame that says it brought `count`.

        Returns:
            All of them; none if the system dropped some, because this process has too many open.
        """
        if len(self.fds) >= count:
            taken = [self.fds.popleft() for _ in range(count)]
            if _LOST not in taken:
                return taken
            # Those that follow, if any, may be of this frame or of the next: better none at all.
            self.fds.extendleft(taken)
        self._close_fds()
        return []

    def _close_fds(self) -> None:
        while self.fds:
            fd = self.fds.popleft()
            if fd != _LOST:
                os.close(fd)

    def deliver(self, timeout: float) -> None:
        """Wait, at most `timeout` seconds, until the peer's system has all that was sent.

        Before a close: over TCP that may drop what is on its way. A Unix socket has it at once.
        """
        if not isinstance(self.sock, socket.socket):
            self.sock.deliver(timeout)

    def close(self) -> None:
        """Close the socket and the descriptors that nobody took."""
        self._outbox.clear()
        self._close_fds()
        self.sock.close()


def authenticate(sock: Socket, secret: bytes, deadline: float) -> Channel:
    """Do the caller's part of the handshake on a connected stream; return the channel, blocking.

    Args:
        sock: it is the caller's still if this fails.
        secret: of the session.
        deadline: of `time.monotonic`, until when the listener must have proved itself.

    Raises:
        AuthenticationError: the listener is not of this session.
        OSError: it is gone, or did not answer in time.
    """
    handshake = CallerHandshake(secret)
    while not handshake.done:
        sock.settimeout(_left(deadline))
        data = sock.recv(handshake.wants)
        if not data:
            raise ConnectionResetError("the listener closed the handshake")
        answer = handshake.feed(data)
        if answer:
            sock.sendall(answer)
    sock.settimeout(None)
    return Channel(sock)


def connect(
    address: str, secret: bytes, timeout: float, context: ssl.SSLContext | None = None
) -> Channel:
    """Connect to a listener of this session, prove ourselves, and return the channel, blocking.

    A listener that is in a rush may drop who waits for it; then this tries again. Of several hosts
    each is tried for a few seconds, in turn and again, for who is there and does not answer may be
    somebody else.

    Args:
        address: `unix:PATH`, or `tcp:HOST:PORT`, or several as `tcp:HOST:PORT,HOST:PORT`; an IPv6
            address as `tcp:[::1]:PORT`.
        secret: of the session.
        timeout: seconds until the channel must be open.
        context: of `tls.client_context`, for TCP.

    Raises:
        AuthenticationError: whoever listens there is not of this session.
        OSError: nobody listens there, or it did not answer in time.
    """
    scheme, _, rest = address.partition(":")
    deadline = time.monotonic() + timeout
    if scheme == "unix":
        return _connect_unix(rest, secret, deadline)
    if scheme != "tcp":
        raise ValueError(f"{address!r} is no address; it should read unix:PATH or tcp:HOST:PORT")
    if context is None:
        raise ValueError(f"{address!r} needs the session's certificate, and there is none")
    hosts = [_host_and_port(part, address) for part in rest.split(",")]
    return _connect_tcp(hosts, secret, deadline, context)


def _host_and_port(text: str, address: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{address!r} is no address; IPv6 should read tcp:[ADDRESS]:PORT")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{address!r} is no address; it should read tcp:HOST:PORT")
    return host, int(port)


def _connect_unix(path: str, secret: bytes, deadline: float) -> Channel:
    pause = 0.001
    while True:
        try:
            return _connect_once(path, secret, deadline)
        except (BlockingIOError, ConnectionResetError, BrokenPipeError):
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _connect_once(path: str, secret: bytes, deadline: float) -> Channel:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_left(deadline))
        sock.connect(path)
        return authenticate(sock, secret, deadline)
    except BaseException:
        with contextlib.suppress(OSError):
            sock.close()
        raise


def _connect_tcp(
    hosts: Sequence[tuple[str, int]], secret: bytes, deadline: float, context: ssl.SSLContext
) -> Channel:
    began = time.monotonic()
    patience = _PATIENCE
    pause = 0.01
    while True:
        failures: list[Exception] = []
        for host, port in hosts:
            until = deadline
            if len(hosts) > 1:
                until = min(until, time.monotonic() + patience)
            try:
                return _connect_tls(host, port, secret, until, context)
            except (OSError, AuthenticationError) as error:
                failures.append(error)
        if time.monotonic() + pause > deadline or _all_strangers(failures):
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
        patience *= 2  # it may be there and have its hands full
    told = "; ".join(
        f"{_join(host, port)}: {_said(failure)}"
        for (host, port), failure in zip(hosts, failures, strict=True)
    )
    seconds = time.monotonic() - began
    if _all_strangers(failures):
        raise AuthenticationError(f"no listener of this session is there ({told})")
    raise ConnectionError(f"nobody of this session answered in {seconds:.1f} seconds ({told})")


def _connect_tls(
    host: str, port: int, secret: bytes, deadline: float, context: ssl.SSLContext
) -> Channel:
    from fiber.wire.tls import TlsSocket  # here, for it is for sessions on several machines only

    # It closes the plain socket itself if it cannot take it over.
    plain = socket.create_connection((host, port), _left(deadline))
    sock = TlsSocket(plain, context, server_side=False)
    try:
        sock.settimeout(_left(deadline))
        sock.handshake()
        return authenticate(sock, secret, deadline)
    except BaseException:
        sock.close()
        raise


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _all_strangers(failures: Sequence[Exception]) -> bool:
    return all(isinstance(failure, AuthenticationError) for failure in failures)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _said(failure: Exception) -> str:
    if isinstance(failure, TimeoutError):
        return "no answer"
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror.lower()
    return str(failure)
