"""What a process writes to its standard error, or elsewhere to its output as well, on its way.

    process ─► pipe ─► Stream ─► the user's stream      Stream.tail ─► the last lines of the dead

Whole lines are passed on, so that those of several processes do not tear each other.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from fiber.runtime.loop import Loop, Timer
from fiber.runtime.poller import READ

__all__ = ["Stream"]

_TAIL = 16384  # bytes of a process's standard error that are kept
_LINE_SECONDS = 0.02  # that a line may take to be whole
_RETRY_SECONDS = 0.05  # between looks at a stream that takes nothing
_BACKLOG = 1 << 16  # bytes pending at which reading stops
_PIPE = 1 << 16  # bytes that a pipe holds
_PIECE = 4096  # PIPE_BUF: what a writable pipe takes without blocking


class Stream:
    """See the module. Within the loop; it owns both descriptors.

    Args:
        loop: of the agent.
        source: what the process writes comes out of it.
        target: where it goes.
        streams: of the agent; this is in it until the end of the source.
        also: given all that goes to the target.
    """

    def __init__(
        self,
        loop: Loop,
        source: int,
        target: int,
        streams: set[Stream],
        also: Callable[[bytes], object] | None = None,
    ) -> None:
        self._loop = loop
        self._streams = streams
        self._also = also
        self._source = source
        self._target = target
        self._pending = b""  # read, not passed on yet
        self._kept = b""
        self._ended = False
        self._reading = False
        self._timer: Timer | None = None
        self._takes = select.poll()
        self._takes.register(target, select.POLLOUT)
        os.set_blocking(source, False)
        streams.add(self)
        self._read_on()

    def _read_on(self) -> None:
        if not self._reading and not self._ended:
            self._reading = True
            self._loop.register(self._source, READ, self._ready)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.unregister(self._source)

    def _ready(self, events: int) -> None:
        if self._read() == b"":
            self._stop_reading()
            self._ended = True
        self._pass_on()

    def _read(self) -> bytes | None:
        """Take what is there; return it, b"" at the end, None if there is nothing now."""
        try:
            data = os.read(self._source, _PIECE)
        except BlockingIOError:
            return None
        self._pending += data
        self._kept = (self._kept + data)[-_TAIL:]
        return data

    def _pass_on(self, *, late: bool = False) -> None:
        """Write what is pending as far as the user's stream takes it without blocking.

        Whole lines, so that those of several processes do not tear each other; what is no whole
        line waits a moment for its end.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._pending:
            end = self._pending.rfind(b"\n", 0, _PIECE) + 1
            if not end and len(self._pending) < _PIECE and not (late or self._ended):
                finish = lambda: self._pass_on(late=True)  # noqa: E731
                self._timer = self._loop.call_later(_LINE_SECONDS, finish)
                return
            if not self._takes.poll(0):
                self._timer = self._loop.call_later(_RETRY_SECONDS, self._pass_on)
                if len(self._pending) > _BACKLOG:
                    self._stop_reading()
                return
            try:
                count = os.write(self._target, self._pending[: end or _PIECE])
            except OSError:  # nobody reads it any more
                count = len(self._pending)
            if self._also is not None:
                self._also(self._pending[:count])
            self._pending = self._pending[count:]
        if self._ended:
            self._streams.discard(self)
            self.abandon()
        else:
            self._read_on()

    def tail(self) -> str:
        """Return the last lines, with all that the dead process has written."""
        for _ in range(_PIPE // _PIECE + 1):  # a child of its own may go on writing for ever
            if self._ended or not self._read():
                break
        if self._source >= 0:
            self._pass_on(late=True)
        return self._kept.decode(errors="replace")

    def abandon(self) -> None:
        """Close the descriptors."""
        os.close(self._source)
        os.close(self._target)
        self._source = -1
