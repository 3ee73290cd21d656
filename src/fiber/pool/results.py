"""What the callers of a pool hold: results that come.

    master ─► deliver(start, values, errors) ─► AsyncResult, IMapIterator ─► get, next
              finish() ─┘

The master delivers within the loop; callers wait for the loop's events, and so drive the loop
themselves. Callbacks run in a thread of their own: they may take their time, and use the pool.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import Any, Protocol

from fiber.errors import WaitTimeout
from fiber.runtime.loop import Event, Loop

__all__ = ["AsyncResult", "IMapIterator", "IMapUnorderedIterator", "MapResult"]

Callback = Callable[[Any], object]
Errors = Mapping[int, BaseException]


class AsyncResult:
    """The result of a call that goes on: of one function here, of a `map` in `MapResult`.

    Args:
        loop: of the session.
        owner: kept alive as long as the result is awaited.
        callback, error_callback: called, in a thread of their own, with the value or the exception.
    """

    def __init__(
        self,
        loop: Loop,
        owner: object,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> None:
        self._loop = loop
        self._owner: object | None = owner
        self._callback = callback
        self._error_callback = error_callback
        self._event = Event()
        self._value: Any = None
        self._error: BaseException | None = None

    # For the master, within the loop -----------------------------------------------------------

    def deliver(self, start: int, values: list[Any], errors: Errors) -> None:
        """Take results of items from `start` on; `errors` holds exceptions by place in `values`."""
        if errors:
            self._error = errors[0]
        else:
            (self._value,) = values

    def finish(self) -> None:
        """All items are delivered."""
        self._owner = None
        callback = self._callback if self._error is None else self._error_callback
        if isinstance(self._error, SystemExit):
            callback = None  # the program ends: nobody is left to be told
        if callback is None:
            self._event.set()
            return
        argument = self._value if self._error is None else self._error
        _call_back(callback, argument, lambda: self._loop.call_soon(self._event.set))

    def abort(self, error: BaseException) -> None:
        """Nothing more will come."""
        if self._error is None:
            self._error = error
        self.finish()

    # For the caller ----------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the result is there."""
        if not self._event.is_set and not self._loop.closed:
            self._loop.poll()
        return self._event.is_set

    def successful(self) -> bool:
        """Whether the call raised nothing; raises ValueError if it is not ready."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._error is None

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the result is there, at most `timeout` seconds."""
        if threading.current_thread() is _thread:
            _wait_in_callback(self._loop, self._event, timeout)
        elif not self._event.is_set:
            self._loop.wait(self._event, timeout)

    def get(self, timeout: float | None = None) -> Any:
        """Return the result, or raise the exception of the call.

        Raises:
            TimeoutError: it is not there after `timeout` seconds.
            WorkerDied: the worker died, more often than `retries`.
            PoolTerminated: the pool was terminated.
        """
        self.wait(timeout)
        if not self._event.is_set:
            raise WaitTimeout(f"no result after {timeout:g} seconds")
        if self._error is not None:
            raise self._error
        return self._value


class MapResult(AsyncResult):
    """The result of `map_async`: a list, or the exception of the first item that failed."""

    def __init__(
        self,
        loop: Loop,
        owner: object,
        items: int,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        return_exceptions: bool = False,
    ) -> None:
        super().__init__(loop, owner, callback, error_callback)
        self._value = [None] * items
        self._return_exceptions = return_exceptions
        self._first = items

    def deliver(self, start: int, values: list[Any], errors: Errors) -> None:
        for place, error in errors.items():
            if self._return_exceptions:
                values[place] = error
            elif start + place < self._first:
                self._first, self._error = start + place, error
        self._value[start : start + len(values)] = values


class Stream(Protocol):
    """What an iterator over results needs of the master. Within the loop."""

    loop: Loop

    def consumed(self, call: int, items: int) -> None:
        """Results were taken: more items may be read."""


class Arrivals:
    """The results of a stream, between the master and the iterator that hands them out.

    Within the loop. It holds no iterator, so that one which nobody has any more can go.

    Attributes:
        event: set when there is something new.
        finished: nothing more will come.
        end: the exception at the end, if there is one.
    """

    def __init__(self, return_exceptions: bool) -> None:
        self.event = Event()
        self.finished = False
        self.end: BaseException | None = None
        self._segments: deque[tuple[list[Any], BaseException | None]] = deque()
        self._return_exceptions = return_exceptions

    def deliver(self, start: int, values: list[Any], errors: Errors) -> None:
        """Take results of items from `start` on."""
        self._append(values, errors)

    def _append(self, values: list[Any], errors: Errors) -> None:
        """Cut results into segments: values, and the exception that comes after them."""
        if self._return_exceptions:
            for place, error in errors.items():
                values[place] = error
            errors = {}
        begin = 0
        for place in sorted(errors):
            self._segments.append((values[begin:place], errors[place]))
            begin = place + 1
        if begin < len(values):
            self._segments.append((values[begin:] if begin else values, None))
        self.event.set()

    def finish(self) -> None:
        """All items are delivered."""
        self.finished = True
        self.event.set()

    def abort(self, error: BaseException) -> None:
        """Nothing more will come; `error` says why, after what is there."""
        self.end = error
        self.finish()

    def take(self) -> tuple[list[Any], BaseException | None] | None:
        """Return the next segment, or None if there is none now."""
        if self._segments:
            return self._segments.popleft()
        if self.event.is_set and not self.finished:  # others may wait for one that is not set
            self.event = Event()
        return None


