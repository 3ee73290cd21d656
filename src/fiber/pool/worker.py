"""A pool's worker: runs batches of items and reports their results.

    BATCH ─► inbox ─► run: items ─► results ─► RESULTS
                             │          │
                             └─ keeper ─┘   a batch takes too long: reports what is done,
                                            gives back what was not begun

The main thread reads, runs and reports, so that a short task costs no switch of threads. A second
thread, the keeper, sleeps until the main thread has spent a good while in one batch. Then it sends
the results that are there and hands everything back that waits behind the slow item, here or still
in the socket, so that others can run it.
"""

from __future__ import annotations

import pickle
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import starmap
from typing import Any

from fiber.pool.protocol import (
    APPLY,
    BATCH,
    FORGET,
    INITIALIZE,
    INITIALIZER_FAILED,
    RESULTS,
    STARMAP,
    STOP,
    UNLOADABLE,
    UP,
    encode_exception,
)
from fiber.runtime import session
from fiber.runtime.endpoint import HELLO
from fiber.wire.channel import Channel, connect
from fiber.wire.framing import Buffer, Frame
from fiber.wire.pickling import dumps, is_plain, loads

__all__ = ["run"]

HOLD = 0.02
"""Seconds in one batch after which what waits behind it is given back."""

_CONNECT_TIMEOUT = 30.0


def run(address: str, token: str) -> None:
    """Work for the pool whose master listens at `address` and expects `token`, until it says STOP."""
    channel = connect(address, session.secret(), _CONNECT_TIMEOUT)
    channel.send(HELLO, pickle.dumps({"token": token}))
    try:
        Worker(channel).work()
    except (EOFError, ConnectionError):
        pass  # the master is gone: nobody is left to work for
    finally:
        channel.close()


class _Job:
    """A batch while it is run."""

    def __init__(self, id: int, items: deque[Any], careful: bool, chunk: int) -> None:
        self.id = id
        self.items = items  # not begun yet; the main thread takes from the left, the keeper right
        self.size = len(items)
        self.careful = careful
        self.chunk = chunk
        self.values: list[Any] = []
        self.errors: dict[int, tuple[bytes, str]] = {}
        self.sent = 0  # values that were reported
        self.returned = 0  # items that were given back
        self.began = time.perf_counter()


