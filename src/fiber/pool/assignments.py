"""What the scheduler keeps of calls, batches and workers, and what it answers.

    Call: items that wait ─► Batch: items at a worker ─► WorkerState: what a worker has
    Send, Fail, Finish, Retire: what the pool's master is to do

Plain records: who changes them is `pool.scheduler` alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

__all__ = [
    "BATCH_ITEMS",
    "Action",
    "Batch",
    "Call",
    "Fail",
    "Finish",
    "Retire",
    "Send",
    "WorkerState",
]

BATCH_ITEMS = 1 << 14
"""Items that a batch has at the most."""


class Batch:
    """Items [start, stop) of a call at a worker; `start` moves on as results come.

    Attributes:
        careful: results are to be reported one by one.
        slow: the worker reported before its end, so that it takes longer than expected.
    """

    __slots__ = ("call", "careful", "id", "slow", "start", "stop", "worker")

    def __init__(
        self, id: int, worker: int, call: Call, start: int, stop: int, careful: bool
    ) -> None:
        self.id = id
        self.worker = worker
        self.call = call
        self.start = start
        self.stop = stop
        self.careful = careful
        self.slow = False

    def __repr__(self) -> str:
        return f"<Batch {self.id}: {self.start}-{self.stop} of {self.call.id} at {self.worker}>"


class Call:
    """What is known of one call.

    Attributes:
        chunk: items that stay together; 1 unless the user gave a chunksize.
        single: one item at a time and none ahead: a time-out is measured from the sending.
        cost: seconds that an item takes, as far as known.
        kind: calls of the same kind are taken to cost the same.
        weight: bytes that an item takes, 0 if that is not known.
        open: more items may come.
        waiting: items in `ranges`.
        suspects: ranges of items one of which may have ended a worker.
        attempts: how often an item surely was the one.
        largest: the largest batch so far.
    """

    __slots__ = (
        "attempts", "chunk", "cost", "id", "kind", "largest", "open", "ranges", "retries", "single",
        "suspects", "total", "unsettled", "waiting", "weight",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        retries: int,
        chunk: int,
        single: bool,
        cost: float | None,
        kind: Hashable,
        open: bool,
    ) -> None:
        self.id = id
        self.retries = retries
        self.chunk = chunk
        self.single = single
        self.cost = cost
        self.kind = kind
        self.weight = 0.0
        self.open = open
        self.unsettled = 0
        self.total = 0
        self.waiting = 0
        self.ranges: deque[tuple[int, int]] = deque()
        self.suspects: deque[tuple[int, int]] = deque()
        self.attempts: dict[int, int] = {}
        self.largest = 1 if cost is None else BATCH_ITEMS

    @property
    def finished(self) -> bool:
        """Whether all items are settled, and no more can come."""
        return not self.open and self.unsettled == 0


class WorkerState:
    """What is known of one worker.

    Attributes:
        left: items that it may still take, None without limit.
        batches: what it has, the running one first.
        lost: its end is to be expected, and it gets nothing more.
        ages: how often in a row it was found idle.
    """

    __slots__ = ("ages", "batches", "id", "left", "lost")

    def __init__(self, id: int, left: int | None) -> None:
        self.id = id
        self.left = left
        self.batches: list[Batch] = []
        self.lost = False
        self.ages = 0


class Send(NamedTuple):
    """Send this batch to its worker."""

    batch: Batch


class Fail(NamedTuple):
    """The item killed its workers, the last of them just now, and is not tried again."""

    call: int
    item: int
    attempts: int
    worker: int


class Finish(NamedTuple):
    """All items of the call are settled."""

    call: int


class Retire(NamedTuple):
    """The worker has done what it may do; have it end, and another take its place.

    If it is `needless`, no other: it was idle for long.
    """

    worker: int
    needless: bool = False


Action = Send | Fail | Finish | Retire
