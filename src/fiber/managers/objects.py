"""What a SyncManager hands out by value: locks and queues that live in its process.

They are Fiber's own, so a process that is killed does not keep a lock, or take an item with it.
To their users they look as proxies of multiprocessing's managers do, which stand for objects of
`threading` and `queue`: in the names of arguments, in what they raise and in what they print.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fiber import queues, synchronize

__all__ = [
    "KINDS",
    "Barrier",
    "BoundedSemaphore",
    "Condition",
    "Event",
    "JoinableQueue",
    "Lock",
    "Queue",
    "RLock",
    "Semaphore",
    "SimpleQueue",
]


class _Shown:
    """Is shown as a proxy is."""

    _proxy = "AcquirerProxy"

    def __repr__(self) -> str:
        typeid = type(self).__name__
        return f"<{self._proxy} object, typeid {typeid!r} at {id(self):#x}>"

    def __str__(self) -> str:
        return super().__repr__()


class _Acquirer(_Shown, synchronize._SemLock):
    """Takes the arguments of locks of `threading`."""

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """As that of `threading.Lock`; a `timeout` of -1 is none."""
        if timeout is not None:
            if not blocking:
                raise ValueError("can't specify a timeout for a non-blocking call")
            if timeout == -1:
                timeout = None
        return super().acquire(blocking, timeout)


class _Lock(_Acquirer):
    def release(self) -> None:
        """As that of `threading.Lock`.

        Raises:
            RuntimeError: it was not acquired.
        """
        try:
            super().release()
        except (AssertionError, ValueError):
            raise RuntimeError("release unlocked lock") from None


class Lock(_Lock, synchronize.Lock):
    """As a `threading.Lock` behind a proxy."""


class RLock(_Lock, synchronize.RLock):
    """As a `threading.RLock` behind a proxy."""


class Semaphore(_Acquirer, synchronize.Semaphore):
    """As a `threading.Semaphore` behind a proxy."""


class BoundedSemaphore(_Acquirer, synchronize.BoundedSemaphore):
    """As a `threading.BoundedSemaphore` behind a proxy."""


class Condition(_Shown, synchronize.Condition):
    """As a `threading.Condition` behind a proxy.

    Args:
        lock: a `Lock` or `RLock` of the manager; a new `RLock` by default.
    """

    _proxy = "ConditionProxy"

    def __init__(self, lock: synchronize.Lock | synchronize.RLock | None = None) -> None:
        super().__init__(RLock() if lock is None else lock)

    def _check(self, purpose: str) -> None:
        if not self._lock._is_mine():
            raise RuntimeError(f"cannot {purpose} un-acquired lock")

    def wait(self, timeout: float | None = None) -> bool:
        """As that of `threading.Condition`; RuntimeError without the lock."""
        self._check("wait on")
        return super().wait(timeout)

    def notify(self, n: int = 1) -> None:
        """As that of `threading.Condition`; RuntimeError without the lock."""
        self._check("notify on")
        super().notify(n)

    def notify_all(self) -> None:
        """As that of `threading.Condition`; RuntimeError without the lock."""
        self._check("notify on")
        super().notify_all()


class Event(_Shown, synchronize.Event):
    """As a `threading.Event` behind a proxy."""

    _proxy = "EventProxy"


class Barrier(_Shown, synchronize.Barrier):
    """As a `threading.Barrier` behind a proxy; one of the parties runs its action."""

    _proxy = "BarrierProxy"


class Queue(_Shown, queues.JoinableQueue):
    """As a `queue.Queue` behind a proxy."""

    _proxy = "AutoProxy[Queue]"


class JoinableQueue(Queue):
    """The same, as in multiprocessing."""

    _proxy = "AutoProxy[JoinableQueue]"


class SimpleQueue(_Shown, queues.SimpleQueue):
    """A queue with the least of methods; multiprocessing's managers have none."""

    _proxy = "AutoProxy[SimpleQueue]"


KINDS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind
    for kind in (
        Barrier,
        BoundedSemaphore,
        Condition,
        Event,
        JoinableQueue,
        Lock,
        Queue,
        RLock,
        Semaphore,
        SimpleQueue,
    )
}
"""The classes, by the typeid of a SyncManager."""
