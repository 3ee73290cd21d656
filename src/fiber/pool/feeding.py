"""Feeds the calls of a pool whose items come as they are needed: those of `imap`.

    iterable ─► Source ─ take ─► Feeder ─ extend ─► Scheduler
                                   ▲
    reader ─ consumed ─────────────┘   an iterator that nobody has any more ends its call

A stream is read as far ahead as the workers and who takes the results keep up. All of it within the
session's loop.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from fiber.config import config
from fiber.pool.calls import Call
from fiber.pool.crew import Crew
from fiber.pool.results import IMapUnorderedIterator
from fiber.pool.scheduler import Scheduler
from fiber.pool.source import source_of
from fiber.runtime.loop import Loop

__all__ = ["Feeder"]

_READ_AHEAD = 1024  # items that a thread reads ahead of what is sent


class _Reference(weakref.ref[IMapUnorderedIterator]):
    """A reference to a stream's iterator; its callback is a method in C.

    A finalizer in Python would swallow the KeyboardInterrupt of a Ctrl-C that comes just then.
    """

    call = 0


class Feeder:
    """See the module.

    Args:
        loop: of the session.
        scheduler: is told of new items.
        crew: for whom they are.
        act: called when the scheduler has something to be done.

    Attributes:
        dropped: references to iterators that nobody has any more, with the numbers of their calls.
        closing: whether results are awaited all at once, and not taken.
    """

    def __init__(
        self, loop: Loop, scheduler: Scheduler, crew: Crew, act: Callable[[], object]
    ) -> None:
        self.dropped: deque[_Reference] = deque()
        self.closing = False
        self._loop = loop
        self._scheduler = scheduler
        self._crew = crew
        self._act = act
        self._calls: dict[int, Call] = {}

    def begin(self, call: Call, results: IMapUnorderedIterator, iterable: Iterable[Any]) -> None:
        """A call has its items from an iterable; `feed` it once the scheduler knows it."""
        call.iterator = _Reference(results, self.dropped.append)
        call.iterator.call = call.id
        self._calls[call.id] = call
        ahead = config.imap_buffer * max(self._crew.target, 1)
        call.source = source_of(self._loop, iterable, lambda: self.feed(call), ahead)

    def feed(self, call: Call) -> None:
        """Take items from a stream's source, as far as workers and reader keep up."""
        source = call.source
        if source is None or call.id not in self._calls:
            return
        wanted = -(-self._scheduler.wants(call.id) // call.chunk) * call.chunk
        most = min(wanted, self._window(call))
        if most > 0:
            items = source.take(most)
            call.fed += len(items)
            call.items += items
            ended = source.ended()
            new = call.fed - call.told
            new -= 0 if ended else new % call.chunk
            call.told += new
            self._scheduler.extend(call.id, new)
            if ended:
                self._scheduler.complete(call.id)
            self._act()

    def feed_all(self) -> None:
        """There are more workers, or nobody will take results: streams are read further ahead."""
        for call in list(self._calls.values()):
            self.feed(call)

    def _window(self, call: Call) -> int:
        """Return how many more items may be read before results are taken."""
        if self.closing:  # who waits in `join` takes none
            return _READ_AHEAD
        workers = max(len(self._crew.workers), 1)
        batch = self._scheduler.batch_items(call.id)
        buffer = config.imap_buffer * max(self._crew.target, 1)
        most = max(buffer, 4 * batch * workers)
        weight = self._scheduler.weight(call.id)
        if weight:
            most = min(most, max(int(config.imap_buffer_mb * 2**20 / weight), 2 * workers))
        if call.source is not None:
            call.source.ahead = min(most, _READ_AHEAD)
        return max(0, max(most, call.chunk) - (call.fed - call.consumed))

    def consumed(self, call: int, items: int) -> None:
        """A stream's reader took `items` results."""
        found = self._calls.get(call)
        if found is not None:
            found.consumed += items
            self.feed(found)

    def end(self, call: Call) -> None:
        """A call has ended, a stream or not: read no more of it."""
        self._calls.pop(call.id, None)
        if call.source is not None:
            call.source.stop()
