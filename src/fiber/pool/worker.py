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

import functools
import itertools
import os
import pickle
import resource
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fiber.errors import MaybeEncodingError, SerializationError
from fiber.pool.items import Group, load_items
from fiber.pool.lending import LENT, Lending, arena_name
from fiber.pool.marks import IDLE, map_mark
from fiber.pool.protocol import (
    APPLY,
    BATCH,
    BATCH_HEAD,
    BLIND,
    CONSTANTS,
    FORGET,
    INITIALIZE,
    INITIALIZER_FAILED,
    MARKS,
    RESULTS,
    RETURN,
    STARMAP,
    STOP,
    STRANGE,
    UNLOADABLE,
    UNMARKED,
    UP,
    BatchHead,
)
from fiber.runtime import folders, session
from fiber.runtime.endpoint import HELLO
from fiber.runtime.places import connect
from fiber.runtime.poller import Patience
from fiber.wire import exceptions
from fiber.wire.arena import LEAST, TICK, Arena, Loan
from fiber.wire.channel import Channel
from fiber.wire.framing import Buffer, Frame
from fiber.wire.pickling import PLAIN, PROTOCOL, Apart, Packed, dumps, loads, reason

if TYPE_CHECKING:
    from fiber.pool.loader import Loader

__all__ = ["run"]

_THREAD: int | None = getattr(resource, "RUSAGE_THREAD", None)  # Linux has it
_SHORT = 1e-3  # seconds of a batch against which a short wait for the next one counts

_MANY = 64  # items; if each slept there would be far more than these
_SLEEPS = 2  # which are the keeper's, for whom the main thread makes way

_CONNECT_TIMEOUT = 30.0
_LAST_WORDS = 5.0  # seconds that the last results may take to arrive


def run(address: str, token: str) -> None:
    """Work for the pool whose master is at `address` and expects `token`, until it says STOP."""
    try:
        channel = connect(address, _CONNECT_TIMEOUT)
    except (FileNotFoundError, ConnectionRefusedError):
        return  # the master is gone: there is nobody to work for
    try:
        channel.send(HELLO, pickle.dumps({"token": token}))
        Worker(channel, _lending(address)).work()
    except (EOFError, ConnectionError):
        pass  # gone as well
    finally:
        channel.deliver(_LAST_WORDS)
        channel.close()


def _lending(address: str) -> Lending:
    """Return what is lent to the master at `address`: nothing if it is in another place."""
    folder = os.path.dirname(address.removeprefix("unix:"))
    near = folder == session.folder()

    def memory() -> str:
        os.close(folders.hold_memory(folder))  # the session holds it
        return folders.memory_folder(folder)

    # In another place there may be a folder of that name, and it be the session's as well.
    limit = session.memory_limit if near else lambda: 0
    return Lending(Arena(memory, arena_name(os.getpid()), limit))


def _effort() -> tuple[float, int] | None:
    """Return this thread's processor time, s, and how often it slept; None if that is not known."""
    if _THREAD is None:
        return None
    return time.thread_time(), resource.getrusage(_THREAD).ru_nvcsw


_Hold = Callable[[Sequence[Buffer]], Sequence[Buffer | Loan]]


class _Pickled(NamedTuple):
    """A result that is pickled already."""

    data: bytes
    buffers: Sequence[Buffer | Loan]


def _pickle(value: object, last: bool, hold: _Hold) -> _Pickled:
    """Pickle a result; its buffers stay where they are only if it is the `last` of its batch."""
    if type(value) is bytearray and len(value) >= LEAST:
        value = Apart(value)
    try:
        if last:
            return _Pickled(*dumps(value)[:2])
        packed = dumps(value, apart=LEAST)
        return _Pickled(packed.data, hold(packed.buffers))
    except Exception as error:
        what = f"the result of the task, a {type(value).__name__}, cannot be pickled"
        why = str(error) if isinstance(error, SerializationError) else reason(error)
        cause = error.__cause__ or error
        raise MaybeEncodingError(f"{what}: {why}", repr(cause), _text_of(value)) from cause


def _text_of(value: object) -> str:
    try:
        return repr(value)
    except Exception:
        return object.__repr__(value)