class OrderedArrivals(Arrivals):
    """The same, put into order."""

    def __init__(self, return_exceptions: bool) -> None:
        super().__init__(return_exceptions)
        self._early: dict[int, tuple[list[Any], Errors]] = {}  # by their first item
        self._expected = 0

    def deliver(self, start: int, values: list[Any], errors: Errors) -> None:
        self._early[start] = (values, errors)
        while self._expected in self._early:
            values, errors = self._early.pop(self._expected)
            self._expected += len(values)
            self._append(values, errors)


class IMapUnorderedIterator:
    """The results of `imap_unordered`, as they come.

    Args:
        master: of the pool.
        owner: the pool, kept alive as long as this.
        return_exceptions: hand exceptions out instead of raising them.
    """

    def __init__(self, master: Stream, owner: object, return_exceptions: bool = False) -> None:
        self._master = master
        self._owner = owner
        self._call = -1
        self._current: Iterator[Any] = iter(())  # results that `next` hands out without the loop
        self._failing: BaseException | None = None  # what follows them
        self._reader = threading.Lock()
        self._arrivals = self._make_arrivals(return_exceptions)

    def _make_arrivals(self, return_exceptions: bool) -> Arrivals:
        return Arrivals(return_exceptions)

    def bind(self, call: int) -> Arrivals:
        """Learn which call this is; return where its results shall go."""
        self._call = call
        return self._arrivals

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        for value in self._current:
            return value
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """Return the next result.

        Raises:
            StopIteration: there are no more.
            TimeoutError: it is not there after `timeout` seconds.
            the exception of the item, or of the iterable that the items came from.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            with self._reader:
                for value in self._current:
                    return value
                if self._failing is not None:
                    error, self._failing = self._failing, None
                    if isinstance(error, StopIteration):  # would pass for the end of the results
                        raise RuntimeError(f"the task raised {error!r}") from error
                    raise error
                event = self._take()
            if event is None:
                continue
            left = None if deadline is None else max(0.0, deadline - monotonic())
            if not self._master.loop.wait(event, left):
                raise WaitTimeout(f"no result after {timeout:g} seconds")

    def _take(self) -> Event | None:
        """Make the next segment the current one; return what to wait for if there is none."""
        arrivals = self._arrivals
        with self._master.loop:
            segment = arrivals.take()
            if segment is not None:
                values, self._failing = segment
                self._current = iter(values)
                self._master.consumed(self._call, len(values) + (self._failing is not None))
                return None
            if not arrivals.finished:
                return arrivals.event
            error, arrivals.end = arrivals.end, None
        raise error or StopIteration


class IMapIterator(IMapUnorderedIterator):
    """The results of `imap`, in order."""

    def _make_arrivals(self, return_exceptions: bool) -> Arrivals:
        return OrderedArrivals(return_exceptions)


# Callbacks -------------------------------------------------------------------------------------

_callbacks: queue.SimpleQueue[tuple[Callback, Any, Callable[[], object]]] = queue.SimpleQueue()
_thread: threading.Thread | None = None
_starting = threading.Lock()


def _call_back(callback: Callback, argument: Any, then: Callable[[], object]) -> None:
    global _thread
    with _starting:
        _callbacks.put((callback, argument, then))
        if _thread is None:
            _thread = threading.Thread(target=_run_callbacks, name="fiber-callbacks", daemon=True)
            _thread.start()


def _run_callbacks() -> None:
    """Run callbacks, one after the other, until there have been none for a while."""
    global _thread
    while True:
        while _run_callback(0.5):
            pass
        with _starting:
            if _callbacks.empty():
                _thread = None
                return


def _run_callback(timeout: float) -> bool:
    """Run the next callback if one comes in `timeout` seconds; return whether one came."""
    try:
        callback, argument, then = _callbacks.get(timeout > 0, timeout)
    except queue.Empty:
        return False
    try:
        callback(argument)
    except BaseException:
        # As for any thread: its exception is shown, and costs nothing else.
        threading.excepthook(
            threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread()))
        )
    finally:
        then()
    return True


def _wait_in_callback(loop: Loop, event: Event, timeout: float | None) -> None:
    """A callback waits for a result, which may itself wait for a callback: run those meanwhile."""
    deadline = None if timeout is None else monotonic() + timeout
    while not event.is_set and (deadline is None or monotonic() < deadline):
        if not _run_callback(0):
            loop.wait(event, 0.01)
