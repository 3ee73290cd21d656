"""Locks, semaphores, conditions, events and barriers for processes, wherever they run.

    Lock.acquire ─► LockRef ─► the home of the lock (fiber.served.locks) ─► granted

The interface is `multiprocessing.synchronize`'s. Each object lives in the process that made it and
can be pickled into any other: as an argument of a process or a task, through a queue.

When a process dies with a lock, the lock is released. The next to acquire it goes on as usual, with
a warning in its log that what the lock guards may be half done; so do the others that wait. When it
dies while it uses a barrier, all who wait there get `BrokenBarrierError`. When the process dies in
which the object lives, every call raises `PeerDied`.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from threading import BrokenBarrierError, get_ident
from time import monotonic
from types import TracebackType
from typing import Any

from fiber.errors import PeerDied
from fiber.runtime.logs import WARNING, log
from fiber.runtime.refs import Peer, Ref, Way, lookup, serve
from fiber.served.barrier import ServedBarrier
from fiber.served.locks import ServedEvent, ServedLock

__all__ = [
    "Barrier",
    "BoundedSemaphore",
    "BrokenBarrierError",
    "Condition",
    "Event",
    "Lock",
    "RLock",
    "Semaphore",
]


def _seconds(timeout: float | None) -> float | None:
    return None if timeout is None else max(float(timeout), 0.0)


class LockRef(Ref):
    """The lock, as this process has it: which of its threads holds it, and how often.

    A lock may be lent to this process, see `served.locks`: then it is acquired and released here.
    """

    def __init__(self, address: str, target: int) -> None:
        super().__init__(address, target)
        self._set()

    def _set(self) -> None:
        self.owner = 0
        self.count = 0
        self._lent = False
        self._counts: memoryview | None = None
        self._slot = -1  # where in these ours is, and behind it whether the lock is lent
        self._prepared: Way | None = None

    def renew(self) -> None:
        self._set()

    @property
    def is_mine(self) -> bool:
        """Whether this thread was the last to acquire it and it was not released since."""
        return self.count > 0 and self.owner == get_ident()

    def acquire(self, seconds: float | None) -> bool:
        if self._lent and self._take():
            self.owner = get_ident()
            self.count += 1
            return True
        way = self.way
        if way is not self._prepared:
            way.connect()
            if isinstance(way, Peer):
                self._counts, self._slot = way.counter()
            self._prepared = way
        args = (get_ident(), seconds, self._slot)
        granted = self.call("acquire", *args, timeout=seconds, undo=self.undo)
        if not granted:
            return False
        self.owner = get_ident()
        self.count += 1
        _, abandoned, self._lent = granted
        self.warn(abandoned)
        return True

    def wait(self, condition: int, seconds: float | None) -> bool:
        """Wait for a condition of this lock, which this thread holds; return if it was notified."""
        count, self.count = self.count, 0
        args = (get_ident(), condition, seconds, self._slot)
        try:
            notified, abandoned, self._lent = self.call("wait", *args, undo=self.undo)
        except BaseException as error:
            if isinstance(error, PeerDied):
                self.count = count  # its caller's `release` says that as well
            else:
                self._lent = False
                self.cast("returned", get_ident())  # the home may not have heard that we wait
                self.acquire(None)  # as its caller expects, who will release it
                self.count = count
            raise
        self.owner, self.count = get_ident(), count
        self.warn(abandoned)
        return bool(notified)

    def _take(self) -> bool:
        """Acquire a lock that is lent; False if another thread has it, or it was recalled."""
        way, counts, slot = self.way, self._counts, self._slot
        taken = False
        try:
            with way.loop:
                if self._lent and way.works and counts is not None and counts[slot] % 2 == 0:
                    # In this order: see `served.locks`.
                    counts[slot] += 1
                    taken = counts[slot + 1] != 0
                    if not taken:
                        self._lent = False
                        way.cast(self.id, "returned", (), ())
        except BaseException:
            if taken:
                self._let_go()
            raise
        return taken

    def _let_go(self) -> None:
        """Release the lock, which can be done, so that nobody needs to wait until it is."""
        way, counts, slot = self.way, self._counts, self._slot
        with way.loop:
            if not self._lent or counts is None or counts[slot] % 2 == 0:
                way.cast(self.id, "release", (get_ident(),), ())
                return
            counts[slot] += 1
            if counts[slot + 1] == 0:
                self._lent = False
                way.cast(self.id, "returned", (get_ident(),), ())

    def warn(self, abandoned: str) -> None:
        """Say who died with the lock, if anybody did."""
        if abandoned:
            text = "a lock was held by %s, which died; what it guards may be half done"
            log(WARNING, text, abandoned)

    def release(self) -> None:
        if self.count:
            self.count -= 1
            self._let_go()
        else:
            self.call("release", get_ident())

    def undo(self, granted: object) -> None:
        """Give back, within the loop, a permit that nobody takes."""
        if granted:
            self.way.cast(self.id, "release", (get_ident(),), ())


class _Shared:
    """What all of this module are: handles on a reference, which can be pickled anywhere."""

    _ref: Ref

    def __getstate__(self) -> dict[str, Any]:
        self._ref.lease()
        return {"ref": (type(self._ref), self._ref.address, self._ref.id)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._ref = lookup(*state["ref"])


class _SemLock(_Shared):
    _ref: LockRef

    def _make(self, value: int, most: int | None) -> None:
        self._ref = serve(LockRef, ServedLock, value, most)

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take a permit; return whether it was got.

        Args:
            block: whether to wait for it.
            timeout: seconds to wait at the most; None for as long as it takes.

        Raises:
            PeerDied: the process that it lives in is gone.
        """
        return self._ref.acquire(_seconds(timeout) if block else 0.0)

    def release(self) -> None:
        """Give a permit back."""
        self._ref.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def _semlock(self) -> _SemLockFacts:
        """What libraries read of multiprocessing's private `_semlock`."""
        return _SemLockFacts(self._ref)

    def _is_mine(self) -> bool:
        return self._ref.is_mine

    def _owner(self) -> tuple[str, object]:
        """Return who holds it and how often, in multiprocessing's words."""
        from multiprocessing.process import current_process

        value, mine = self._ref.call("look")
        if self._ref.is_mine:
            name = current_process().name
            thread = threading.current_thread().name
            return (name if thread == "MainThread" else f"{name}|{thread}"), self._ref.count
        if value > 0:
            return "None", 0
        return ("SomeOtherThread" if mine else "SomeOtherProcess"), "nonzero"