class _Job:
    """A batch while it is run."""

    def __init__(
        self,
        head: BatchHead,
        function: Callable[..., Any],
        items: deque[Any],
        hold: _Hold,
    ) -> None:
        self.id = head.batch
        self.how = head.how
        self.careful = head.careful
        self.chunk = head.chunk
        self.overtime = head.hold / 1000  # seconds
        self.function = function
        self.hold = hold
        self.items = items  # not begun yet; the main thread takes from the left, the keeper right
        self.size = len(items)
        self.values: list[Any] = []
        self.errors: dict[int, tuple[bytes, str]] = {}
        self.sent = 0  # values that were reported
        self.returned = 0  # items that were given back
        self.unloadable: tuple[bytes, str] | None = None  # why the next item cannot be unpickled
        self.slow = False  # the master was told before its end that it is not done
        self.began = 0.0
        self._before: tuple[float, int] | None = None  # see `_effort`
        self._pid = os.getpid()

    def begin(self) -> None:
        """The main thread runs the first item now."""
        if self.how != APPLY:
            self._before = _effort()
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """Return what it took since it began, or since the keeper reported; for the main thread.

        That is its processor time if the items did not sleep: how long they waited for a processor,
        where there are more workers than these, says nothing about them.
        """
        wall = time.perf_counter() - self.began
        now = _effort() if self._before is not None and not self.sent else None
        if now is None or self._before is None:
            return wall
        worked, slept = now[0] - self._before[0], now[1] - self._before[1]
        return min(wall, worked) if slept <= (_SLEEPS if self.size >= _MANY else 0) else wall

    def results(self) -> Iterator[Any]:
        """Run the items that were not begun, one at each step.

        What an item raises ends the iterator. It just ends before one that cannot be unpickled.
        """
        function, how, hold, items = self.function, self.how, self.hold, self.items
        while True:
            try:
                item = items.popleft()
            except IndexError:  # the keeper may have taken the last one
                return
            if type(item) is Group:
                try:
                    item = item.take()
                except BaseException as error:
                    self.unloadable = exceptions.encode(error)
                    return
            if how == STARMAP:
                value = function(*item)
            elif how == APPLY:
                args, kwargs = item
                value = function(*args, **kwargs)
                del args, kwargs
            else:
                value = function(item)
            del item  # before the next one is made
            # At once, for the next task may change what this one returned.
            yield value if type(value) in PLAIN else _pickle(value, not items, hold)

    def fail(self, error: BaseException) -> None:
        """The item after the last value raised `error`."""
        if os.getpid() != self._pid:
            os._exit(1)  # a fork that the task made has come to its end
        ours = 2  # frames of the traceback: the caller of the generator, and the generator
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration):
            error, ours = error.__cause__, 1  # a generator makes the one of the other
        self.errors[len(self.values)] = exceptions.encode(error, ours)
        self.values.append(None)


