"""Copies of shared values, in a process that cannot map their memory.

    acquire ─► lock ─► fetch the bytes ─► use ─► send those that changed ─► release the lock
                              ▲                               │
                              └── ServedMemory (fiber.served) ◄┘  in a process that has it mapped

A copy is right while the lock is held that guards the value: see `sharedctypes`.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import re
import weakref
from collections.abc import Iterator
from threading import get_ident
from typing import Any

from fiber.errors import PeerDied
from fiber.heap import BufferWrapper, Unmapped
from fiber.runtime.refs import Ref, lookup

__all__ = ["Copy", "copy_of", "guard"]

_CHUNK = 1 << 16  # bytes that are compared at a time


class Copy:
    """The bytes of a block that this process cannot map; there is one for each block.

    Args:
        ref: to the arena, where it is mapped.
        wrapper: of the block.
        item: bytes that are sent together if any of them has changed.

    Attributes:
        bytes: as they are here.
        ref: see above.
        depth: how often its lock was acquired through it and not released; once is enough to
            fetch the bytes.
        owner: the thread that did so.
    """

    def __init__(self, ref: Ref, wrapper: BufferWrapper, item: int) -> None:
        self.ref = ref
        self.depth = 0
        self.owner = 0
        self._start, size = wrapper.place
        self.bytes = bytearray(size)
        self._item = item
        self._fetched: Any = b""

    def fetch(self) -> None:
        """Get the bytes as they are there.

        Raises:
            PeerDied: the process that serves them is gone.
        """
        stop = self._start + len(self.bytes)
        (data,) = self.ref.call_for("read", (self._start, stop)).buffers
        memoryview(self.bytes)[:] = data  # it must not be resized
        self._fetched = data

    def send(self) -> None:
        """Send what has changed here: there, others may have changed the rest meanwhile.

        Raises:
            PeerDied: the process that serves them is gone.
        """
        ranges, data = [], bytearray()
        for start, stop in self._changes():
            ranges.append((self._start + start, self._start + stop))
            data += self.bytes[start:stop]
        self._fetched = b""
        if ranges:
            self.ref.call("write", ranges, buffers=[data])

    def _changes(self) -> Iterator[tuple[int, int]]:
        if not self._fetched or self.bytes == self._fetched:
            return  # nothing was fetched, or nothing has changed
        item = self._item
        chunk = max(_CHUNK // item, 1) * item
        for at in range(0, len(self.bytes), chunk):
            here, there = self.bytes[at : at + chunk], self._fetched[at : at + chunk]
            if here != there:
                differences = (_number(here) ^ _number(there)).to_bytes(len(here), "little")
                # Not 0 where any byte of the item differs.
                parts = [_number(differences[i::item]) for i in range(item)]
                marks = functools.reduce(operator.or_, parts).to_bytes(len(here) // item, "little")
                for run in re.finditer(rb"[^\0]+", marks):
                    yield at + run.start() * item, at + run.end() * item


def _number(data: bytes | bytearray) -> int:
    return int.from_bytes(data, "little")


_copies: weakref.WeakValueDictionary[tuple[str, int], Copy] = weakref.WeakValueDictionary()


def _after_fork() -> None:
    for copy in list(_copies.values()):
        copy.depth = 0  # it is the parent who has the lock


os.register_at_fork(after_in_child=_after_fork)


def copy_of(wrapper: BufferWrapper, arena: Unmapped, source: tuple[str, int], item: int) -> Copy:
    """Return this process's copy of a block.

    Args:
        wrapper: of the block.
        arena: where it is.
        source: of a reference to that: address and number.
        item: see `Copy`.
    """
    ref = lookup(Ref, *source)
    key = arena.key, wrapper.place[0]
    copy = _copies.get(key)
    if copy is None:
        copy = _copies.setdefault(key, Copy(ref, wrapper, item))
    elif not copy.ref.way.works:
        copy.ref = ref
    if not ref.loop.held:
        with contextlib.suppress(PeerDied):  # whoever uses it will be told
            ref.cast("hold", arena.ticket)
    return copy


class _CopyLock:
    """A lock of which the acquisition fetches a copy's bytes, and the release sends them back."""

    def __init__(self, lock: Any, copy: Copy) -> None:
        from fiber.synchronize import Lock, Semaphore

        self._lock = lock
        self._copy = copy
        self._recursive = not isinstance(lock, (Lock, Semaphore))

    def acquire(self, *args: Any, **kwargs: Any) -> Any:
        """As the lock's.

        Raises:
            PeerDied: the process is gone that the lock lives in, or that serves the bytes.
        """
        acquired = self._lock.acquire(*args, **kwargs)
        if acquired:
            copy = self._copy
            if copy.depth == 0 or not self._recursive:
                copy.depth = 0
                try:
                    copy.fetch()
                except BaseException:
                    self._lock.release()
                    raise
            copy.depth += 1
            copy.owner = get_ident()
        return acquired

    def release(self) -> None:
        """As the lock's."""
        copy = self._copy
        try:
            # Another thread's recursive lock will not be released, but raise an error.
            if copy.depth and (copy.owner == get_ident() or not self._recursive):
                copy.depth -= 1
                if copy.depth == 0:
                    copy.send()
        finally:
            self._lock.release()

    def __enter__(self) -> Any:
        return self.acquire()

    def __exit__(self, *args: object) -> None:
        self.release()

    @property
    def _ref(self) -> _CopyLockRef:
        """What a condition of this lock waits with."""
        return _CopyLockRef(self._lock._ref, self._copy)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)

    def __repr__(self) -> str:
        return repr(self._lock)

    def __reduce__(self) -> Any:
        return _itself, (self._lock,)


def _itself(lock: Any) -> Any:
    """What such a lock is in another process."""
    return lock


class _CopyLockRef:
    """The reference to such a lock: while it waits, others have the lock, and change the bytes."""

    def __init__(self, ref: Any, copy: Copy) -> None:
        self._ref = ref
        self._copy = copy

    def wait(self, condition: int, seconds: float | None) -> Any:
        """As the reference's."""
        copy = self._copy
        depth, copy.depth = copy.depth, 0
        if depth:
            copy.send()
        try:
            return self._ref.wait(condition, seconds)
        finally:
            if depth:
                copy.depth, copy.owner = depth, get_ident()
                copy.fetch()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ref, name)


def guard(lock: Any, copy: Copy) -> Any:
    """Return `lock` as one that keeps a copy right; conditions are locks too."""
    from fiber.synchronize import Condition

    if isinstance(lock, Condition):
        guarded = Condition(guard(lock._lock, copy))
        guarded._id = lock._id
        return guarded
    if isinstance(lock, _CopyLock) and lock._copy is copy:
        return lock
    return _CopyLock(lock, copy)