class Worker:
    """See the module."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._inbox: deque[Frame] = deque()
        self._functions: dict[int, Callable[..., Any]] = {}
        self._unloaded: dict[int, tuple[bytes, Sequence[Buffer]]] = {}  # functions, given back unused
        self._job: _Job | None = None
        self._batches = 0  # how many were begun
        self._lock = threading.Lock()  # sending, the inbox, and the end of a job
        self._keeper: threading.Thread | None = None
        self._bell = threading.Event()  # set while there is something for the keeper to watch

    def work(self) -> None:
        """Serve until STOP."""
        while True:
            frame = self._next()
            if frame.kind == BATCH:
                self._run(frame)
            elif frame.kind == FORGET:
                call = pickle.loads(frame.body)
                self._functions.pop(call, None)
                self._unloaded.pop(call, None)
            elif frame.kind == INITIALIZE:
                if not self._initialize(frame):
                    return
            elif frame.kind == STOP:
                return

    def _next(self) -> Frame:
        while not self._inbox:
            self._inbox.extend(self._channel.read())
        return self._inbox.popleft()

    def _send(self, kind: int, body: object, buffers: list[Buffer] | tuple[()] = ()) -> None:
        self._channel.send(kind, pickle.dumps(body, 5), buffers)

    def _initialize(self, frame: Frame) -> bool:
        try:
            if len(frame.body):
                initializer, initargs = loads(frame.body, frame.buffers)
                initializer(*initargs)
        except BaseException as error:
            self._send(INITIALIZER_FAILED, encode_exception(error))
            return False
        self._send(UP, None)
        return True

    # Running -----------------------------------------------------------------------------------

    def _run(self, frame: Frame) -> None:
        batch, call, how, careful, chunk, count, function_data, function_buffers, data = (
            pickle.loads(frame.body)
        )
        try:
            if function_data is None and call in self._unloaded:
                function = self._functions[call] = loads(*self._unloaded.pop(call))
            elif function_data is not None:
                function = loads(function_data, frame.buffers[:function_buffers])
                if how != APPLY:
                    self._functions[call] = function
            else:
                function = self._functions[call]
            items = deque(loads(data, frame.buffers[function_buffers:]))
        except BaseException as error:
            with self._lock:
                self._send(UNLOADABLE, (batch, *encode_exception(error)))
            return
        job = _Job(batch, items, careful, chunk)
        source = _drain(items)
        if how == STARMAP:
            results: Iterator[Any] = starmap(function, source)
        elif how == APPLY:
            results = (function(*args, **kwargs) for args, kwargs in source)
        else:
            results = map(function, source)
        self._begin(job)
        if careful:
            self._run_carefully(job, results)
        else:
            self._run_all(job, results)

    def _begin(self, job: _Job) -> None:
        self._job = job
        self._batches += 1
        if not self._bell.is_set():
            self._bell.set()
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name="fiber-keeper", daemon=True)
            self._keeper.start()

    def _run_all(self, job: _Job, results: Iterator[Any]) -> None:
        values = job.values
        while True:
            try:
                # What was appended before an exception stays, so that its place is known.
                values.extend(results)
            except BaseException as error:
                job.errors[len(values)] = encode_exception(error)
                values.append(None)
                continue
            with self._lock:
                if len(values) + len(job.items) + job.returned < job.size:
                    # `map` takes a StopIteration of the function for the end of its items.
                    job.errors[len(values)] = encode_exception(StopIteration(), 0)
                    values.append(None)
                    continue
                self._job = None
                if job.sent < len(values):
                    self._report(job, len(values), 0, time.perf_counter() - job.began)
                return

    def _run_carefully(self, job: _Job, results: Iterator[Any]) -> None:
        values = job.values
        while job.items:
            try:
                values.append(next(results))
            except BaseException as error:
                job.errors[len(values)] = encode_exception(error)
                values.append(None)
            with self._lock:
                self._report(job, len(values), 0, 0.0)
        with self._lock:
            self._job = None

    def _report(self, job: _Job, done: int, returned: int, seconds: float) -> None:
        """Send the results up to `done` that were not sent yet. With the lock."""
        values = job.values[job.sent : done]
        errors = {
            place - job.sent: error
            for place, error in list(job.errors.items())
            if job.sent <= place < done
        }
        job.sent = done
        buffers: list[Buffer] = []
        if is_plain(values):
            body: tuple[Any, ...] = (job.id, returned, seconds, values, None, None, errors)
        else:
            packed: list[bytes] = []
            counts: list[int] = []
            for place, value in enumerate(values):
                try:
                    data = dumps(value)
                except BaseException as error:
                    errors[place] = encode_exception(error, 2)
                    data = dumps(None)
                packed.append(data.data)
                counts.append(len(data.buffers))
                buffers += data.buffers
            body = (job.id, returned, seconds, None, packed, counts, errors)
        self._send(RESULTS, body, buffers)

    # The keeper --------------------------------------------------------------------------------

    def _keep(self) -> None:
        while True:
            seen, pause = self._batches, HOLD
            time.sleep(pause)
            while self._job is not None and self._batches == seen:
                try:
                    self._hand_back(seen)
                except (OSError, EOFError):
                    return  # the master is gone; the main thread will notice
                pause = min(2 * pause, 1.0)
                time.sleep(pause)
            # Nothing to do: sleep. A batch that begins meanwhile either shows here or rings.
            self._bell.clear()
            if self._batches == seen:
                self._bell.wait()

    def _hand_back(self, seen: int) -> None:
        """Report what is done of the running batch; give back what was not begun."""
        with self._lock:
            job = self._job
            if job is None or self._batches != seen:
                return
            returned = 0
            while not job.careful and self._may_return(job):
                try:
                    job.items.pop()
                except IndexError:
                    break
                returned += 1
                job.returned += 1
            self._report(job, len(job.values), returned, 0.0)
            while select.select([self._channel.sock], [], [], 0)[0]:
                self._inbox.extend(self._channel.read())
            for _ in range(len(self._inbox)):
                frame = self._inbox.popleft()
                if frame.kind == BATCH:
                    batch, call, *_, count, function, buffers, _ = pickle.loads(frame.body)
                    if function is not None:
                        self._unloaded[call] = (function, frame.buffers[:buffers])
                    self._send(RESULTS, (batch, count, 0.0, [], None, None, {}))
                else:
                    self._inbox.append(frame)

    def _may_return(self, job: _Job) -> bool:
        """Whether the last item that was not begun may go: chunks stay together."""
        if job.chunk == 1:
            return True
        begun = job.size - job.returned - len(job.items)
        return len(job.items) > -begun % job.chunk


def _drain(items: deque[Any]) -> Iterator[Any]:
    """Yield the items, taking each out; another thread may take from the other end."""
    try:
        while True:
            yield items.popleft()
    except IndexError:
        return
