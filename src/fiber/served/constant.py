"""A constant, as its home keeps it.

    put ─► Snapshot ─► open: where it is ─► mapped, by a process of this place
                    └► read: its bytes ───► copied, once, into another place

It is kept while anybody has a handle, or a pickle of one is under way: each pickle has a ticket,
which whoever unpickles it gives back. Who has let go of its handle may still have the object at
hand, for the next one: it *watches*, and is told when the constant is gone.
"""

from __future__ import annotations

from time import monotonic

from fiber.runtime.home import Home, Request, Served
from fiber.runtime.snapshots import LEAST, Snapshot

__all__ = ["ServedConstant"]

_LEASE = 60.0  # seconds that a ticket is good for


class ServedConstant(Served):
    """A constant.

    Args:
        home: where it lives.
        snapshot: of the object; ours from now on.
    """

    def __init__(self, home: Home, snapshot: Snapshot) -> None:
        super().__init__(home)
        self._snapshot = snapshot
        self._tickets: dict[int, float] = {}
        self._watchers: dict[Request, None] = {}

    def do_open(self, request: Request) -> None:
        """Answer with the file's path, "" if there is none, and its size; a small one comes along.

        The path is for who sees the files of this place.
        """
        snapshot = self._snapshot
        small = not snapshot.path and snapshot.size < LEAST
        request.answer((snapshot.path, snapshot.size), [snapshot.memory] if small else ())

    def do_read(self, request: Request, start: int, stop: int) -> None:
        """Answer with its bytes from `start` to `stop`, as a buffer."""
        request.answer(None, [self._snapshot.memory[start:stop]])

    def do_watch(self, request: Request) -> None:
        """Answer when it is gone."""
        self._watchers[request] = None
        request.on_withdrawn = lambda: self._watchers.pop(request, None)

    def do_lend(self, request: Request, ticket: int) -> None:
        """A handle was pickled."""
        now = monotonic()
        while self._tickets and (oldest := next(iter(self._tickets.items())))[1] < now:
            del self._tickets[oldest[0]]
        self._tickets[ticket] = self.leased_until = now + _LEASE

    def do_arrived(self, request: Request, ticket: int) -> None:
        """A pickle was unpickled, by the caller, who has a handle now."""
        self._tickets.pop(ticket, None)
        self.leased_until = next(reversed(self._tickets.values()), 0.0)

    def dropped(self) -> None:
        """Remove it, and tell those who have it at hand."""
        watchers, self._watchers = self._watchers, {}
        for request in watchers:
            request.answer()
        self._snapshot.free()