class Worker:
    """See the module."""

    def __init__(self, channel: Channel, lending: Lending) -> None:
        self._channel = channel
        self._lending = lending
        self._hold = functools.partial(lending.hold, None)
        self._inbox: deque[Frame] = deque()
        self._arrived = select.poll()
        self._arrived.register(channel.fileno(), select.POLLIN)
        self._patience = Patience()
        self._took = 0.0  # seconds, the last batch
        self._functions: dict[int, Callable[..., Any]] = {}
        self._unloaded: dict[int, Packed] = {}  # functions that came with batches given back
        self._constants: Loader | None = None
        self._job: _Job | None = None
        self._mark: list[int] | memoryview = [0]  # see `pool.marks`
        self._batches = 0  # how many were begun
        self._ticked = time.monotonic()  # when the keeper last had memory given up
        self._lock = threading.Lock()  # sending, the inbox, and the end of a job
        self._keeper: threading.Thread | None = None
        self._pause = 0.0  # seconds that it leaves the main thread alone with a batch
        self._bell = threading.Event()  # set while there is something for the keeper to watch

    def work(self) -> None:
        """Serve until STOP."""
        while True:
            frame = self._next()
            if frame.kind & ~LENT == BATCH:
                self._run(frame)
            elif frame.kind == FORGET:
                call = pickle.loads(frame.body)
                self._functions.pop(call, None)
                self._unloaded.pop(call, None)
                if self._constants is not None:
                    self._constants.forget(call)
            elif frame.kind == CONSTANTS:
                self._learn(frame)
            elif frame.kind == MARKS:
                self._begin_to_mark(frame)
            elif frame.kind == INITIALIZE:
                if not self._initialize(frame):
                    return
            elif frame.kind == RETURN:
                with self._lock:
                    self._lending.taken_back(None, frame.body)
            elif frame.kind == STOP:
                with self._lock:
                    self._give_back()  # or the master must take it that a fork sees it
                return

    def _next(self) -> Frame:
        lending = self._lending
        while not self._inbox:
            if lending.ended:
                with self._lock:
                    self._give_back()
                    self._channel.flush()
            patience = self._patience
            patience.begin()
            if patience.looks and self._took < _SHORT:
                while not self._arrived.poll(0) and patience.lasts():
                    pass
            if lending.holding or lending.arena.backed:
                self._tidy()
            self._inbox.extend(self._channel.read())
            patience.end()
        return self._inbox.popleft()

    def _tidy(self) -> None:
        """While nothing comes: give back what is over, and give up memory that is not needed."""
        lending = self._lending
        while not self._arrived.poll(TICK * 1000):
            with self._lock:
                self._give_back()
                self._channel.flush()
                if not lending.arena.tick() and not lending.holding:
                    return

    def _give_back(self) -> None:
        """Post what is over. With the lock."""
        for body in self._lending.returns().values():
            self._channel.post(RETURN, body)

    def _send(self, kind: int, body: object, buffers: Sequence[Buffer] = ()) -> None:
        self._channel.send(kind, pickle.dumps(body, PROTOCOL), buffers)

    def _learn(self, frame: Frame) -> None:
        """Take note of constants that batches of a call refer to."""
        if self._constants is None:
            from fiber.pool.loader import Loader  # here, for few need it

            self._constants = Loader()
        self._constants.tell(*pickle.loads(frame.body))

    def _begin_to_mark(self, frame: Frame) -> None:
        try:
            self._mark = map_mark(*pickle.loads(frame.body))
        except (OSError, ImportError):  # too many files are open perhaps
            with self._lock:
                self._send(UNMARKED, None)

    def _initialize(self, frame: Frame) -> bool:
        try:
            if len(frame.body):
                initializer, initargs = loads(frame.body, frame.buffers)
                initializer(*initargs)
        except BaseException as error:
            self._send(INITIALIZER_FAILED, exceptions.encode(error))
            return False
        self._send(UP, None)
        return True

    # Running -----------------------------------------------------------------------------------

    def _run(self, frame: Frame) -> None:
        head = BatchHead._make(BATCH_HEAD.unpack_from(frame.body))
        if frame.kind & LENT:
            with self._lock:
                found = self._see(head, frame)
            if found is None:
                return
            frame = found
            del found
        if not (head.function_size or head.call in self._unloaded or head.call in self._functions):
            with self._lock:
                self._send(STRANGE, head.batch)
            return
        self._mark[0] = head.batch
        try:
            function, items = self._load(head, frame)
        except BaseException as error:
            self._mark[0] = IDLE
            self._send_unloadable(head.batch, exceptions.encode(error))
            return
        del frame  # which has views of the items, and they may be over one by one
        job = _Job(head, function, items, self._hold)
        self._begin(job)
        if job.careful:
            self._run_carefully(job)
        else:
            self._run_all(job)
        if job.unloadable is not None:
            self._send_unloadable(job.id, job.unloadable)

    def _load(self, head: BatchHead, frame: Frame) -> tuple[Callable[..., Any], deque[Any]]:
        """Return the function and the items of a batch."""
        function = self._function(head, frame)
        data = memoryview(frame.body)[BATCH_HEAD.size + head.function_size :]
        buffers = frame.buffers[head.function_buffers :]
        loader = self._constants
        load = loads if loader is None else loader.loads_for(head.call)
        return function, load_items(head, data, buffers, load)

    def _see(self, head: BatchHead, frame: Frame) -> Frame | None:
        """Return a batch with what was lent; None if it must be sent again. With the lock."""
        try:
            return self._lending.unpack(None, frame)
        except OSError:  # too many files are open perhaps
            self._send(BLIND, head.batch)
            return None

    def _function(self, head: BatchHead, frame: Frame) -> Callable[..., Any]:
        """Return the function of a batch, which may come with it or have come before."""
        if head.function_size:
            packed = _packed_function(head, frame)
        elif head.call in self._unloaded:
            packed = self._unloaded.pop(head.call)
        else:
            return self._functions[head.call]
        function: Callable[..., Any] = loads(packed.data, packed.buffers)
        if head.how != APPLY:
            self._functions[head.call] = function
        return function

    def _begin(self, job: _Job) -> None:
        self._job = job
        self._pause = job.overtime
        self._batches += 1
        if not self._bell.is_set():
            self._bell.set()
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name="fiber-keeper", daemon=True)
            self._keeper.start()
        job.begin()

    def _run_all(self, job: _Job) -> None:
        values = job.values
        while True:
            try:
                # What was appended before an exception stays, so that its place is known.
                values.extend(job.results())
                break
            except BaseException as error:
                job.fail(error)
        self._mark[0] = IDLE
        with self._lock:
            self._job = None
            self._took = seconds = job.seconds()
            if job.sent < len(values):
                self._report(job, len(values), 0, seconds)

    def _run_carefully(self, job: _Job) -> None:
        values = job.values
        while job.items and job.unloadable is None:
            self._mark[0] = job.id
            try:
                values.extend(itertools.islice(job.results(), 1))
            except BaseException as error:
                job.fail(error)
            self._mark[0] = IDLE
            with self._lock:
                if job.sent < len(values):
                    self._report(job, len(values), 0, 0.0)
        with self._lock:
            self._job = None

    def _send_unloadable(self, batch: int, error: tuple[bytes, str]) -> None:
        """What is left of the batch cannot be unpickled."""
        with self._lock:
            self._send(UNLOADABLE, (batch, *error))

    def _report(self, job: _Job, done: int, returned: int, seconds: float) -> None:
        """Send the results up to `done` that were not sent yet. With the lock."""
        if self._lending.ended:
            self._give_back()
        first = job.sent
        values = job.values[first:done]  # to which the main thread adds meanwhile
        errors = {}
        if job.errors:
            places = [place for place in list(job.errors) if first <= place < done]
            errors = {place - first: job.errors[place] for place in places}
        job.sent = done
        buffers: list[Buffer | Loan] = []
        kinds = set(map(type, values))  # pickled already, or plain
        if bytes in kinds:
            values = [Apart(v) if type(v) is bytes and len(v) >= LEAST else v for v in values]
            kinds = set(map(type, values))
        if kinds <= PLAIN:
            body: tuple[Any, ...] = (job.id, returned, seconds, values, None, None, errors)
        else:
            pickled = [v if type(v) is _Pickled else _Pickled(*dumps(v)[:2]) for v in values]
            packed = [value.data for value in pickled]
            counts = [len(value.buffers) for value in pickled]
            buffers = [buffer for value in pickled for buffer in value.buffers]
            body = (job.id, returned, seconds, None, packed, counts, errors)
        kind, others = self._lending.pack(None, RESULTS, buffers) if buffers else (RESULTS, ())
        self._send(kind, body, others)

    # The keeper --------------------------------------------------------------------------------

    def _keep(self) -> None:
        while True:
            seen, pause = self._batches, self._pause
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
            done = len(job.values)
            if done > job.sent:
                job.began = time.perf_counter()  # what is left will be measured from here
            if done > job.sent or returned or not job.slow:  # that it takes long is said once
                job.slow = True
                self._report(job, done, returned, 0.0)
            elif self._lending.ended:
                self._give_back()
                self._channel.flush()
            while self._arrived.poll(0):
                self._inbox.extend(self._channel.read())
            if self._lending.arena.backed and time.monotonic() > self._ticked + TICK:
                self._ticked = time.monotonic()
                self._lending.arena.tick()
            for _ in range(len(self._inbox)):
                frame = self._inbox.popleft()
                if frame.kind == RETURN:
                    self._lending.taken_back(None, frame.body)
                elif frame.kind & ~LENT == BATCH:
                    head = BatchHead._make(BATCH_HEAD.unpack_from(frame.body))
                    if frame.kind & LENT:
                        found = self._see(head, frame)
                        if found is None:
                            continue
                        frame = found
                    if head.function_size and head.how != APPLY:
                        self._unloaded[head.call] = _packed_function(head, frame)
                    self._send(RESULTS, (head.batch, head.items, 0.0, [], None, None, {}))
                else:
                    self._inbox.append(frame)

    def _may_return(self, job: _Job) -> bool:
        """Whether the last item that was not begun may go: chunks stay together."""
        if job.chunk == 1:
            return True
        begun = job.size - job.returned - len(job.items)
        return len(job.items) > -begun % job.chunk


def _packed_function(head: BatchHead, frame: Frame) -> Packed:
    data = bytes(frame.body[BATCH_HEAD.size : BATCH_HEAD.size + head.function_size])
    return Packed(data, frame.buffers[: head.function_buffers])
