"""Where the members of a ring meet, as its home keeps it: who they are, and where to reach them."""

from __future__ import annotations

from fiber.errors import PeerDied
from fiber.runtime.home import Client, Home, Request, Served

__all__ = ["ServedMeeting"]


class ServedMeeting(Served):
    """Knows the addresses of `size` members, once all have told theirs."""

    def __init__(self, home: Home, size: int) -> None:
        super().__init__(home)
        self._size = size
        self._addresses: dict[int, tuple[str, int]] = {}
        self._waiters: dict[Request, None] = {}
        self._dead = ""

    def do_announce(self, request: Request, rank: int, address: tuple[str, int]) -> None:
        """Hear where a member can be reached."""
        self._addresses[rank] = address
        request.answer()
        if len(self._addresses) == self._size:
            waiters, self._waiters = self._waiters, {}
            for waiter in waiters:
                waiter.answer(self._all())

    def do_meet(self, request: Request) -> None:
        """Answer all addresses, by rank, once they are known."""
        if len(self._addresses) == self._size:
            request.answer(self._all())
        elif self._dead:
            request.fail(PeerDied(self._dead))
        else:
            self._waiters[request] = None
            request.on_withdrawn = lambda: self._waiters.pop(request, None)

    def _all(self) -> list[tuple[str, int]]:
        return [self._addresses[rank] for rank in range(self._size)]

    def left(self, client: Client, died: bool) -> None:
        if died and len(self._addresses) < self._size:
            self._dead = self._dead or f"{client} died before all members of the ring had met"
            waiters, self._waiters = self._waiters, {}
            for waiter in waiters:
                waiter.fail(PeerDied(self._dead))