class _SemLockFacts:
    """Answers what `_multiprocessing.SemLock` answers."""

    def __init__(self, ref: LockRef) -> None:
        self._ref = ref

    def _get_value(self) -> int:
        value: int = self._ref.call("look")[0]
        return value

    def _is_zero(self) -> bool:
        return self._get_value() == 0

    def _is_mine(self) -> bool:
        return self._ref.is_mine

    def _count(self) -> int:
        return self._ref.count


class Semaphore(_SemLock):
    """As `multiprocessing.Semaphore`.

    Args:
        value: how many permits there are at first.
    """

    def __init__(self, value: int = 1, *, ctx: object = None) -> None:
        _check_value(value)
        self._make(value, None)

    def get_value(self) -> int:
        """Return how many permits there are now."""
        value: int = self._ref.call("look")[0]
        return value

    def __repr__(self) -> str:
        return f"<{type(self).__name__}(value={_or_unknown(self.get_value)})>"


class BoundedSemaphore(Semaphore):
    """As `multiprocessing.BoundedSemaphore`: ValueError if it is released too often.

    Args:
        value: how many permits there are at first, and at the most.
    """

    def __init__(self, value: int = 1, *, ctx: object = None) -> None:
        _check_value(value)
        self._most = value
        self._make(value, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "most": self._most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._most = state["most"]

    def __repr__(self) -> str:
        value = _or_unknown(self.get_value)
        return f"<{type(self).__name__}(value={value}, maxvalue={self._most})>"


def _check_value(value: int) -> None:
    if value < 0:
        raise ValueError(f"a semaphore's value is 0 or more, not {value}")


def _or_unknown(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception:  # repr shall never fail
        return "unknown"


class Lock(_SemLock):
    """As `multiprocessing.Lock`: any process or thread may release it."""

    def __init__(self, *, ctx: object = None) -> None:
        self._make(1, 1)

    def locked(self) -> bool:
        """Return whether somebody holds it."""
        return bool(self._ref.call("look")[0] == 0)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}(owner={_or_unknown(lambda: self._owner()[0])})>"


class RLock(_SemLock):
    """As `multiprocessing.RLock`: its owner, a thread of a process, may acquire it again."""

    def __init__(self, *, ctx: object = None) -> None:
        self._make(1, 1)

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """As `Lock.acquire`; at once if this thread has it."""
        if self._ref.is_mine:
            self._ref.count += 1
            return True
        return super().acquire(block, timeout)

    def release(self) -> None:
        """Undo one `acquire`; the last one gives the lock back.

        Raises:
            AssertionError: this thread does not own it.
        """
        if not self._ref.is_mine:
            raise AssertionError("attempt to release recursive lock not owned by thread")
        if self._ref.count > 1:
            self._ref.count -= 1
        else:
            self._ref.release()

    def locked(self) -> bool:
        """Return whether somebody holds it."""
        return bool(self._ref.call("look")[0] == 0)

    def __repr__(self) -> str:
        try:
            owner, count = self._owner()
        except Exception:  # repr shall never fail
            owner = count = "unknown"
        return f"<{type(self).__name__}({owner}, {count})>"


_condition_ids = itertools.count()


class Condition:
    """As `multiprocessing.Condition`.

    Args:
        lock: a `Lock` or `RLock` of Fiber; a new `RLock` by default.
    """

    def __init__(self, lock: Lock | RLock | None = None, *, ctx: object = None) -> None:
        self._lock = RLock() if lock is None else lock
        self._id = int.from_bytes(os.urandom(8), "big")
        self._bind()

    def _bind(self) -> None:
        self.acquire = self._lock.acquire
        self.release = self._lock.release

    def __getstate__(self) -> tuple[Any, ...]:
        return self._lock, self._id

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._lock, self._id = state
        self._bind()

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(self, *args: Any) -> None:
        self._lock.__exit__(*args)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}({self._lock!r})>"

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, wait to be notified, acquire it again.

        Args:
            timeout: seconds to wait at the most.

        Returns:
            Whether it was notified; False if time ran out.
        """
        ref = self._lock._ref
        assert ref.is_mine, "must acquire() condition before using wait()"
        return ref.wait(self._id, _seconds(timeout))

    def notify(self, n: int = 1) -> None:
        """Wake at most `n` processes or threads that wait."""
        assert self._lock._is_mine(), "lock is not owned"
        self._lock._ref.cast("notify", self._id, n)

    def notify_all(self) -> None:
        """Wake all that wait."""
        assert self._lock._is_mine(), "lock is not owned"
        self._lock._ref.cast("notify", self._id, None)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        """Wait until `predicate()` is true; return its last value.

        Args:
            predicate: called with the lock held.
            timeout: seconds to wait at the most.
        """
        deadline = None if timeout is None else monotonic() + timeout
        result = predicate()
        while not result:
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                break
            self.wait(left)
            result = predicate()
        return result


class Event(_Shared):
    """As `multiprocessing.Event`."""

    def __init__(self, *, ctx: object = None) -> None:
        self._ref = serve(Ref, ServedEvent)

    def is_set(self) -> bool:
        """Return the flag."""
        return bool(self._ref.call("is_set"))

    def set(self) -> None:
        """Raise the flag; all who wait go on."""
        self._ref.call("set")

    def clear(self) -> None:
        """Lower the flag."""
        self._ref.call("clear")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the flag is up, at most `timeout` seconds; return the flag."""
        seconds = _seconds(timeout)
        return bool(self._ref.call("wait", seconds, timeout=seconds))

    def __repr__(self) -> str:
        state = _or_unknown(lambda: "set" if self.is_set() else "unset")
        return f"<{type(self).__qualname__} at {id(self):#x} {state}>"


