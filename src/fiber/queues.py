"""Queues among processes, wherever they run.

    Queue.put, get ─► QueueRef (fiber.queue_ref) ─► the home of the queue (fiber.served.queue)

The interface is `multiprocessing.queues`'. A queue lives in the process that made it and can be
pickled into any other. There is no feeder thread: what cannot be pickled raises in `put`. A burst
of small items is sent together; if its thread turns to something else, the last follow after a few
milliseconds.

No item is lost with a process that dies while it puts or gets: what was not taken whole goes to the
next. When a process dies that has put items into a queue, or may have been about to, those who wait
in `get` without a time-out are told by `PeerDied` once the queue is empty, unless it was ended on
purpose (`Process.terminate`) or is the worker of a pool, which makes good for it. When the process
dies that the queue lives in, every call raises `PeerDied`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
from queue import Empty, Full
from types import GenericAlias
from typing import Any

from fiber.queue_ref import AS_IT_IS, NOTHING, QueueRef, pack, unpack
from fiber.runtime.refs import Peer, lookup, serve
from fiber.served.queue import ServedQueue

__all__ = ["Empty", "Full", "JoinableQueue", "Queue", "SimpleQueue"]


def _seconds(block: bool, timeout: float | None) -> float | None:
    if not block:
        return 0.0
    return None if timeout is None else max(float(timeout), 0.0)


class _Base:
    """What the queues have in common: handles on a reference, which can be pickled anywhere."""

    _ref: QueueRef
    _maxsize = 0

    def _make(self, maxsize: int, *, joinable: bool = False) -> None:
        self._maxsize = maxsize if maxsize > 0 else 0
        self._closed = self._used = False
        self._ref = serve(QueueRef, ServedQueue, self._maxsize, joinable)

    def __getstate__(self) -> tuple[Any, ...]:
        self._ref.flush()
        self._ref.lease()
        return self._ref.address, self._ref.id, self._maxsize

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        address, target, self._maxsize = state
        self._closed = self._used = False
        self._ref = lookup(QueueRef, address, target)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")

    def _size(self) -> int:
        self._ref.flush()
        size: int = self._ref.call("size")
        return size

    __class_getitem__: Any = classmethod(GenericAlias)


class Queue(_Base):
    """As `multiprocessing.Queue`: first in, first out, for many producers and many consumers.

    Args:
        maxsize: how many items it holds at the most; 0 for any number.
    """

    def __init__(self, maxsize: int = 0, *, ctx: object = None) -> None:
        self._make(maxsize)

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put an object into the queue. It is pickled at once.

        Args:
            obj: what.
            block: whether to wait for room, if the queue has bounds.
            timeout: seconds to wait at the most.

        Raises:
            Full: there was no room in time.
            SerializationError: it cannot be pickled.
            ValueError: this process has closed the queue.
            PeerDied: the process that the queue lives in is gone.
        """
        if self._closed:
            self._check_open()
        item = obj if type(obj) is int else pack(obj)
        self._used = True
        if not self._maxsize:
            self._ref.put(item)
        elif not self._ref.put_one(item, _seconds(block, timeout)):
            raise Full

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the next object out of the queue.

        Args:
            block: whether to wait for one.
            timeout: seconds to wait at the most.

        Raises:
            Empty: there was none in time.
            ValueError: this process has closed the queue.
            PeerDied: the process that the queue lives in is gone; or, without a time-out, a process
                has died that may have owed an item.
        """
        if self._closed:
            self._check_open()
        ref = self._ref
        item = ref.take()
        if item is NOTHING:
            item = ref.get(_seconds(block, timeout))
            if item is NOTHING:
                raise Empty
        return item if type(item) in AS_IT_IS else unpack(self._ref.read(item))

    def put_nowait(self, obj: Any) -> None:
        """As `put(obj, False)`."""
        self.put(obj, False)

    def get_nowait(self) -> Any:
        """As `get(False)`."""
        return self.get(False)

    def qsize(self) -> int:
        """Return how many objects are in the queue now."""
        return self._size()

    def empty(self) -> bool:
        """Return whether none is in it now.

        Raises:
            OSError: this process has put objects into the queue and closed it.
        """
        if self._closed and self._used:
            raise OSError(f"Queue {self!r} is closed")
        return self._size() == 0

    def full(self) -> bool:
        """Return whether it holds as many as it may."""
        return self._maxsize > 0 and self._size() >= self._maxsize

    def close(self) -> None:
        """Let this process use it no more; what it has put is sent."""
        self._closed = True
        self._ref.flush()

    def join_thread(self) -> None:
        """After `close`: wait until all that this process has put is on its way."""
        if not self._closed:
            raise AssertionError(f"Queue {self!r} not closed")
        way = self._ref.way
        if isinstance(way, Peer):
            way.drain()

    def cancel_join_thread(self) -> None:
        """Let this process end without waiting until all that it has put is on its way."""
        way = self._ref.way
        if isinstance(way, Peer):
            way.hasty = True


class JoinableQueue(Queue):
    """As `multiprocessing.JoinableQueue`: a queue that can be waited for until all is done."""

    def __init__(self, maxsize: int = 0, *, ctx: object = None) -> None:
        self._make(maxsize, joinable=True)

    def task_done(self) -> None:
        """Mark one object that was taken as done.

        Raises:
            ValueError: that was called more often than objects were put.
        """
        self._ref.flush()
        self._ref.call("task_done")

    def join(self) -> None:
        """Wait until every object that was put is marked as done.

        Raises:
            PeerDied: that cannot be any more, for a process died with some that it had taken.
        """
        self._ref.flush()
        self._ref.call("join")


class SimpleQueue(_Base):
    """As `multiprocessing.SimpleQueue`."""

    def __init__(self, *, ctx: object = None) -> None:
        self._make(0)

    @functools.cached_property
    def _reader(self) -> _Reader:
        """What libraries read from, and wait for, beside other connections."""
        return _Reader(self)

    @property
    def _writer(self) -> _Writer:
        """What libraries write to."""
        return _Writer(self)

    def put(self, obj: Any) -> None:
        """As `Queue.put`."""
        self._check_open()
        self._ref.put(pack(obj))

    def get(self) -> Any:
        """As `Queue.get`."""
        self._check_open()
        item = self._ref.take()
        if item is NOTHING:
            item = self._ref.get(None)
        return item if type(item) in AS_IT_IS else unpack(self._ref.read(item))

    def empty(self) -> bool:
        """Return whether nothing is in it now."""
        self._check_open()
        return self._size() == 0

    def close(self) -> None:
        """Let this process use it no more."""
        self._closed = True
        self._ref.flush()
        if "_reader" in self.__dict__:
            self._reader.close()

    def _check_open(self) -> None:
        if self._closed:
            raise OSError("this queue is closed")


class _Reader:
    """A queue, seen as the connection that multiprocessing's queues read from.

    Its descriptor is ready when there is an item to get.
    """

    def __init__(self, queue: SimpleQueue) -> None:
        self._queue = queue
        self._ready, tell = os.pipe()
        self._bell = _Bell(tell)
        self._watch()

    def _watch(self) -> None:
        bell = self._bell
        self._queue._ref.begin("watch", accept=lambda *_: bell.ring())

    def fileno(self) -> int:
        return self._ready

    @property
    def closed(self) -> bool:
        return self._ready < 0

    def poll(self, timeout: float | None = 0.0) -> bool:
        return bool(select.select([self._ready], [], [], timeout)[0])

    def recv(self) -> Any:
        item = self._queue.get()
        if self.poll():
            os.read(self._ready, 1)
            self._watch()
        return item

    def close(self) -> None:
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1

    def __del__(self) -> None:
        self.close()


class _Bell:
    """The end of a pipe that is written to; kept open by whoever may still ring it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ring(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._fd, b"\0")

    def __del__(self) -> None:
        os.close(self._fd)


class _Writer:
    """A queue, seen as the connection that multiprocessing's queues write to."""

    def __init__(self, queue: SimpleQueue) -> None:
        self.send = queue.put

    def close(self) -> None:
        """There is nothing to close."""
