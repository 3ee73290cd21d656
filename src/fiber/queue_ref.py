"""A queue as a process has it: what it has put and not sent, been granted and not taken.

    put ─► pack ─► pending ─► the home of the queue (fiber.served.queue)
                                       │
    get ◄─ unpack ◄─ ready ◄─ granted ─┘

A burst of small items is sent together. A process that takes items quickly asks for several at a
time; how many it has taken it counts in memory that it shares with the home, which recalls others
by a limit to that count.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Any

from fiber.errors import PeerDied
from fiber.runtime import session
from fiber.runtime.loop import Event
from fiber.runtime.refs import GRACE, Here, Peer, Ref, Way
from fiber.served.queue import PARTS, Item, ServedQueue, in_buffers
from fiber.wire.blocks import Block
from fiber.wire.framing import Buffer
from fiber.wire.pickling import PLAIN, PROTOCOL, SIZED, dumps, is_flat, loads

__all__ = ["AS_IT_IS", "NOTHING", "QueueRef", "pack", "unpack"]

_BURST = 0.0002  # seconds: what is put so soon after the last sending waits for more
_MANY = 16  # items sent together that tell that this thread is busy with putting
_PAUSE = 0.002  # seconds that a put waits, at the most, for shared memory to be used again
_TAIL = 0.001  # seconds after which it is sent at the latest
_LARGE = 1 << 14  # bytes: a larger item travels alone, and is not copied into a batch
_WHOLE = b"whole"
"""Begins a list whose second and last part is no pickle but the object, large bytes."""

_QUICK = 0.00005  # seconds: who takes an item in less is granted several at a time
_AHEAD = 0.004  # seconds that it takes to take those
_MOST = 4096  # items granted at a time
NOTHING = object()
"""In the place of an item: there is none."""

AS_IT_IS = PLAIN | {tuple}
"""Types of items that are the objects themselves."""


class QueueRef(Ref):
    """The queue, as this process has it: what is put and not sent, granted and not taken.

    Attributes:
        ready: what was granted and not taken.
        here: the queue itself, once `prepare` has found that it lives in this process.
    """

    def __init__(self, address: str, target: int) -> None:
        super().__init__(address, target)
        self._set()

    def _set(self) -> None:
        self._pending: deque[Item] = deque()
        self._send_at = 0.0  # of `monotonic`: from then on, a put sends at once
        self._armed = False  # whether a timer will send what is pending
        self.ready: deque[Item] = deque()
        self._end = 0  # how many items were ever granted
        self._mutex = threading.Lock()  # guards these two
        self._counts: memoryview | None = None
        self._slot = -1  # where in these is the count of what was taken, and behind it its limit
        self._recalled = False  # whether the home has taken back what was granted
        self._want = 1
        self._granted_at = 0.0
        self._taken_then = 0
        self.here: ServedQueue | None = None
        self._prepared: Way | None = None
        self._preparing = threading.Lock()

    def renew(self) -> None:
        self._set()

    def prepare(self) -> Way:
        """Return the way to the home; at first, see what there is to gain from being near it."""
        way = self.way
        if way is not self._prepared:
            way.connect()
            with self._preparing:
                if way is not self._prepared:
                    self._prepare(way)
        return way

    def _prepare(self, way: Way) -> None:
        self.here = None
        if isinstance(way, Here):
            with way.loop:
                served = way.home.objects.get(self.id)
            if isinstance(served, ServedQueue) and not served.bounded:
                self.here = served
        else:
            self._counts, self._slot = way.counter()
        self._prepared = way

    # Putting

    def put(self, item: Item) -> None:
        """Put an item into a queue without bounds."""
        if type(item) is list:
            way = self.way
            way.connect()
            item = self._lend(item, way)
            with way.loop:
                self._send(way)
                if type(item) is list:
                    way.cast(self.id, "put", (), item)
                else:
                    way.cast(self.id, "put", ([item],), ())
                way.loop.poll_within()  # blocks may have come back
            return
        self._pending.append(item)
        if monotonic() > self._send_at:
            self.flush()
        elif not self._armed:
            self._armed = True
            loop = self.way.loop
            with loop:
                loop.call_later(_TAIL, self._send_tail)

    def put_one(self, item: Item, seconds: float | None) -> bool:
        """Put an item into a queue with bounds; return whether there was room in time."""
        way = self.way
        way.connect()
        if type(item) is list:
            item = self._lend(item, way)
        whole, buffers = (None, item) if type(item) is list else (item, ())
        # A home that was stopped reads this when nobody waits any more: then it must not be put.
        # That is for the clock of this host only.
        timed = seconds is not None and way.near
        until = monotonic() + seconds + GRACE / 2 if timed and seconds is not None else None
        call = self.call_for("put_one", (whole, seconds, until), buffers, timeout=seconds)
        return call is not None and bool(call.result)

    def _lend(self, item: list[Buffer], way: Way) -> Item:
        """Return the item as it shall travel: in a block, or else with buffers that are its own."""
        whole = item[0] == _WHOLE
        parts = item[1:] if whole else item
        blocks = self.session.blocks
        if not way.near:
            return in_buffers(parts, whole)
        with way.loop:
            if blocks.is_worth_waiting(sum(map(len, parts))):
                back = Event()
                blocks.on_back = back.set
                way.loop.wait_within(back, monotonic() + _PAUSE)
                blocks.on_back = None
            block = blocks.lend(parts, whole=whole)
        return in_buffers(parts, whole) if block is None else block

    def flush(self) -> None:
        """Send what is pending."""
        if self._pending:
            way = self.way
            try:
                way.connect()
                with way.loop:
                    if self._send(way) > _MANY:
                        way.loop.poll_within()
            except PeerDied:
                self._pending.clear()
                raise

    def finish(self) -> None:
        if self._pending and self._way is not None:
            self._send(self._way)

    def _send(self, way: Way) -> int:
        pending = self._pending
        items = [pending.popleft() for _ in range(len(pending))]
        if items:
            way.cast(self.id, "put", (items,), ())
        self._send_at = monotonic() + _BURST
        return len(items)

    def _send_tail(self) -> None:
        self._armed = False
        way = self._way
        if self._pending and way is not None:
            try:
                self._send(way)
            except PeerDied:
                self._pending.clear()  # the next put will tell
            else:
                self._armed = True
                way.loop.call_later(_TAIL, self._send_tail)

    # Getting

    def get(self, seconds: float | None) -> Item:
        """Return the next item; `NOTHING` if there was none in time."""
        if self._pending:
            self.flush()
        way = self.prepare()
        if isinstance(way, Peer):
            return self._get_remotely(seconds)
        item = self.take()  # `prepare` may have found that it is here
        if item is not NOTHING:
            return item
        call = self.call_for("get", (1, seconds), timeout=seconds, undo=self._undo)
        if call is None or call.result is None:
            return NOTHING
        return call.result[0]

    def _get_remotely(self, seconds: float | None) -> Item:
        deadline = None if seconds is None else monotonic() + seconds
        try:
            while True:
                item = self.take()
                if item is not NOTHING:
                    return item
                taken = self._end - len(self.ready)
                facts = (self._usable(taken), seconds, self._slot, taken)
                call = self.call_for("get", facts, (), seconds, self._unpin, self._accept)
                if call is None or call.result is None:
                    return NOTHING
                self._granted_at, self._taken_then = monotonic(), taken
                if deadline is not None:
                    seconds = max(0.0, deadline - monotonic())
        except BaseException:
            loop = self.loop
            if not (loop.closed or loop.failed):
                with loop:
                    self._unpin()
            raise

    def _usable(self, taken: int) -> int:
        """Return how many items could be used soon, by what was used of the last ones."""
        used = taken - self._taken_then
        took = monotonic() - self._granted_at
        if took >= used * _QUICK:
            self._want = 1
        else:
            more = 1.25 * used if self._recalled else 2 * self._want
            self._want = int(min(more, used * _AHEAD / took, _MOST))
        self._recalled = False
        return self._want

    def _accept(self, result: Any, buffers: Sequence[Buffer]) -> Any:
        """Items were granted: they are ready to be taken. In the loop."""
        if result is not None:
            start, items = result
            with self._mutex:
                # What the home has recalled since is at the end of what is ready.
                for _ in range(min(self._end - start, len(self.ready))):
                    self.ready.pop()
                self.ready.extend([list(buffers)] if items == PARTS else items)
                self._end = start + (1 if items == PARTS else len(items))
        return result

    def take(self) -> Item:
        """Take the first item that is at hand; `NOTHING` if there is none, or it was recalled."""
        here = self.here
        if here is not None:
            with here.mutex:
                return here.items.popleft() if here.items and here.ahead is None else NOTHING
        counts = self._counts
        with self._mutex:
            ready = self.ready
            if not ready:
                return NOTHING
            item = ready[0]
            taken = self._end - len(ready) + 1
            is_block = type(item) is Block
            if is_block:
                # Read before it is counted: then it will be used again.
                try:
                    ready[0] = item = self._read(item)
                except PeerDied:
                    ready.popleft()
                    raise
            if counts is not None:
                # In this order: see `served.queue`.
                slot = self._slot
                counts[slot] = taken
                if counts[slot + 1] < taken:
                    counts[slot] = taken - 1
                    self._recalled = True
                    return NOTHING
            ready.popleft()
        if is_block or counts is None:
            with self.loop:
                self.way.cast(self.id, "took", (taken,), ())
        return item

    def _read(self, block: Block) -> Item:
        """Return a copy of what is in a block."""
        try:
            found = self.session.reader.read(block)
        except OSError as error:
            raise PeerDied(f"an item is lost, for its shared memory is gone: {error}") from None
        return [_WHOLE, found] if block.whole else found

    def read(self, item: Item) -> Item:
        """Return what a local item stands for."""
        if type(item) is not Block:
            return item
        way = self.way
        assert isinstance(way, Here)
        try:
            return self._read(item)
        finally:
            with way.loop:
                way.home.block_read(item)

    def _undo(self, result: Any) -> None:
        """Give back, within the loop, an item that no thread of the home takes."""
        if result is not None:
            self.way.cast(self.id, "unget", (result[0],), ())

    def _unpin(self, result: object = None) -> None:
        """Tell the home, within the loop, that nobody waits for what it has granted."""
        with contextlib.suppress(PeerDied):
            self.way.cast(self.id, "unpin", (), ())

    def __del__(self) -> None:
        way, target = self._way, self.id
        if self._pending and way is not None and not way.loop.closed:
            items = list(self._pending)
            way.loop.call_soon(lambda: _put_last(way, target, items))
        super().__del__()


def _put_last(way: Way, target: int, items: list[Item]) -> None:
    """Send what was put by a reference that was collected."""
    with contextlib.suppress(PeerDied):
        way.cast(target, "put", (items,), ())


def pack(obj: object) -> Item:
    """Return `obj` as an item."""
    kind = type(obj)
    if kind in PLAIN:
        if kind not in SIZED or len(obj) <= _LARGE:  # type: ignore[arg-type]
            return obj
        if kind is bytes:
            return [_WHOLE, obj]
    elif is_flat(obj):
        return obj if kind is tuple else bytearray(pickle.dumps(obj, PROTOCOL))
    data, buffers, _ = dumps(obj, session.current().known_names())
    return [data, *buffers] if buffers or len(data) > _LARGE else bytearray(data)


def unpack(item: Item) -> Any:
    """Return the object that an item was made of."""
    kind = type(item)
    if kind is bytearray:
        return pickle.loads(item)
    if kind is list:
        # By its value: an item that came back from another process is a copy.
        return bytes(item[1]) if item[0] == _WHOLE else loads(item[0], item[1:])
    return item
