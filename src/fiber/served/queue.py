"""A queue, as its home keeps it.

    put ─► items ─► granted to a getter, on lease ─► taken

An item that was granted to another process stays here, on lease, until that process has taken it;
if it dies before, the item goes back to where it was. How many items a process has taken it counts
in memory that it shares with the home (`Client.counts`), so that the count is right even when the
process is killed between two instructions.

A process that takes items quickly is granted several at a time, ahead of its asking. If others ask
meanwhile, they wait until it has taken these, or until its turn is over, 2 ms after it began: then
those that it has not taken are recalled. So all items are taken in the order in which they were
put. To recall them is to lower a limit, in that memory, beyond which the process may not count:
first it raises its count, then it looks at the limit; we first lower the limit, then look at the
count. A process that shares no memory with us is granted one item at a time.

A process that dies may have owed items. That is told to those who wait without a time-out, once the
queue has been empty for a moment.
"""

from __future__ import annotations

import pickle
import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice
from time import monotonic
from typing import Any

from fiber.errors import PeerDied
from fiber.runtime.home import Client, Home, Request, Served, settle
from fiber.runtime.loop import Timer
from fiber.wire.blocks import Block
from fiber.wire.framing import Buffer
from fiber.wire.pickling import PROTOCOL

__all__ = ["PARTS", "Item", "ServedQueue", "in_buffers"]

Item = Any
"""An object in a queue. A bytearray is its pickle, a list its pickle with large buffers behind it,
a `Block` tells where these are; anything else is the object itself, which cannot change."""

PARTS = "parts"
"""The answer to a `get` whose item, a list, is in the buffers."""


def in_buffers(parts: Sequence[Buffer], whole: bool) -> list[Buffer]:
    """Return an item whose large parts travel as buffers of a message, and are its own.

    Args:
        parts: a pickle and its buffers, or the one bytes object itself.
        whole: whether it is that.
    """
    if whole:
        return [pickle.dumps(parts[0], PROTOCOL)]
    return [parts[0], *map(bytearray, parts[1:])]


_STALL = 1.0  # seconds that a queue is empty before waiters are told who died
_TURN = 0.002  # seconds that a process may take what it was granted ahead while others wait
_GRANT = 1 << 17  # bytes of items that are granted ahead
_SIZED = frozenset({bytearray, bytes, str})
_ALONE = frozenset({list, Block})  # an item of these travels alone
_LIGHT = frozenset({int, float, bool, tuple, type(None)})  # any other is one of these,
_SMALL = 32  # and takes about so many bytes


