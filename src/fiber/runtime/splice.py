"""A splice: carries bytes between two streams, both ways, until one of them ends.

    one ─ recv ─► pending ─ send ─► other        other ─ recv ─► pending ─ send ─► one

What one side does not take is kept, up to a bound at which the other is not read any more. When one
side ends, the other gets what is pending and is closed.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any

from fiber.runtime.loop import Loop
from fiber.runtime.poller import READ, WRITE
from fiber.wire.tls import TlsSocket

__all__ = ["Pipe", "Splice"]

_MOST = 1 << 18  # bytes pending at which reading stops
_SIZE = 1 << 16  # bytes that one read takes
_LAST_BYTES = 10.0  # seconds that the last of a stream may take to arrive


class Pipe:
    """A file descriptor of a pipe, a terminal or the like, with the methods of a socket."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def setblocking(self, flag: bool) -> None:
        os.set_blocking(self._fd, flag)

    def recv(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def send(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Side:
    """One of the two streams."""

    def __init__(self, splice: Splice, stream: Any, *, reads: bool, writes: bool) -> None:
        self.splice = splice
        self.stream = stream
        self.fd: int = stream.fileno()
        self.other: _Side = self
        self.pending = b""  # for this side to take
        self.reads = reads
        self.ended = not reads  # nothing more comes from it
        self.took = False  # something has come from it
        self.writes = writes
        self.closed = False
        self._finishing = False
        self._events = 0
        stream.setblocking(False)

    def update(self) -> None:
        """Watch for what there is to do now."""
        events = WRITE if self.pending else 0
        if self._finishing or (not self.ended and len(self.other.pending) < _MOST):
            events |= READ
        self._watch(events)

    def _watch(self, events: int) -> None:
        if events != self._events:
            loop = self.splice.loop
            if not self._events:
                loop.register(self.fd, events, self._ready)
            elif not events:
                loop.unregister(self.fd)
            else:
                loop.modify(self.fd, events)
            self._events = events

    def _ready(self, events: int) -> None:
        if self._finishing:
            self._discard()
            return
        if events & WRITE:
            self.flush()
        if events & READ:
            self.read()
        self.splice.go_on()

    def read(self) -> None:
        """Take what is there, and what a TLS stream has decrypted and keeps back."""
        other = self.other
        while not self.ended and len(other.pending) < _MOST:
            try:
                data = self.stream.recv(_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.ended = True
                return
            self.took = True
            if other.writes:
                other.pending += data
                other.flush()

    @property
    def holds(self) -> bool:
        """Whether it keeps back bytes that it has decrypted, which no poll shows."""
        return not self.ended and isinstance(self.stream, TlsSocket) and self.stream.pending() > 0

    def flush(self) -> None:
        """Send what is pending as far as it goes."""
        while self.pending:
            try:
                sent = self.stream.send(self.pending)
            except BlockingIOError:
                return
            except OSError:  # its peer has gone; what that sent before is still to be read
                self.pending = b""
                self.writes = False
                return
            self.pending = self.pending[sent:]

    def finish(self) -> None:
        """Nothing more goes to it: close it, over TCP not before the peer has all.

        A close drops what is on its way if something is there that was not read.
        """
        if isinstance(self.stream, TlsSocket) and not self.ended:
            self._finishing = True
            self.stream.half_close()
            self.splice.loop.call_later(_LAST_BYTES, self.close)
            self.update()
        else:
            self.close()

    def _discard(self) -> None:
        try:
            while self.stream.recv(_SIZE):
                pass
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        if not self.closed:
            self._watch(0)
            self.closed = True
            self.stream.close()
            self.splice.side_closed()


class Splice:
    """See the module; it owns both streams. Within the loop.

    Args:
        loop: that carries.
        one, other: sockets, TLS sockets or `Pipe`s.
        can: whether `other` can be read, and be written.
        on_end: called when both are closed.
    """

    def __init__(
        self,
        loop: Loop,
        one: Any,
        other: Any,
        can: tuple[bool, bool] = (True, True),
        on_end: Callable[[Splice], object] | None = None,
    ) -> None:
        self.loop = loop
        self._on_end = on_end
        self._ending = False
        reads, writes = can
        self._one = _Side(self, one, reads=True, writes=True)
        self._other = _Side(self, other, reads=reads, writes=writes)
        self._one.other, self._other.other = self._other, self._one
        self.go_on()

    @property
    def took(self) -> bool:
        """Whether it has taken bytes from `other`."""
        return self._other.took

    @property
    def closed(self) -> bool:
        """Whether both are."""
        return self._one.closed and self._other.closed

    def go_on(self) -> None:
        """Watch what there is to watch; finish when one side has ended and the other has it all."""
        one, other = self._one, self._other
        if self._ending:
            return
        while one.holds and len(other.pending) < _MOST:
            one.read()
        while other.holds and len(one.pending) < _MOST:
            other.read()
        for side in (one, other):
            if side.ended and (side.reads or not side.writes) and not side.other.pending:
                self._ending = True
                side.close()
                side.other.finish()
                return
        one.update()
        other.update()

    def side_closed(self) -> None:
        """One of them is closed."""
        if self.closed and self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self)

    @property
    def idle(self) -> bool:
        """Whether nothing is pending, and nothing waits to be read at `other`."""
        if self.closed:
            return True
        other = self._other
        if other.closed:
            return False  # the last bytes are on their way
        waits = select.poll()
        waits.register(other.fd, select.POLLIN)
        unread = not other.ended and any(events & select.POLLIN for _, events in waits.poll(0))
        return not (self._one.pending or unread)

    def close(self) -> None:
        """Close both, whatever is pending."""
        self._ending = True
        self._one.close()
        self._other.close()

    def abandon(self) -> None:
        """After a fork, in the child: close our copies without a word to anybody."""
        for side in (self._one, self._other):
            if not side.closed:
                os.close(side.fd)
