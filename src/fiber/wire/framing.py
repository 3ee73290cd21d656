"""Frames: the unit of what travels on a stream socket.

    kind, body, buffers ─► encode ─► header │ sizes of the buffers │ body │ buffers ─► FrameReader

The header is 16 bytes: kind, number of buffers, size of the body. Small frames are cut out of one
`recv`, many at a time; whatever is large is received straight into memory of its own, which is
taken only after its size was checked.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fiber.wire.tls import TlsSocket

__all__ = [
    "MAX_BUFFERS",
    "MAX_SIZE",
    "Buffer",
    "Frame",
    "FrameError",
    "FrameReader",
    "RecordReader",
    "encode",
]

Buffer = bytes | bytearray | memoryview

HEADER = struct.Struct("!BxxxIQ")
MAX_BUFFERS = 1 << 20
MAX_SIZE = 1 << 38
"""Bytes that one body or buffer may have (256 GiB): more is a damaged header, not a message."""

READ_SIZE = 1 << 14  # room for a hundred small frames; a recv into fresh memory costs by its size
_DIRECT = 1 << 12  # what is missing of a segment and is larger than this is read in place
_JOIN = 1 << 16  # a smaller body is copied behind its header: one piece to send instead of two


class FrameError(ConnectionError):
    """The peer sent what cannot be a frame."""


class Frame(NamedTuple):
    """One message: its kind, its body and its raw buffers."""

    kind: int
    body: Buffer
    buffers: Sequence[Buffer]


def encode(kind: int, body: Buffer, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the pieces to send for one frame, in order; `buffers` are not copied.

    Raises:
        ValueError: there are more than `MAX_BUFFERS` buffers, or one is not contiguous bytes.
    """
    size = len(body)
    if not buffers:
        head = HEADER.pack(kind, 0, size)
        return [head + body] if size < _JOIN else [head, body]
    if len(buffers) > MAX_BUFFERS:
        raise ValueError(f"a frame holds at most {MAX_BUFFERS} buffers, not {len(buffers)}")
    sizes = struct.pack(f"!{len(buffers)}Q", *[len(buffer) for buffer in buffers])
    return [HEADER.pack(kind, len(buffers), size) + sizes, body, *[b for b in buffers if len(b)]]


class FrameReader:
    """Cuts the stream of one socket into frames.

    Each `read` does one system call at the most and returns the frames that it completed.
    """

    def __init__(self, sock: socket.socket | TlsSocket) -> None:
        self._sock = sock
        self._rest: bytes = b""  # received, not yet part of a frame
        self._kind = 0
        self._segments: list[bytearray] | None = None  # body and buffers of a frame under way
        self._at = 0  # which segment is being filled
        self._filled = 0  # bytes of it that are there

    def read(self) -> list[Frame]:
        """Return the frames that one `recv` completed, perhaps none.

        Raises:
            EOFError: the peer closed its end.
            BlockingIOError: the socket does not block and nothing is there.
            FrameError: what came is no frame.
        """
        if self._segments is not None:
            segment = self._segments[self._at]
            missing = len(segment) - self._filled
            if missing > _DIRECT:
                with memoryview(segment) as view:
                    count = self._sock.recv_into(view[self._filled :])
                if not count:
                    raise EOFError
                self._filled += count
                return self._advance()
        data = self._sock.recv(READ_SIZE)
        if not data:
            raise EOFError
        return self.feed(data)

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that `data`, the next bytes of the stream, completes."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        frames: list[Frame] = []
        at, end = 0, len(data)
        while at < end:
            if self._segments is not None:
                at = self._fill(data, at)
                frames += self._advance()
                continue
            if end - at < 16:
                break
            kind, count, size = HEADER.unpack_from(data, at)
            if size > MAX_SIZE:
                raise FrameError(f"a frame of {size} bytes is more than the {MAX_SIZE} allowed")
            if not count:
                stop = at + 16 + size
                if stop <= end:
                    frames.append(Frame(kind, data[at + 16 : stop], ()))
                    at = stop
                    continue
                sizes: tuple[int, ...] = ()
            else:
                if count > MAX_BUFFERS:
                    raise FrameError(f"a frame of {count} buffers is more than {MAX_BUFFERS}")
                if end - at < 16 + 8 * count:
                    break
                sizes = struct.unpack_from(f"!{count}Q", data, at + 16)
                if max(sizes) > MAX_SIZE:
                    raise FrameError(f"a buffer of {max(sizes)} bytes is more than {MAX_SIZE}")
            at += 16 + 8 * count
            self._kind = kind
            try:
                self._segments = [bytearray(size), *map(bytearray, sizes)]
            except MemoryError:
                total = size + sum(sizes)
                raise FrameError(f"there is no memory for a frame of {total} bytes") from None
            self._at = self._filled = 0
            frames += self._advance()
        self._rest = data[at:] if at < end else b""
        return frames

    def _fill(self, data: bytes, at: int) -> int:
        """Copy from `data` what the current segment misses; return how far `data` is used."""
        assert self._segments is not None
        segment = self._segments[self._at]
        count = min(len(segment) - self._filled, len(data) - at)
        segment[self._filled : self._filled + count] = data[at : at + count]
        self._filled += count
        return at + count

    def _advance(self) -> list[Frame]:
        """Go on to the next unfilled segment; return the frame if there is none."""
        segments = self._segments
        assert segments is not None
        while self._filled == len(segments[self._at]):
            self._at += 1
            self._filled = 0
            if self._at == len(segments):
                self._segments = None
                return [Frame(self._kind, segments[0], segments[1:])]
        return []


class RecordReader(FrameReader):
    """The same for a socket under TLS, which decrypts a whole record at a time.

    What is left of a record shows in no poll, so nothing may stay behind.
    """

    def __init__(self, sock: TlsSocket) -> None:
        super().__init__(sock)
        self._pending = sock.pending

    def read(self) -> list[Frame]:
        """As above, and then the frames that the rest of the record completes."""
        frames = super().read()
        while self._pending():
            frames += super().read()
        return frames