class Barrier(_Shared):
    """As `multiprocessing.Barrier`.

    Args:
        parties: how many must wait before all go on.
        action: called by one of them first.
        timeout: seconds, the default of `wait`.
    """

    def __init__(
        self,
        parties: int,
        action: Callable[[], Any] | None = None,
        timeout: float | None = None,
        *,
        ctx: object = None,
    ) -> None:
        if parties < 1:
            raise ValueError(f"a barrier is for 1 party or more, not {parties}")
        self._facts = (parties, action, timeout)
        self._ref = serve(Ref, ServedBarrier, parties, action is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "facts": self._facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._facts = state["facts"]

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the others; return a number from 0 to `parties` - 1, another for each.

        Raises:
            BrokenBarrierError: the barrier broke; the message says why.
        """
        _, action, default = self._facts
        seconds = _seconds(default if timeout is None else timeout)
        place = self._ref.call("wait", seconds)
        if place == "act":
            failed = True
            try:
                assert action is not None
                action()
                failed = False
            finally:
                place = self._ref.call("acted", failed)
        if isinstance(place, tuple):
            raise BrokenBarrierError(place[1])
        assert isinstance(place, int)
        return place

    def reset(self) -> None:
        """Back to the empty state; whoever waits gets `BrokenBarrierError`."""
        self._ref.call("reset")

    def abort(self) -> None:
        """Break it: all who wait, now or later, get `BrokenBarrierError`."""
        self._ref.call("abort")

    @property
    def parties(self) -> int:
        """How many it waits for."""
        return self._facts[0]

    @property
    def n_waiting(self) -> int:
        """How many wait now."""
        waiting: int = self._ref.call("look")[0]
        return waiting

    @property
    def broken(self) -> bool:
        """Whether it is broken."""
        return bool(self._ref.call("look")[1])

    def __repr__(self) -> str:
        state = "broken" if _or_unknown(lambda: self.broken) else f"parties={self.parties}"
        return f"<{type(self).__qualname__} at {id(self):#x} {state}>"