class _Lease:
    """What one process was granted and may not have taken yet.

    Attributes:
        client: the process.
        items: in order.
        slot: where in its counts is what it takes, if that is not below 0; see `do_get`.
        taken: how many it has taken by its present reference.
        pinned: up to which count none is recalled: somebody was promised each of these.
        until: of `monotonic`; before, nothing is recalled for who can wait.
        owed: how many it has taken by earlier references.
        done: how many of all of these it has marked as done.
    """

    def __init__(self, client: Client, slot: int, before: _Lease | None = None) -> None:
        self.client = client
        self.slot = slot
        self.items: deque[Item] = deque()
        self.taken = self.pinned = 0
        self.until = 0.0
        self._has_blocks = False  # or had
        self.owed: int = before.owed + before.taken if before is not None else 0
        self.done: int = before.done if before is not None else 0

    @property
    def shared(self) -> bool:
        """Whether we share memory with the process."""
        return self.slot >= 0 and self.client.counts is not None

    @property
    def end(self) -> int:
        """How many it was granted."""
        return self.taken + len(self.items)

    @property
    def ahead(self) -> int:
        """How many items it has that it did not ask for yet."""
        return self.end - max(self.pinned, self.taken)

    def add(self, items: list[Item]) -> None:
        """Grant items, of which the first was asked for; the others can be recalled."""
        self.items.extend(items)
        if type(items[0]) is Block:  # it was granted alone
            self._has_blocks = True
        self.pin()
        self._limit(self.end)

    def pin(self) -> None:
        """Promise that one more can be taken for sure."""
        self.pinned = max(self.pinned, self.taken) + 1

    def settle(self, taken: int | None = None) -> None:
        """Drop what was taken, and give back its blocks."""
        if taken is None:
            counts = self.client.counts
            taken = counts[self.slot] if self.slot >= 0 and counts is not None else self.taken
        items = self.items
        count = min(taken - self.taken, len(items))
        if count <= 0:
            return
        self.taken += count
        if count == len(items) and not self._has_blocks:
            items.clear()
            return
        for _ in range(count):
            item = items.popleft()
            if type(item) is Block:
                self.client.home.block_read(item)

    def recall(self) -> list[Item]:
        """Return what was granted ahead and is not taken: the process will find that it is gone."""
        self.settle()
        if self.ahead <= 0:
            return []
        # The process may be counting at this very moment. It looks at the limit after that, so
        # either it sees that we were faster, or we see its count.
        limit = max(self.pinned, self.taken)
        self._limit(limit)
        settle()
        self.settle()
        items = [self.items.pop() for _ in range(self.end - max(limit, self.taken))]
        self._limit(self.end)  # which is more, if it was faster
        return items[::-1]

    def _limit(self, count: int) -> None:
        if self.shared:
            self.client.counts[self.slot + 1] = count  # type: ignore[index]


