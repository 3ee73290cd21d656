"""Where the items of a call come from: a sequence, or an iterable that is read as needed.

    Sequence: all items are there          ┐
                                           ├─► take(n) ─► the master
    Reader: a thread ─► a bounded buffer ──┘

A thread reads what might block or be endless, as in multiprocessing, so that results arrive while
the iterable makes up its mind; it stops when enough is read ahead.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from fiber.runtime.loop import Event, Loop

__all__ = ["SEQUENCES", "Reader", "SequenceSource", "Source", "source_of"]


class Source(ABC):
    """Hands out items in order. Within the loop."""

    error: BaseException | None = None
    """What the iterable raised at its end."""
    ahead = 0
    """How many items may be read before they are taken."""

    @abstractmethod
    def take(self, most: int) -> list[Any]:
        """Return the next items, as many as are there, at most `most` (1 or more)."""

    @abstractmethod
    def ended(self) -> bool:
        """Whether no more will come."""

    @abstractmethod
    def stop(self) -> None:
        """Nobody wants more."""


class SequenceSource(Source):
    """Items that are all there."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._ended = False

    def take(self, most: int) -> list[Any]:
        taken: list[Any] = []
        try:
            taken.extend(islice(self._items, most))
        except RuntimeError as error:  # a dictionary or a set that was changed meanwhile
            self.error = error
            self.stop()
        self._ended = len(taken) < most
        return taken

    def ended(self) -> bool:
        return self._ended

    def stop(self) -> None:
        self._items = iter(())


class Reader(Source):
    """Reads an iterable in a thread of its own, `ahead` items at the most.

    Args:
        loop: of the session.
        iterable: what to read.
        hungry: called within the loop when items came that somebody waits for.
        ahead: bound of the buffer; may be changed any time.
    """

    def __init__(
        self, loop: Loop, iterable: Iterable[Any], hungry: Callable[[], object], ahead: int
    ) -> None:
        self._loop = loop
        self._iterable: Iterable[Any] | None = iterable
        self._hungry = hungry
        self.ahead = ahead
        self._buffer: deque[Any] = deque()
        self._wanted = True  # somebody waits for items and found none
        self._room = Event()
        self._room.set()
        self._stopped = False
        self._read_all = False
        self._thread = threading.Thread(target=self._read, name="fiber-reader", daemon=True)
        self._thread.start()

    def take(self, most: int) -> list[Any]:
        self._wanted = True  # before looking: an item that comes now is either seen or announced
        buffer = self._buffer
        taken = [buffer.popleft() for _ in range(min(most, len(buffer)))]
        if taken:
            self._wanted = False
        if not self._room.is_set and len(buffer) <= self.ahead // 2:
            self._room.set()
        return taken

    def ended(self) -> bool:
        return self._read_all and not self._buffer

    def stop(self) -> None:
        self._stopped = True
        self._room.set()

    def _read(self) -> None:
        assert self._iterable is not None
        iterable, self._iterable = self._iterable, None
        buffer = self._buffer
        try:
            for item in iterable:
                buffer.append(item)
                if self._wanted:
                    self._announce()
                if len(buffer) >= self.ahead:
                    self._wait_for_room()
                if self._stopped:
                    return
        except RuntimeError as error:
            if not self._loop.closed:
                self.error = error
        except BaseException as error:
            self.error = error
        finally:
            self._read_all = True
            if not self._stopped and not self._loop.closed:
                self._announce()

    def _announce(self) -> None:
        with self._loop:
            if not self._loop.closed:
                self._hungry()

    def _wait_for_room(self) -> None:
        with self._loop:
            if len(self._buffer) < self.ahead or self._stopped:
                return
            self._room = Event()
        self._loop.wait(self._room)


SEQUENCES = (list, tuple, range, str, bytes, dict, set, frozenset)
"""What can be read at once, without running code of the user's."""


def source_of(
    loop: Loop, iterable: Iterable[Any], hungry: Callable[[], object], ahead: int
) -> Source:
    """Return a source for `iterable`, one of `SEQUENCES` or an iterator."""
    if type(iterable) in SEQUENCES:
        return SequenceSource(iterable)
    return Reader(loop, iterable, hungry, ahead)
