"""The pool's scheduler: decides which worker runs which items next.

A pure state machine. It knows no socket, thread or clock: the driver (`pool.master`) tells it what
happened and carries out what it answers.

    submit, extend, worker_up, progress, worker_down, cancel, age    Send, Fail, Finish, Retire
    ────────────────────────────────────────────────────►  Scheduler  ───────────────────────►

An item is waiting, assigned (in one batch, at one worker) or settled. A settled item never changes
again: a batch is known by its number, and reports on batches that were taken away are not accepted.
That is how "one result per item" holds whatever arrives late or twice.

Items are counted, never held: a call is the numbers 0..n-1, and what is waiting of it is a few
ranges of them, so that the cost of scheduling is per batch and not per item.

How many items make a batch follows what they take: 40 ms of work, no more than an equal share of
what is left. A worker holds one batch running and one waiting, the second only while items are
short. When a worker dies, the items of its running batch become suspects: they go out again in
careful batches, whose results are reported one by one, so that another death tells exactly which
item was running. That item is charged with the attempt; its batch mates are not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import islice
from math import sqrt

from fiber.pool.assignments import (
    BATCH_ITEMS,
    Action,
    Batch,
    Call,
    Fail,
    Finish,
    Retire,
    Send,
    WorkerState,
)

__all__ = ["Scheduler"]

BATCH_SECONDS = 0.04
"""Seconds of work that a batch should hold, or more if there are many workers: see `_SHARE`."""

MOST_SECONDS = 1.0
"""However many there are, for results shall come."""

LEAST_SECONDS = 0.0004
"""Seconds of work below which a batch is not split to share what is left."""

MASTER_SECONDS = 50e-6
"""Seconds that the master, and a worker that wakes up, spend on a batch, whatever is in it."""

PREFETCH_SECONDS = 0.025
"""Items that take longer are not sent ahead: the round trip costs nothing against them, and one
that waits behind a slow one could have run elsewhere."""

BATCH_BYTES = 1 << 20
_SHARE = 0.1  # of the master's time, at the most, that handing out such batches should take
_OVERTIME = 2  # times what a batch should take until the worker gives back what it has not begun
_CAREFUL_ITEMS = 64
_GROWTH = 8  # how many times larger than the last a batch of a call may be
_KINDS = 256  # whose costs are remembered
_LOOKED_AT = 16  # calls, at one event
_COUNTED = 1024  # calls, to judge how much there is to do


class Scheduler:
    """See the module. Events change it; `actions` hands out what is to be done.

    Attributes:
        hold: seconds of a batch after which its worker should give back what it has not begun.
    """

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}  # unfinished
        self._hungry: dict[int, Call] = {}  # those with items to send, in turn
        self._waiting = 0  # items in their ranges
        self._costs: dict[Hashable, float] = {}  # seconds per item, by kind of call
        self._workers: dict[int, WorkerState] = {}
        self._idle: dict[int, None] = {}  # workers with no batch; the last in is the first out
        self._busy: dict[int, None] = {}  # workers with one batch that may take another
        self._batches: dict[int, Batch] = {}
        self._batch_ids = 0
        self._actions: list[Action] = []
        self._size_batches()

    # Events ------------------------------------------------------------------------------------

    def submit(
        self,
        call: int,
        items: int,
        *,
        retries: int,
        chunk: int = 1,
        single: bool = False,
        cost: float | None = None,
        kind: Hashable = None,
        open: bool = False,
    ) -> None:
        """There is a new call with `items` items.

        Args:
            call: its number.
            items: how many there are.
            retries: how often an item may run again after its worker died.
            chunk: how many items stay together.
            single: send one item at a time and none ahead.
            cost: seconds that an item takes, if that is known.
            kind: calls of the same kind, of one function say, are taken to cost the same.
            open: more items will come.
        """
        new = Call(call, retries, chunk, single, cost, kind, open)
        self._calls[call] = new
        self._extend(new, items)

    def extend(self, call: int, items: int) -> None:
        """An open call has `items` more items."""
        found = self._calls.get(call)
        if found is not None:
            self._extend(found, items)

    def _extend(self, call: Call, items: int) -> None:
        if items:
            start, call.total = call.total, call.total + items
            call.unsettled += items
            if call.ranges and call.ranges[-1][1] == start:
                start = call.ranges.pop()[0]
                self._count(call, start - call.total + items)
            call.ranges.append((start, call.total))
            self._count(call, call.total - start)
        else:
            self._settle(call, 0)
        self._assign()

    def complete(self, call: int) -> None:
        """An open call has no more items to come."""
        found = self._calls.get(call)
        if found is not None:
            found.open = False
            self._settle(found, 0)

    def cancel(self, call: int) -> None:
        """Nobody wants the call any more: what is waiting is dropped, what runs is ignored."""
        found = self._calls.pop(call, None)
        if found is not None:
            found.ranges.clear()
            found.suspects.clear()
            self._count(found, -found.waiting)
            self._hungry.pop(call, None)

    def weigh(self, call: int, size: float) -> None:
        """An item of the call took `size` bytes on its way."""
        found = self._calls.get(call)
        if found is not None:
            found.weight = size if not found.weight else 0.5 * (found.weight + size)

    def worker_up(self, worker: int, left: int | None = None) -> None:
        """A worker is ready; it may run `left` items, or any number."""
        self._workers[worker] = WorkerState(worker, left)
        self._size_batches()
        self._idle[worker] = None
        self._assign()

    def progress(
        self, batch: int, done: int, seconds: float = 0.0, returned: int = 0
    ) -> tuple[int, int, int] | None:
        """A worker reports the next `done` results of a batch, and gives back its last items.

        Args:
            batch: number of the batch.
            done: how many items, from its first unsettled one, have results now.
            seconds: that these took; 0 if they were not measured.
            returned: how many items at its end were not begun, and will not be.

        Returns:
            The call and the range of the items that are settled now, or None if their results are
            not wanted: the batch is not known, or its call was cancelled.
        """
        found = self._batches.get(batch)
        if found is None or done + returned > found.stop - found.start:
            return None
        call, start = found.call, found.start
        found.start += done
        if returned:
            found.stop -= returned
            self._put_back(call, found.stop, found.stop + returned, found.careful)
        worker = self._workers[found.worker]
        if returned and worker.left is not None:
            worker.left += returned
        if found.start == found.stop:
            del self._batches[batch]
            worker.batches.remove(found)
        else:
            found.slow = True
        if done and seconds:
            self._measure(call, done, seconds)
        self._offer(worker)
        wanted = call.id in self._calls
        if wanted:
            self._settle(call, done)
        self._assign()
        return (call.id, start, start + done) if wanted and done else None

    def unloadable(self, batch: int) -> None:
        """A worker could not load a batch of several items: they go out again one by one."""
        found = self._batches.get(batch)
        if found is not None:
            found.call.single = True
            self.unsent(batch)

    def unsent(self, batch: int) -> None:
        """A batch is not at its worker after all; its items are waiting again, if still wanted."""
        found = self._batches.pop(batch, None)
        if found is None:
            return
        worker = self._workers[found.worker]
        worker.batches.remove(found)
        if worker.left is not None:
            worker.left += found.stop - found.start
        self._put_back(found.call, found.start, found.stop, found.careful)
        self._offer(worker)
        self._assign()

    def worker_lost(self, worker: int) -> None:
        """A worker can no longer be reached; that it is down will be told."""
        found = self._workers.get(worker)
        if found is not None:
            found.lost = True
            self._offer(found)

    def worker_down(self, worker: int, *, charged: bool = True) -> None:
        """A worker is gone, after all that it reported was told.

        Args:
            worker: which.
            charged: whether the item that it was running counts an attempt; not if it had not
                begun, or the worker was taken away for reasons of its own.
        """
        gone = self._workers.pop(worker)
        self._size_batches()
        self._idle.pop(worker, None)
        self._busy.pop(worker, None)
        for place, batch in enumerate(gone.batches):
            del self._batches[batch.id]
            if batch.call.id not in self._calls:
                continue
            if place > 0 or not charged:
                self._put_back(batch.call, batch.start, batch.stop, batch.careful)
                continue
            call, start = batch.call, batch.start
            if batch.careful or batch.stop - start == 1:
                start += 1
                self._charge(call, batch.start, worker)
            if start < batch.stop:
                self._suspect(call, start, batch.stop)
        self._assign()

    def age(self, ages: int, spare: int) -> None:
        """A while has gone by: who was idle `ages` times in a row retires, but `spare` at most."""
        for worker in [self._workers[id] for id in self._idle]:  # those idle for longest are first
            worker.ages += 1
            if spare > 0 and worker.ages >= ages:
                spare -= 1
                worker.lost = True
                del self._idle[worker.id]
                self._actions.append(Retire(worker.id, needless=True))

    def fail(self, batch: int, *, worker_ends: bool = False) -> tuple[int, int] | None:
        """Give up the item that a batch of one holds, say for its time-out.

        Args:
            batch: number of the batch.
            worker_ends: the worker is about to be ended, and gets nothing more.

        Returns:
            Call and item, or None if the batch is not known any more.
        """
        found = self._batches.pop(batch, None)
        if found is None:
            return None
        worker = self._workers[found.worker]
        worker.batches.remove(found)
        wanted = found.call.id in self._calls
        if wanted:
            self._settle(found.call, 1)
        worker.lost = worker.lost or worker_ends
        self._offer(worker)
        self._assign()
        return (found.call.id, found.start) if wanted else None

    # What follows from them --------------------------------------------------------------------

    def actions(self) -> list[Action]:
        """Return, in order, what is to be done since the last time."""
        actions, self._actions = self._actions, []
        return actions

    def batches_of(self, worker: int) -> list[Batch]:
        """Return the batches at a worker, the running one first."""
        found = self._workers.get(worker)
        return list(found.batches) if found is not None else []

    def _size_batches(self) -> None:
        handing_out = len(self._workers) * MASTER_SECONDS
        self._batch_seconds = max(BATCH_SECONDS, min(MOST_SECONDS, handing_out / _SHARE))
        self.hold = _OVERTIME * self._batch_seconds

    def wants(self, call: int) -> int:
        """Return how many more items an open call should have waiting, to keep the workers busy."""
        found = self._calls.get(call)
        if found is None:
            return 0
        return 4 * max(len(self._workers), 1) * self._target(found) - found.waiting

    def batch_items(self, call: int) -> int:
        """Return how many items of a call make a batch while there are plenty."""
        found = self._calls.get(call)
        return self._target(found) if found is not None else 1

    def weight(self, call: int) -> float:
        """Return how many bytes an item of a call takes, 0 if that is not known."""
        found = self._calls.get(call)
        return found.weight if found is not None else 0.0

    @property
    def short(self) -> bool:
        """Whether items wait and nobody is free to take them."""
        return bool(self._hungry) and not self._idle

    def shortage(self, seconds: float) -> int:
        """Return how many more workers would be of use now.

        One for each item that waits, or chunk, but where they are short only one for `seconds` of
        work; at least one where anything waits.
        """
        if not self.short:
            return 0
        seen, wanted = 0, 0.0
        for call in islice(self._hungry.values(), _COUNTED):
            seen += 1
            items = call.waiting + sum(stop - start for start, stop in call.suspects)
            cost = self._costs.get(call.kind) if call.cost is None else call.cost
            each = -(-items // call.chunk)
            wanted += each if cost is None else min(each, items * cost / seconds)
        return max(1, int(wanted * len(self._hungry) / seen))

    @property
    def waiting(self) -> int:
        """How many items no worker has."""
        suspects = (range for call in self._hungry.values() for range in call.suspects)
        return self._waiting + sum(stop - start for start, stop in suspects)

    @property
    def unfinished(self) -> bool:
        """Whether any call has items that are not settled, or may get more."""
        return bool(self._calls)

    def _settle(self, call: Call, items: int) -> None:
        call.unsettled -= items
        if call.finished and self._calls.pop(call.id, None) is not None:
            self._actions.append(Finish(call.id))

    def _charge(self, call: Call, item: int, worker: int) -> None:
        attempts = call.attempts[item] = call.attempts.get(item, 0) + 1
        if attempts > call.retries:
            self._actions.append(Fail(call.id, item, attempts, worker))
            self._settle(call, 1)
        else:
            self._suspect(call, item, item + 1)

    def _suspect(self, call: Call, start: int, stop: int) -> None:
        """One of these items may have ended a worker."""
        call.suspects.append((start, stop))
        self._hungry[call.id] = call

    def _put_back(self, call: Call, start: int, stop: int, careful: bool) -> None:
        """Items that were assigned are waiting again, if they are still wanted."""
        if call.id not in self._calls:
            return
        if careful and call.retries:  # without retries all batches are careful
            call.suspects.appendleft((start, stop))
            self._hungry[call.id] = call
        else:
            call.ranges.appendleft((start, stop))
            self._count(call, stop - start)

    def _count(self, call: Call, items: int) -> None:
        """There are `items` more waiting, or fewer."""
        call.waiting += items
        self._waiting += items
        if items > 0:
            self._hungry[call.id] = call

    def _measure(self, call: Call, items: int, seconds: float) -> None:
        cost = seconds / items
        if call.cost is not None:  # one slow item among many shall not count for much
            cost = 0.5 * (call.cost + min(cost, 4 * call.cost))
        call.cost = cost
        if call.kind is not None:
            self._costs[call.kind] = cost
            if len(self._costs) > _KINDS:
                del self._costs[next(iter(self._costs))]

    def _offer(self, worker: WorkerState) -> None:
        """Note whether `worker` may be given more."""
        self._idle.pop(worker.id, None)
        self._busy.pop(worker.id, None)
        if worker.lost:
            return
        if worker.left == 0:
            if not worker.batches:
                worker.lost = True
                self._actions.append(Retire(worker.id))
        elif not worker.batches:
            worker.ages = 0
            self._idle[worker.id] = None
        elif len(worker.batches) == 1 and self._is_short(worker.batches[0]):
            self._busy[worker.id] = None

    def _is_short(self, batch: Batch) -> bool:
        call = batch.call
        short = call.cost is not None and call.cost * call.chunk < PREFETCH_SECONDS
        return short and not (call.single or batch.careful or batch.slow)

    def _assign(self) -> None:
        if not self._hungry:
            return
        # Those that cannot be sent ahead of time hold up a few others only, for there may be many.
        for call in list(islice(self._hungry.values(), _LOOKED_AT)):
            if not self._idle and not self._busy:
                return
            if call.cost is None and call.kind in self._costs:
                call.cost, call.largest = self._costs[call.kind], BATCH_ITEMS
            while self._idle and (call.suspects or call.ranges):
                # An item that may run but once must be known for sure if it ends its worker.
                careful = bool(call.suspects) or call.retries == 0
                start, stop = self._cut_suspects(call) if call.suspects else self._cut(call)
                self._send(call, self._idle.popitem()[0], start, stop, careful)
            short = call.cost is not None and call.cost * call.chunk < PREFETCH_SECONDS
            if short and not call.single and call.retries:
                # Ahead of time only while there is enough for all: the last go to who is free.
                while self._busy and call.ranges and self._waiting >= len(self._workers):
                    self._send(call, self._busy.popitem()[0], *self._cut(call))
            del self._hungry[call.id]
            if call.ranges or call.suspects:  # the next time it is another's turn
                self._hungry[call.id] = call

    def _target(self, call: Call) -> int:
        """Return how many items of `call` should make a batch while there are plenty."""
        if call.single or call.cost is None:
            return 1
        size = BATCH_ITEMS if not call.cost else int(self._batch_seconds / call.cost)
        if call.weight:
            size = min(size, int(BATCH_BYTES / call.weight))
        if not call.retries:
            size = min(size, _CAREFUL_ITEMS)
        return max(1, min(size, call.largest * _GROWTH, BATCH_ITEMS))

    def _cut_suspects(self, call: Call) -> tuple[int, int]:
        """Cut the next careful batch off the suspects of `call`."""
        start, stop = call.suspects.popleft()
        middle = min(stop, start + (1 if call.single else _CAREFUL_ITEMS))
        if middle < stop:
            call.suspects.appendleft((middle, stop))
        return start, middle

    def _cut(self, call: Call) -> tuple[int, int]:
        """Cut the next batch off the waiting items of `call`."""
        if call.waiting == 1:
            self._count(call, -1)
            return call.ranges.popleft()
        size = self._target(call)
        if call.single:
            size = 1
        else:
            share = -(-call.waiting // (2 * max(len(self._workers), 1)))
            if call.cost and share < size:
                # With many workers, the one in which handing out and working take as long.
                least = sqrt(MASTER_SECONDS * call.waiting * call.cost)
                share = max(share, int(max(least, LEAST_SECONDS) / call.cost))
            size = max(1, min(size, share))
        start, stop = call.ranges.popleft()
        if not call.single:  # up to the next end of a chunk
            size = -(-(start + size) // call.chunk) * call.chunk - start
        if start + size < stop:
            call.ranges.appendleft((start + size, stop))
            stop = start + size
        self._count(call, start - stop)
        call.largest = max(call.largest, stop - start)
        return start, stop

    def _send(self, call: Call, worker: int, start: int, stop: int, careful: bool = False) -> None:
        found = self._workers[worker]
        if found.left is not None and stop - start > found.left:
            self._put_back(call, start + found.left, stop, careful)
            stop = start + found.left
        if found.left is not None:
            found.left -= stop - start
        self._batch_ids += 1
        batch = Batch(self._batch_ids, worker, call, start, stop, careful)
        self._batches[batch.id] = batch
        found.batches.append(batch)
        self._actions.append(Send(batch))
        self._offer(found)

    def assigned(self) -> Iterator[Batch]:
        """Yield every batch that is at a worker."""
        return iter(self._batches.values())
