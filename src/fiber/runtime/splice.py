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

__all__ = ["Pipe", "Splice"]

_MOST = 1 << 18  # bytes pending at which reading stops
_SIZE = 1 << 16  # bytes that one read takes


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
        self.writes = writes
        self.events = 0
        stream.setblocking(False)

    def update(self) -> None:
        """Watch for what there is to do now."""
        events = WRITE if self.pending else 0
        if not self.ended and len(self.other.pending) < _MOST:
            events |= READ
        if events != self.events:
            loop = self.splice.loop
            if not self.events:
                loop.register(self.fd, events, self.ready)
            elif not events:
                loop.unregister(self.fd)
            else:
                loop.modify(self.fd, events)
            self.events = events

    def ready(self, events: int) -> None:
        if events & WRITE and not self.flush():
            return
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
            elif other.writes:
                other.pending += data
                if not other.flush():
                    return

    def flush(self) -> bool:
        """Send what is pending as far as it goes; return whether the stream is still there."""
        while self.pending:
            try:
                sent = self.stream.send(self.pending)
            except BlockingIOError:
                return True
            except OSError:
                self.splice.close()
                return False
            self.pending = self.pending[sent:]
        return True

    def close(self) -> None:
        if self.events:
            self.splice.loop.unregister(self.fd)
            self.events = 0
        self.stream.close()


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
        self.closed = False
        reads, writes = can
        self._one = _Side(self, one, reads=True, writes=True)
        self._other = _Side(self, other, reads=reads, writes=writes)
        self._one.other, self._other.other = self._other, self._one
        self._one.read()  # TLS may have decrypted already what epoll will never show
        self.go_on()

    def go_on(self) -> None:
        """Watch what there is to watch; close when one side has ended and the other has it all."""
        one, other = self._one, self._other
        if self.closed:
            return
        for side in (one, other):
            if side.ended and side.reads and not side.other.pending:
                self.close()
                return
        one.update()
        other.update()

    @property
    def idle(self) -> bool:
        """Whether nothing is pending, and nothing waits to be read at `other`."""
        if self.closed:
            return True
        other = self._other
        waits = select.poll()
        waits.register(other.fd, select.POLLIN)
        unread = not other.ended and any(events & select.POLLIN for _, events in waits.poll(0))
        return not (self._one.pending or unread)

    def close(self) -> None:
        """Close both."""
        if not self.closed:
            self.closed = True
            self._one.close()
            self._other.close()
            if self._on_end is not None:
                self._on_end(self)

    def abandon(self) -> None:
        """After a fork, in the child: close our copies without a word to anybody."""
        self.closed = True
        for side in (self._one, self._other):
            os.close(side.fd)
