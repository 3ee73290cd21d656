"""A channel: an authenticated stream socket that posts and reads frames.

    post ─► outbox ─► flush ─► socket ─► read ─► frames

A socket that blocks makes `flush` send all; one that does not makes it send what goes and say
whether anything is left. Whoever shares a channel among threads holds a lock of its own.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Sequence

from fiber.wire.auth import CallerHandshake
from fiber.wire.framing import READ_SIZE, Buffer, Frame, FrameReader, encode

__all__ = ["Channel", "connect"]

_PIECES = 512  # pieces for one sendmsg; the system's limit is 1024
_MAX_FDS = 250  # descriptors for one sendmsg; Linux's limit is 253
_FDS_SIZE = socket.CMSG_LEN(_MAX_FDS * array.array("i").itemsize)
_CLOEXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_LOST = -1


class Channel:
    """Posts and reads frames on `sock`, which it owns."""

    def __init__(self, sock: socket.socket, *, takes_fds: bool = False) -> None:
        self.sock = sock
        self.fds: deque[int] = deque()
        """File descriptors that came along, in order; theirs who takes them out."""
        self.takes_fds = takes_fds
        self._reader = FrameReader(sock)
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
                    sent = socket.send_fds(self.sock, [piece], list(fds))
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
        data, extras, flags, _ = self.sock.recvmsg(READ_SIZE, _FDS_SIZE, _CLOEXEC)
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

    def close(self) -> None:
        """Close the socket and the descriptors that nobody took."""
        self._outbox.clear()
        self._close_fds()
        self.sock.close()


def connect(address: str, secret: bytes, timeout: float) -> Channel:
    """Connect to a listener of this session, prove ourselves, and return the channel, blocking.

    A listener that is in a rush may drop who waits for it; then this tries again.

    Args:
        address: `unix:PATH`.
        secret: of the session.
        timeout: seconds until the channel must be open.

    Raises:
        AuthenticationError: the listener is not of this session.
        OSError: nobody listens there, or it did not answer in time.
    """
    scheme, _, path = address.partition(":")
    if scheme != "unix":
        raise ValueError(f"{address!r} is no address; it should read unix:PATH")
    deadline = time.monotonic() + timeout
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
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        sock.connect(path)
        handshake = CallerHandshake(secret)
        while not handshake.done:
            data = sock.recv(handshake.wants)
            if not data:
                raise ConnectionResetError(f"the listener at {path} closed the handshake")
            answer = handshake.feed(data)
            if answer:
                sock.sendall(answer)
        sock.settimeout(None)
    except BaseException:
        with contextlib.suppress(OSError):
            sock.close()
        raise
    return Channel(sock)