class ServedQueue(Served):
    """A queue.

    Args:
        home: where it lives.
        maxsize: how many items it holds at the most; 0 for any number.
        joinable: whether items are marked as done.

    Attributes:
        items: in order, save those on lease.
        mutex: guards the next two, for threads of the home that take items without the loop.
        ahead: the one lease with items that were granted ahead, which come before all others.
    """

    def __init__(self, home: Home, maxsize: int, joinable: bool) -> None:
        super().__init__(home)
        self._joinable = joinable
        self.items: deque[Item] = deque()
        self.mutex = threading.Lock()
        self.ahead: _Lease | None = None
        self._turn: Timer | None = None  # its end, if somebody waits for that
        self._maxsize = maxsize
        self._getters: dict[Request, int] = {}  # and how many items they could use
        self._patient: set[Request] = set()  # those of them without a time-out
        self._putters: dict[Request, tuple[Item, float | None]] = {}
        self._leases: dict[Client, _Lease] = {}
        self._producers: set[Client] = set()
        self._unfinished = 0
        self._joiners: dict[Request, None] = {}
        self._watchers: dict[Request, None] = {}
        self._died: dict[tuple[str, int], str] = {}  # who died, and was not told of yet
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

    def do_put_one(
        self, request: Request, item: Item, seconds: float | None, until: float | None
    ) -> None:
        """Append an item once there is room; answer whether there was, in time.

        Args:
            request: the call.
            item: what; None for one that came in buffers.
            seconds: how long to wait.
            until: when the caller stops to wait for the answer, of `time.monotonic`.
        """
        self._producers.add(request.client)
        whole = list(request.buffers) if request.buffers else item
        if type(item) is Block:
            self.home.block_came(request.client, item)
        late = until is not None and monotonic() > until
        if len(self.items) < self._maxsize and not self._putters and not late:
            self._accept(request, whole)
            self._serve()
        elif seconds == 0 or late:
            self._free(whole)
            request.answer(False)
        else:
            self._putters[request] = (whole, until)
            request.on_withdrawn = lambda: self._free(self._putters.pop(request)[0])
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

        Another process is also told how many it was granted before these. It may be sent none: then
        it has some that it can take.

        Args:
            request: the call.
            want: how many could be used soon.
            seconds: how long to wait.
            slot: of its reference; where in its counts is what it takes, and next to it the limit
                of that; below 0 if we share no memory.
            taken: that count.
        """
        client = request.client
        if client.link is not None:
            lease = self._lease(client, slot)
            lease.settle(None if lease.shared else taken)
            if lease.taken > taken:  # one that it took while we recalled it is its own after all
                request.answer((lease.end, []))
                return
            if lease.ahead > 0:  # on their way to another of its threads, or there
                lease.pin()
                request.answer((lease.end, []))
                return
        if self.ahead is not None:
            self._limit_turn(seconds)
        self._getters[request] = 1 if self._maxsize else want
        self._serve()
        if request not in self._getters:
            return
        if seconds == 0:
            self._time_out(request)
            return
        request.on_withdrawn = lambda: self._forget(request)
        if seconds is None:
            self._patient.add(request)
            if self._died:
                request.expire(_STALL, self._tell)
        else:
            request.expire(seconds, lambda: self._time_out(request))

    def do_unget(self, request: Request, item: Item) -> None:
        """Take back an item that a thread of the home was given and did not take."""
        self.items.appendleft(item)
        self._serve()

    def do_unpin(self, request: Request) -> None:
        """A process was interrupted when it waited for items, and may not take those it has."""
        lease = self._leases.get(request.client)
        if lease is not None:
            lease.settle()
            lease.pinned = lease.taken
            with self.mutex:
                if self.ahead is lease:
                    self.ahead = None
                self.items.extendleft(reversed(lease.recall()))
            self._serve()

    def do_took(self, request: Request, taken: int) -> None:
        """Hear how much was taken: of a block, or from a process that shares no memory with us."""
        lease = self._leases.get(request.client)
        if lease is not None:
            lease.settle(taken)

    def do_watch(self, request: Request) -> None:
        """Answer once there is an item, and leave it there."""
        if self.ahead is not None:
            self._recall()
        if self.items:
            request.answer()
        else:
            self._watchers[request] = None
            request.on_withdrawn = lambda: self._watchers.pop(request, None)

    def do_size(self, request: Request) -> None:
        """Answer how many items nobody has taken."""
        for lease in self._leases.values():
            lease.settle()
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
            while self._getters and self.items and self.ahead is None:
                self._grant()
            if not self._putters or len(self.items) >= self._maxsize:
                break
            request = next(iter(self._putters))
            item, until = self._putters[request]
            if until is not None and monotonic() > until:
                self._refuse(request)
            else:
                del self._putters[request]
                self._accept(request, item)
        if self._watchers and self.items:
            watchers, self._watchers = self._watchers, {}
            for request in watchers:
                request.answer()

    def _accept(self, request: Request, item: Item) -> None:
        self.items.append(item)
        self._unfinished += 1
        request.answer(True)

    def _refuse(self, request: Request) -> None:
        self._free(self._putters.pop(request)[0])
        request.answer(False)

    def _free(self, item: Item) -> None:
        """Nobody will read it."""
        if type(item) is Block:
            self.home.block_read(item)

    def _grant(self) -> None:
        """Answer getters: an item for each, and for one of them what is left, ahead."""
        grants: list[tuple[Request, int, list[Item]]] = []
        with self.mutex:  # with it held, `items` does not become shorter
            while self._getters and self.items:
                request, want = next(iter(self._getters.items()))
                self._forget(request)
                grants.append((request, want, [self.items.popleft()]))
            if self.items:
                self._grant_ahead(grants)
        for request, _, granted in grants:
            if type(granted[0]) is Block and not request.client.near:
                try:
                    granted[0] = self._unblocked(granted[0])
                except PeerDied as error:
                    request.fail(error)
                    continue
            lease = self._leases.get(request.client)
            if lease is None:
                request.answer(granted)
                continue
            start = lease.end
            lease.add(granted)
            if type(granted[0]) is list:
                request.answer((start, PARTS), granted[0])
            else:
                request.answer((start, granted))

    def _unblocked(self, block: Block) -> list[Buffer]:
        """Return what is in a block, for a process that cannot map it."""
        try:
            found = self.home.reader.read(block)
        except OSError as error:
            raise PeerDied(f"an item is lost, for its shared memory is gone: {error}") from None
        finally:
            self.home.block_read(block)
        return in_buffers([found] if isinstance(found, bytes) else found, block.whole)

    def _grant_ahead(self, grants: list[tuple[Request, int, list[Item]]]) -> None:
        """Add more items to what one process is granted: the one that has waited the longest."""
        lease: _Lease | None = None
        for request, want, granted in grants:
            its = self._leases.get(request.client)
            if lease is None and want > 1 and its is not None and its.shared:
                lease = its
            if lease is not None and its is lease:
                most, last = want, granted  # of its threads: they take them in this order
        if lease is None or type(last[0]) in _ALONE:
            return
        size = 0
        next_items = list(islice(self.items, most - len(last)))
        if _LIGHT.issuperset(map(type, next_items)):  # as they most often are
            del next_items[_GRANT // _SMALL :]
        else:
            for count, item in enumerate(next_items):
                kind = type(item)
                size += len(item) if kind in _SIZED else _SMALL
                if kind in _ALONE or size > _GRANT:
                    del next_items[count:]
                    break
        for item in next_items:
            last.append(item)
            self.items.popleft()
        if len(last) > 1:
            self.ahead = lease
            lease.until = monotonic() + _TURN

    def _limit_turn(self, seconds: float | None) -> None:
        """Somebody would wait so long for items that come behind those that were granted ahead."""
        lease = self.ahead
        assert lease is not None
        lease.settle()
        left = lease.until - monotonic()
        if lease.ahead <= 0 or seconds == 0 or left <= 0:
            self._recall()
        elif self._turn is None:
            self._turn = self.home.loop.call_later(left, self._end_turn)

    def _end_turn(self) -> None:
        self._turn = None
        if self.ahead is not None and self._getters:
            self._limit_turn(None)
            self._serve()

    def _lease(self, client: Client, slot: int) -> _Lease:
        """Return the lease of a process that gets by a reference with that slot."""
        lease = self._leases.get(client)
        if lease is None:
            lease = self._leases[client] = _Lease(client, slot)
        elif lease.slot != slot:  # its process dropped the queue, and began anew
            lease.settle()
            self._take_back(lease)
            lease = self._leases[client] = _Lease(client, slot, lease)
        return lease

    def _recall(self) -> None:
        """Take back what was granted ahead."""
        lease = self.ahead
        assert lease is not None
        with self.mutex:
            self.ahead = None
            self.items.extendleft(reversed(lease.recall()))

    def _take_back(self, lease: _Lease) -> None:
        """Put the items of a lease that has ended back to where they were."""
        with self.mutex:
            if self.ahead is lease:
                self.ahead = None
            self.items.extendleft(reversed(lease.items))
            lease.items.clear()
        self._serve()

    def _forget(self, request: Request) -> None:
        self._getters.pop(request, None)
        self._patient.discard(request)

    def _time_out(self, request: Request) -> None:
        self._forget(request)
        request.answer(None)

    def _tell(self) -> None:
        """The queue has been empty for a while since somebody died: say so to all who wait."""
        died = [who for process, who in self._died.items() if not self.home.forgiven(process)]
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
                f"{name} died with {count} item{'s' * (count != 1)} that it had taken and "
                "not marked as done"
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
            lease.settle()
            taken = lease.owed + lease.taken
            took = taken > 0
            if died and taken > lease.done:
                self._owed[str(client)] = taken - lease.done
            self._take_back(lease)
        owes = client in self._producers or not took
        self._producers.discard(client)
        if died and owes and not client.supervised and not self.home.forgiven(client.process):
            self._died[client.process] = str(client)
            for request in self._patient:
                request.expire(_STALL, self._tell)
        self._check_joiners()

    def dropped(self) -> None:
        for item in self.items:
            self._free(item)
        self.items.clear()
