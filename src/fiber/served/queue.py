"""A queue, as its home keeps it.

    put ─► items ─► granted to a getter, on lease ─► taken

An item that was granted to another process stays here, on lease, until that process has taken it;
if it dies before, the item goes back to where it was. How many items a process has taken it counts
in memory that it shares with the home (`Client.counts`), so that the count is right even when the
process is killed between two instructions.

To a process that takes items quickly more than one is granted at a time. Should somebody else wait
while such items lie unused, they are called back.

A process that dies may have owed items. That is told to those who wait without a time-out, once the
queue has been empty for a moment.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from fiber.errors import PeerDied
from fiber.runtime.home import Client, Home, Request, Served
from fiber.wire.blocks import Block

__all__ = ["PARTS", "Item", "ServedQueue"]

Item = Any
"""An object in a queue. A bytearray is its pickle, a list its pickle with large buffers behind it,
a `Block` tells where these are; anything else is the object itself, which cannot change."""

PARTS = "parts"
"""The answer to a `get` whose item, a list, is in the buffers."""

_STALL = 1.0  # seconds that a queue is empty before waiters are told who died
_HASTE = 0.5  # seconds that a get which shall not wait does wait for items to be given back
_GRANT = 1 << 16  # bytes of items that are granted ahead
_SIZED = frozenset({bytearray, bytes, str})
_ALONE = frozenset({list, Block})  # an item of these travels alone
_SMALL = 32  # bytes: about what any other item takes


class _Lease:
    """What one process was granted and may not have taken yet.

    Attributes:
        items: in order.
        slot: of the reference by which it gets, see `do_get`.
        taken: how many it has taken by that reference.
        owed: how many by earlier ones.
        done: how many of all of these it has marked as done.
        called_back: whether it was asked to give back what it does not use.
    """

    def __init__(self, slot: int, before: _Lease | None = None) -> None:
        self.slot = slot
        self.items: deque[Item] = deque()
        self.taken = 0
        self.owed: int = before.owed + before.taken if before is not None else 0
        self.done: int = before.done if before is not None else 0
        self.called_back = False

    def count(self, client: Client) -> int:
        """Return how many items were taken, as the process counts them."""
        if self.slot >= 0 and client.counts is not None:
            return client.counts[self.slot]
        return self.taken

    def settle(self, client: Client, taken: int | None = None) -> None:
        """Drop what was taken, and give back its blocks."""
        if taken is None:
            taken = self.count(client)
        while self.taken < taken and self.items:
            item = self.items.popleft()
            if type(item) is Block:
                client.home.block_read(item)
            self.taken += 1


class ServedQueue(Served):
    """A queue.

    Args:
        home: where it lives.
        maxsize: how many items it holds at the most; 0 for any number.
        joinable: whether items are marked as done.
    """

    def __init__(self, home: Home, maxsize: int, joinable: bool) -> None:
        super().__init__(home)
        self._joinable = joinable
        self.items: deque[Item] = deque()
        self._maxsize = maxsize
        self._getters: dict[Request, int] = {}  # and how many items they could use
        self._patient: set[Request] = set()  # those of them without a time-out
        self._hasty: set[Request] = set()  # those that wait only for leases to come back
        self._putters: dict[Request, Item] = {}
        self._leases: dict[Client, _Lease] = {}
        self._producers: set[Client] = set()
        self._unfinished = 0
        self._joiners: dict[Request, None] = {}
        self._watchers: dict[Request, None] = {}
        self._died: dict[int, str] = {}  # who died, and was not told of yet
        self._owed: dict[str, int] = {}  # what the dead had taken and not marked as done

    @property
    def bounded(self) -> bool:
        """Whether it holds so many items and no more."""
        return self._maxsize > 0

    # Called by users

    def do_put(self, request: Request, items: list[Item] | None = None) -> None:
        """Append items to a queue without bounds; None for one that came in buffers."""
        self._producers.add(request.client)
        if items is None:
            self.items.append(list(request.buffers))
            self._unfinished += 1
        else:
            for item in items:
                if type(item) is Block:
                    self.home.block_came(request.client, item)
            self.items.extend(items)
            self._unfinished += len(items)
        if self._getters or self._watchers:
            self._serve()

    def do_put_one(self, request: Request, item: Item, seconds: float | None) -> None:
        """Append an item once there is room; answer whether there was, in time."""
        self._producers.add(request.client)
        whole = list(request.buffers) if request.buffers else item
        if type(item) is Block:
            self.home.block_came(request.client, item)
        if len(self.items) < self._maxsize and not self._putters:
            self._accept(request, whole)
            self._serve()
        elif seconds == 0:
            self._free(whole)
            request.answer(False)
        else:
            self._putters[request] = whole
            request.on_withdrawn = lambda: self._free(self._putters.pop(request))
            request.expire(seconds, lambda: self._refuse(request))

    def do_get(
        self,
        request: Request,
        want: int,
        seconds: float | None,
        slot: int = -1,
        taken: int = 0,
    ) -> None:
        """Answer up to `want` items, or PARTS; None when time is out.

        Args:
            request: the call.
            want: how many could be used soon.
            seconds: how long to wait.
            slot: of its reference; where in its counts is what it takes, if that is not below 0.
            taken: that count.
        """
        client = request.client
        if client.link is not None:
            lease = self._leases.get(client)
            if lease is not None and lease.slot != slot:  # its process dropped it, and began anew
                lease.settle(client)
                self._take_back(lease, len(lease.items))
                lease = _Lease(slot, lease)
            elif lease is None:
                lease = _Lease(slot)
            self._leases[client] = lease
            lease.settle(client, taken)
        self._getters[request] = 1 if self._maxsize else want
        self._serve()
        if request not in self._getters:
            return
        waits = self._call_back()
        if seconds == 0 and not waits:
            self._time_out(request)
            return
        request.on_withdrawn = lambda: self._forget(request)
        if seconds is None:
            self._patient.add(request)
            if self._died:
                request.expire(_STALL, self._tell)
        elif seconds == 0:
            self._hasty.add(request)
            request.expire(_HASTE, lambda: self._time_out(request))
        else:
            request.expire(seconds, lambda: self._time_out(request))

    def do_unget(self, request: Request, item: Item) -> None:
        """Take back an item that was granted and that nobody took."""
        self.items.appendleft(list(request.buffers) if request.buffers else item)
        self._serve()

    def do_took(self, request: Request, taken: int) -> None:
        """Hear how much was taken, from a process that shares no memory with us."""
        lease = self._leases.get(request.client)
        if lease is not None:
            lease.settle(request.client, taken)

    def do_give_back(self, request: Request, taken: int, unused: int) -> None:
        """Take back what was granted and is not used, save what is only on its way there."""
        lease = self._leases.get(request.client)
        if lease is not None:
            lease.called_back = False
            lease.settle(request.client, taken)
            self._take_back(lease, unused)
        self._end_haste()

    def do_unknown(self, request: Request, *facts: object) -> None:
        """A process that was called back has dropped the queue meanwhile."""
        lease = self._leases.get(request.client)
        if lease is not None:
            self.do_give_back(request, lease.count(request.client), len(lease.items))

    def do_watch(self, request: Request) -> None:
        """Answer once there is an item, and leave it there."""
        if self.items:
            request.answer()
        else:
            self._watchers[request] = None
            request.on_withdrawn = lambda: self._watchers.pop(request, None)

    def do_size(self, request: Request) -> None:
        """Answer how many items nobody has taken."""
        for client, lease in self._leases.items():
            lease.settle(client)
        size = len(self.items)
        if not self._maxsize:  # else each was granted to who waited for it, and is as good as taken
            size += sum(len(lease.items) for lease in self._leases.values())
        request.answer(size)

    def do_task_done(self, request: Request) -> None:
        """One item that was taken is done."""
        if self._unfinished <= 0:
            raise ValueError("task_done() called too many times")
        self._unfinished -= 1
        lease = self._leases.get(request.client)
        if lease is not None:
            lease.done += 1
        request.answer()
        self._check_joiners()

    def do_join(self, request: Request) -> None:
        """Answer when all items are done."""
        self._joiners[request] = None
        request.on_withdrawn = lambda: self._joiners.pop(request, None)
        self._check_joiners()

    # Within

    def _serve(self) -> None:
        """Hand items to getters, and so make room for putters."""
        while True:
            while self._getters and self.items:
                self._grant(next(iter(self._getters)))
            if not self._putters or len(self.items) >= self._maxsize:
                break
            request = next(iter(self._putters))
            self._accept(request, self._putters.pop(request))
        if self._getters:
            self._call_back()
        if self._watchers and self.items:
            watchers, self._watchers = self._watchers, {}
            for request in watchers:
                request.answer()

    def _accept(self, request: Request, item: Item) -> None:
        self.items.append(item)
        self._unfinished += 1
        request.answer(True)

    def _refuse(self, request: Request) -> None:
        self._free(self._putters.pop(request))
        request.answer(False)

    def _free(self, item: Item) -> None:
        """Nobody will read it."""
        if type(item) is Block:
            self.home.block_read(item)

    def _grant(self, request: Request) -> None:
        """Answer a getter with the first items."""
        client = request.client
        try:
            first = self.items.popleft()
        except IndexError:  # a thread of this process took it meanwhile
            return
        want = self._getters[request]
        self._forget(request)
        lease = self._leases.get(client)
        granted = [first]
        if type(first) is list and lease is not None:
            lease.items.append(first)
            request.answer(PARTS, first)
            return
        if lease is not None:
            share = len(self.items) // max(len(self._leases), len(self._getters) + 1)
            size = 0
            while len(granted) < min(want, share) and type(first) is not Block:
                item = self.items[0]
                size += len(item) if type(item) in _SIZED else _SMALL
                if type(item) in _ALONE or size > _GRANT:
                    break
                granted.append(item)
                self.items.popleft()
            lease.items.extend(granted)
        request.answer(granted)

    def _call_back(self) -> bool:
        """Ask for what was granted and is not used; return whether any may come."""
        for other, lease in self._leases.items():
            lease.settle(other)
            if lease.items and not lease.called_back:
                lease.called_back = True
                other.note(self, "give_back")
        return any(lease.called_back for lease in self._leases.values())

    def _take_back(self, lease: _Lease, count: int) -> None:
        """Put the first items of a lease back to where they were."""
        items = [lease.items.popleft() for _ in range(min(count, len(lease.items)))]
        self.items.extendleft(reversed(items))
        self._serve()

    def _end_haste(self) -> None:
        """Answer those who wait only for leases, if there are none any more."""
        if not any(lease.called_back for lease in self._leases.values()):
            for request in list(self._hasty):
                self._time_out(request)

    def _forget(self, request: Request) -> None:
        self._getters.pop(request, None)
        self._patient.discard(request)
        self._hasty.discard(request)

    def _time_out(self, request: Request) -> None:
        self._forget(request)
        request.answer(None)

    def _tell(self) -> None:
        """The queue has been empty for a while since somebody died: say so to all who wait."""
        died = [who for pid, who in self._died.items() if not self.home.forgiven(pid)]
        self._died.clear()
        if not died:
            return
        who = " and ".join(died)
        for request in list(self._patient):
            self._forget(request)
            request.fail(PeerDied(f"{who} died: what it still had to put will not come"))

    def _check_joiners(self) -> None:
        if not self._joiners:
            return
        if self._unfinished <= 0:
            joiners, self._joiners = self._joiners, {}
            for request in joiners:
                request.answer()
        elif self._unfinished <= self._debt():
            who = " and ".join(
                f"{name} died with {count} items that it had taken and not marked as done"
                for name, count in self._owed.items()
            )
            joiners, self._joiners = self._joiners, {}
            for request in joiners:
                request.fail(PeerDied(who))

    def _debt(self) -> int:
        """Return how many items nobody will mark as done, for those who took them are dead."""
        marked_for_others = sum(
            max(0, lease.done - lease.owed - lease.taken) for lease in self._leases.values()
        )
        return sum(self._owed.values()) - marked_for_others

    def keeps(self, client: Client) -> bool:
        lease = self._leases.get(client)
        return self._joinable and lease is not None and lease.owed + lease.taken > lease.done

    def left(self, client: Client, died: bool) -> None:
        lease = self._leases.pop(client, None)
        took = False
        if lease is not None:
            lease.settle(client)
            taken = lease.owed + lease.taken
            took = taken > 0
            if died and taken > lease.done:
                self._owed[str(client)] = taken - lease.done
            self._take_back(lease, len(lease.items))
            self._end_haste()
        owes = client in self._producers or not took
        self._producers.discard(client)
        if died and owes and not client.supervised and not self.home.forgiven(client.pid):
            self._died[client.pid] = str(client)
            for request in self._patient:
                request.expire(_STALL, self._tell)
        self._check_joiners()

    def dropped(self) -> None:
        for item in self.items:
            self._free(item)
        self.items.clear()
