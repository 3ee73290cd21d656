"""The master of a pool: carries out what the scheduler decides.

    callers ─ submit ─► Scheduler ─ Send ─► links ─► workers
                            ▲                          │
    results ◄─ deliver ─────┴──── progress, down ◄─────┘

It keeps the workers, the items and functions of calls, and where their results go. Everything here
runs within the session's loop, by whichever thread leads it.
"""

from __future__ import annotations

import pickle
import secrets
import signal
import types
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any, NamedTuple, Protocol

from fiber.config import config
from fiber.errors import (
    PoolBroken,
    PoolError,
    PoolTerminated,
    SerializationError,
    TaskTimeout,
    WorkerDied,
)
from fiber.pool import protocol
from fiber.pool.scheduler import Batch, Fail, Finish, Retire, Scheduler, Send
from fiber.pool.source import Source, source_of
from fiber.process import gpus_of, pickle_process
from fiber.resources import Resources
from fiber.runtime import main, session
from fiber.runtime.agents import Child
from fiber.runtime.logs import logger
from fiber.runtime.loop import Event, Link, Timer
from fiber.wire.framing import Frame
from fiber.wire.pickling import Packed, dumps, loads

__all__ = ["Master", "PoolStats", "Settings"]


_BOOT_FAILURES = 3  # workers in a row that died before they were ready: the pool is broken
_TERMINATE_GRACE = 0.5  # seconds between SIGTERM and SIGKILL
_CLOSE_GRACE = 5.0  # seconds that a worker has to end after it closed its channel


class Settings(NamedTuple):
    """What a pool was asked for."""

    backend: str
    processes: int
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]
    maxtasksperchild: int | None
    retries: int | None
    timeout: float | None


class PoolStats(NamedTuple):
    """A pool at one moment.

    Attributes:
        processes: workers that it should have.
        ready: workers that are up.
        waiting: items that no worker has.
        running: items that workers have.
        done: items that have a result, or an exception of their own.
        failed: items that failed by a worker's death or a time-out.
        died: workers that ended without being asked to.
        seconds: spent in tasks by all workers together.
    """

    processes: int
    ready: int
    waiting: int
    running: int
    done: int
    failed: int
    died: int
    seconds: float


class Sink(Protocol):
    """Where the results of a call go."""

    def deliver(self, start: int, values: list[Any], errors: dict[int, BaseException]) -> None: ...
    def finish(self) -> None: ...
    def abort(self, error: BaseException) -> None: ...


class _Call:
    """A call that is not finished."""

    def __init__(
        self, id: int, name: str, how: int, function: Any, packed: Packed, sink: Sink
    ) -> None:
        self.id = id
        self.name = name
        self.how = how
        self.function = function
        self.packed = packed
        self.sink = sink
        self.timeout: float | None = None
        self.chunk = 1
        self.items: list[Any] = []
        self.first = 0  # index of the first item in `items`
        self.source: Source | None = None
        self.fed = 0  # items that were read of a stream
        self.told = 0  # those of them that the scheduler knows: whole chunks
        self.consumed = 0
        self.settled: dict[int, int] = {}  # ranges that are settled above `first`, for a stream
        self.known_by: set[int] = set()

    def take(self, start: int, stop: int) -> list[Any]:
        return self.items[start - self.first : stop - self.first]

    def settle(self, start: int, stop: int) -> None:
        """Let go of items whose results are there, if the call is a stream."""
        if self.source is None:
            return
        self.settled[start] = stop
        end = self.first
        while end in self.settled:
            end = self.settled.pop(end)
        # Not at every step: cutting a list costs what remains of it.
        if end > self.first:
            del self.items[: end - self.first]
            self.first = end


class _Worker:
    """A worker, from its start to its end."""

    def __init__(self, id: int, child: Child) -> None:
        self.id = id
        self.child = child
        self.link: Link | None = None
        self.token = ""
        self.up = False
        self.stopping = False
        self.timers: list[Timer] = []


class Master:
    """See the module.

    Attributes:
        loop: of the session.
        closing: it takes no more calls.
        gone: set when the pool has ended and its last worker with it.
    """

    def __init__(self, settings: Settings, resources: Resources) -> None:
        self.settings = settings
        self.gone = Event()
        self._session = session.current()
        self.loop = self._session.loop
        self._resources = resources
        self._scheduler = Scheduler()
        self._workers: dict[int, _Worker] = {}
        self._calls: dict[int, _Call] = {}
        self._costs: dict[Any, float] = {}  # seconds per item, by function
        self._packed: tuple[Any, Packed] = (None, Packed(b"", ()))
        self._call_ids = 0
        self._worker_ids = 0
        self._boot_failures = 0
        self._acting = False
        self.closing = False
        self._ended: BaseException | None = None  # why it takes no more calls
        self._done = self._failed = self._died = 0
        self._seconds = 0.0
        self._start()

    # Workers -----------------------------------------------------------------------------------

    def _cpu(self) -> int:
        return self._resources.cpu or config.cpu_per_job

    def _start(self) -> None:
        """Start the first workers; raises what keeps them from starting."""
        agent = self._session.agent(self.settings.backend, self._cpu())
        self._initialization = b""
        self._initialization_buffers: Sequence[Any] = ()
        if self.settings.initializer is not None:
            pair = (self.settings.initializer, self.settings.initargs)
            packed = dumps(pair, main.missing(agent.names))
            self._initialization, self._initialization_buffers = packed.data, packed.buffers
        with self.loop:
            self._agent = agent
            for _ in range(self.settings.processes):
                self._start_worker()

    def _start_worker(self) -> None:
        from fiber.pool.workerprocess import WorkerProcess

        self._worker_ids += 1
        number, token = self._worker_ids, secrets.token_hex(16)
        endpoint = self._session.endpoint
        self._agent = self._session.agent_soon(self.settings.backend, self._cpu())
        process = WorkerProcess(number, endpoint.address, token)
        child = self._session.spawn(
            self._agent,
            process.name,
            pickle_process(process, self, self._agent.names),
            cpu=self._cpu(),
            extra_environment=gpus_of(self._resources),
            capture_stderr=True,
            ignore_interrupt=True,
        )
        worker = self._workers[number] = _Worker(number, child)
        worker.token = token
        endpoint.expect(token, lambda link, hello: self._arrived(worker, link))
        child.on_ended = lambda: self._worker_ended(worker)
        if child.ended.is_set:
            self._worker_ended(worker)
            return
        late = config.start_timeout
        worker.timers.append(self.loop.call_later(late, lambda: self._too_late(worker)))

    def _too_late(self, worker: _Worker) -> None:
        if worker.link is None:
            logger.warning("%s did not connect in time and is ended", worker.child.name)
            worker.child.signal(signal.SIGKILL)

    def _arrived(self, worker: _Worker, link: Link) -> None:
        worker.link = link
        link.on_frame = lambda frame: self._on_frame(worker, frame)
        link.on_lost = lambda: self._on_lost(worker)
        link.post(protocol.INITIALIZE, self._initialization, self._initialization_buffers)
        if worker.stopping:
            link.post(protocol.STOP, b"")

    def _on_lost(self, worker: _Worker) -> None:
        """It hung up; its end will be told, unless only its channel is gone."""
        self._scheduler.worker_lost(worker.id)
        kill = lambda: worker.child.signal(signal.SIGKILL)  # noqa: E731
        worker.timers.append(self.loop.call_later(_CLOSE_GRACE, kill))

    def _worker_ended(self, worker: _Worker) -> None:
        """Its process is gone: settle what it still sent, then give its work to others."""
        if worker.link is not None:
            worker.link.drain()
            worker.link.close()
        self._session.endpoint.forget(worker.token)
        for timer in worker.timers:
            timer.cancel()
        was_up, worker.up = worker.up, False
        if was_up:
            # What it was sent last it had not read: so the item was not what ended it.
            unread = worker.link is not None and worker.link.unread
            innocent = unread and len(self._scheduler.batches_of(worker.id)) == 1
            self._scheduler.worker_down(worker.id, charged=not innocent)
        for call in self._calls.values():
            call.known_by.discard(worker.id)
        if not worker.stopping:
            self._died += 1
            logger.info("%s", self._describe_end(worker))
            self._boot_failures = 0 if was_up else self._boot_failures + 1
        self._act()
        del self._workers[worker.id]
        if self._boot_failures >= _BOOT_FAILURES and not self.closing:
            self._break(
                PoolBroken(
                    f"{self._boot_failures} workers in a row ended before they were ready; "
                    f"the last: {self._describe_end(worker)}{_tail(worker.child.stderr)}"
                )
            )
        if self._needs_workers():
            self._start_worker()
        self._end_if_done()

    def _needs_workers(self) -> bool:
        if self.closing and not self._calls:
            return False
        active = sum(not worker.stopping for worker in self._workers.values())
        return active < self.settings.processes

    def _describe_end(self, worker: _Worker) -> str:
        child = worker.child
        if child.error is not None:
            return f"{child.name}: {child.error}"
        return f"{child.name} (process {child.pid}) {describe_exit(child.exitcode)}"

    def _stop_worker(self, worker: _Worker) -> None:
        worker.stopping = True
        if worker.link is not None:
            worker.link.post(protocol.STOP, b"")

    # Calls -------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise what the pool says to who wants to submit."""
        if self._ended is not None:
            raise self._ended

    def pack(self, function: Callable[..., Any]) -> Packed:
        """Pickle a function for the workers; raises SerializationError."""
        known = main.missing(self._agent.names)
        if known is None and function is self._packed[0]:
            return self._packed[1]
        try:
            packed = dumps(function, known)
        except SerializationError as error:
            raise SerializationError(
                f"the function {_name(function)} cannot be sent to the workers: {error}"
            ) from error.__cause__
        if packed.by_name and isinstance(function, types.FunctionType):
            self._packed = (function, packed)  # a name stays the same: no need to pickle it again
        return packed

    def submit(
        self,
        function: Callable[..., Any],
        packed: Packed,
        how: int,
        sink: Sink,
        items: list[Any],
        *,
        chunk: int = 1,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Begin a call over `items`. Within the loop."""
        call = self._new_call(function, packed, how, sink, chunk, timeout)
        call.items = items
        self._scheduler.submit(
            call.id,
            len(items),
            retries=self._retries(retries),
            chunk=chunk,
            single=call.timeout is not None,
            cost=self._costs.get(_key(function)),
        )
        self._act()

    def stream(
        self,
        function: Callable[..., Any],
        packed: Packed,
        how: int,
        sink: Any,
        iterable: Iterable[Any],
        *,
        chunk: int = 1,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Begin a call over an iterable that is read as results are taken. Within the loop."""
        call = self._new_call(function, packed, how, sink, chunk, timeout)
        sink.bind(call.id)
        call.source = source_of(self.loop, iterable, lambda: self._feed(call), 1024)
        self._scheduler.submit(
            call.id,
            0,
            retries=self._retries(retries),
            chunk=chunk,
            single=call.timeout is not None,
            cost=self._costs.get(_key(function)),
            open=True,
        )
        self._feed(call)

    def _new_call(
        self,
        function: Callable[..., Any],
        packed: Packed,
        how: int,
        sink: Sink,
        chunk: int,
        timeout: float | None,
    ) -> _Call:
        self.check_open()
        self._call_ids += 1
        call = _Call(self._call_ids, _name(function), how, function, packed, sink)
        call.timeout = self.settings.timeout if timeout is None else timeout
        call.chunk = chunk
        self._calls[call.id] = call
        return call

    def _retries(self, retries: int | None) -> int:
        if retries is None:
            retries = self.settings.retries
        return config.retries if retries is None else retries

    def _feed(self, call: _Call) -> None:
        """Take items from a stream's source, as far as workers and reader keep up."""
        source = call.source
        if source is None or call.id not in self._calls:
            return
        wanted = -(-self._scheduler.wants(call.id) // call.chunk) * call.chunk
        most = min(wanted, self._window(call))
        if most > 0:
            items = source.take(most)
            call.fed += len(items)
            call.items += items
            ended = source.ended()
            new = call.fed - call.told
            new -= 0 if ended else new % call.chunk
            call.told += new
            self._scheduler.extend(call.id, new)
            if ended:
                self._scheduler.complete(call.id)
            self._act()

    def _window(self, call: _Call) -> int:
        """Return how many more items may be read before results are taken."""
        batch = self._scheduler.batch_items(call.id)
        most = max(
            config.imap_buffer * self.settings.processes, 4 * batch * max(len(self._workers), 1)
        )
        weight = self._scheduler.weight(call.id)
        if weight:
            most = min(
                most, max(int(config.imap_buffer_mb * 2**20 / weight), 2 * len(self._workers))
            )
        return max(0, max(most, call.chunk) - (call.fed - call.consumed))

    def consumed(self, call: int, items: int) -> None:
        """A stream's reader took `items` results. Within the loop."""
        found = self._calls.get(call)
        if found is not None:
            found.consumed += items
            self._feed(found)

    def cancel(self, call: int) -> None:
        """Nobody waits for the call any more. Within the loop."""
        found = self._calls.pop(call, None)
        if found is not None:
            self._scheduler.cancel(call)
            self._forget(found)
            self._act()

    def _forget(self, call: _Call) -> None:
        if call.source is not None:
            call.source.stop()
        for number in call.known_by:
            link = self._workers[number].link
            if link is not None:
                link.post(protocol.FORGET, pickle.dumps(call.id))

    # What the scheduler asks for ---------------------------------------------------------------

    def _act(self) -> None:
        if self._acting:  # further out, where this is called from, the loop below goes on
            return
        self._acting = True
        while actions := self._scheduler.actions():
            for action in actions:
                if isinstance(action, Send):
                    self._send(action.batch)
                elif isinstance(action, Finish):
                    self._finish(action.call)
                elif isinstance(action, Fail):
                    self._fail(action)
                elif isinstance(action, Retire):
                    self._retire(action.worker)
        self._acting = False
        if self.closing:
            self._end_if_done()

    def _send(self, batch: Batch) -> None:
        call = self._calls.get(batch.call.id)
        worker = self._workers[batch.worker]
        if call is None or worker.link is None:
            return
        items = call.take(batch.start, batch.stop)
        try:
            packed = dumps(items, main.missing(self._agent.names))
        except SerializationError as error:
            if len(items) > 1:
                self._scheduler.unloadable(batch.id)  # one by one, to find which
                return
            text = f"item {batch.start} of {call.name} cannot be sent to a worker: {error}"
            self._settle_failed(batch, SerializationError(text))
            return
        data, buffers, _ = packed
        self._scheduler.weigh(call.id, (len(data) + sum(map(len, buffers))) / len(items))
        function = b""
        function_buffers: Sequence[Any] = ()
        if worker.id not in call.known_by:
            function, function_buffers, _ = call.packed
            if call.how != protocol.APPLY:
                call.known_by.add(worker.id)
        head = protocol.BATCH_HEAD.pack(
            batch.id,
            call.id,
            call.chunk,
            len(items),
            call.how,
            batch.careful,
            len(function_buffers),
            len(function),
        )
        worker.link.post(protocol.BATCH, head + function + data, [*function_buffers, *buffers])
        if call.timeout is not None:
            expire = lambda: self._expire(batch, call)  # noqa: E731
            worker.timers = [self.loop.call_at(monotonic() + call.timeout, expire)]

    def _expire(self, batch: Batch, call: _Call) -> None:
        """An item took too long: it fails, and its worker is ended."""
        assert call.timeout is not None
        what = f"item {batch.start} of {call.name}" if call.how != protocol.APPLY else call.name
        error = TaskTimeout(
            f"{what} took longer than its time-out of {call.timeout:g} seconds; "
            "its worker was ended",
            batch.start,
            call.timeout,
        )
        if self._settle_failed(batch, error, worker_ends=True):
            self._workers[batch.worker].child.signal(signal.SIGKILL)

    def _settle_failed(
        self, batch: Batch, error: BaseException, *, worker_ends: bool = False
    ) -> bool:
        """The item of a batch of one fails with `error`; return whether it had not settled yet."""
        call = self._calls.get(batch.call.id)
        settled = self._scheduler.fail(batch.id, worker_ends=worker_ends)
        if settled is None or call is None:
            return False
        self._failed += 1
        self._deliver(call, batch.start, [None], {0: error})
        self._act()
        return True

    def _fail(self, action: Fail) -> None:
        call = self._calls.get(action.call)
        if call is None:
            return
        worker = self._workers[action.worker]
        child = worker.child
        what = call.name if call.how == protocol.APPLY else f"item {action.item} of {call.name}"
        times = "once" if action.attempts == 1 else f"{action.attempts} times"
        message = f"{what} ended its worker {times}; the last one, {self._describe_end(worker)}"
        self._failed += 1
        error = WorkerDied(
            message + _tail(child.stderr),
            action.item,
            action.attempts,
            child.exitcode,
            child.pid,
            child.stderr,
        )
        self._deliver(call, action.item, [None], {0: error})

    def _finish(self, id: int) -> None:
        call = self._calls.pop(id, None)
        if call is None:
            return
        self._forget(call)
        if call.source is not None and call.source.error is not None:
            call.sink.abort(call.source.error)
        else:
            call.sink.finish()

    def _retire(self, number: int) -> None:
        worker = self._workers[number]
        self._stop_worker(worker)
        if self._needs_workers():
            self._start_worker()

    # What workers say --------------------------------------------------------------------------

    def _on_frame(self, worker: _Worker, frame: Frame) -> None:
        if frame.kind == protocol.RESULTS:
            self._on_results(worker, frame)
        elif frame.kind == protocol.UP:
            logger.debug("%s is up", worker.child.name)
            worker.up = True
            self._boot_failures = 0
            self._scheduler.worker_up(worker.id, self.settings.maxtasksperchild)
            for timer in worker.timers:
                timer.cancel()
        elif frame.kind == protocol.UNLOADABLE:
            self._on_unloadable(worker, frame)
        elif frame.kind == protocol.INITIALIZER_FAILED:
            worker.stopping = True
            self._break(protocol.decode_exception(loads(frame.body)))
        self._act()

    def _on_results(self, worker: _Worker, frame: Frame) -> None:
        batch, returned, seconds, values, packed, counts, encoded = pickle.loads(frame.body)
        done = len(values) if values is not None else len(packed)
        self._seconds += seconds
        settled = self._scheduler.progress(batch, done, seconds, returned)
        if settled is None:
            return
        call = self._calls[settled[0]]
        errors = {place: protocol.decode_exception(error) for place, error in encoded.items()}
        if values is None:
            values = []
            for place, buffers in enumerate(protocol.split(frame.buffers, counts)):
                try:
                    values.append(loads(packed[place], buffers))
                except BaseException as error:
                    text = f"the result of item {settled[1] + place} of {call.name}"
                    errors[place] = SerializationError(f"{text} cannot be unpickled: {error!r}")
                    errors[place].__cause__ = error
                    values.append(None)
        if seconds:
            self._costs[_key(call.function)] = seconds / done
            if len(self._costs) > 256:
                del self._costs[next(iter(self._costs))]
        if call.timeout is not None:
            for timer in worker.timers:
                timer.cancel()
        self._deliver(call, settled[1], values, errors)

    def _deliver(
        self, call: _Call, start: int, values: list[Any], errors: dict[int, BaseException]
    ) -> None:
        self._done += len(values)
        call.settle(start, start + len(values))
        call.sink.deliver(start, values, errors)
        if call.source is not None:
            self._feed(call)

    def _on_unloadable(self, worker: _Worker, frame: Frame) -> None:
        number, whole, text = pickle.loads(frame.body)
        for batch in self._scheduler.batches_of(worker.id):
            if batch.id != number:
                continue
            call = self._calls.get(batch.call.id)
            if call is not None:
                call.known_by.discard(worker.id)
            if batch.stop - batch.start > 1 or call is None:
                self._scheduler.unloadable(number)
                return
            cause = protocol.decode_exception((whole, text))
            error = SerializationError(
                f"item {batch.start} of {call.name}, or the function, cannot be unpickled by a "
                f"worker: {type(cause).__name__}: {cause}"
            )
            error.__cause__ = cause
            self._settle_failed(batch, error)

    # The end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls; workers end when what is there is done. Within the loop."""
        if self._ended is None:
            self._ended = _Closed("Pool not running")
        self.closing = True
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self.closing and not self._calls:
            for worker in self._workers.values():
                if not worker.stopping:
                    self._stop_worker(worker)
        if self._ended is not None and not self._workers:
            self.gone.set()

    def terminate(self, error: BaseException | None = None) -> None:
        """End now: what is awaited fails, workers are ended. Within the loop."""
        reason = error or PoolTerminated("the pool was terminated")
        if self._ended is None:
            self._ended = _Closed("Pool not running") if error is None else reason
        self.closing = True
        calls, self._calls = self._calls, {}
        for call in calls.values():
            self._scheduler.cancel(call.id)
            if call.source is not None:
                call.source.stop()
            call.sink.abort(reason)
        for worker in self._workers.values():
            worker.stopping = True
            worker.child.signal(signal.SIGTERM)
            kill = lambda worker=worker: worker.child.signal(signal.SIGKILL)  # noqa: E731
            worker.timers.append(self.loop.call_later(_TERMINATE_GRACE, kill))
        self._end_if_done()

    def _break(self, error: BaseException) -> None:
        """The pool cannot go on: all calls, and those to come, raise `error`."""
        if self._ended is None or isinstance(self._ended, _Closed):
            self._ended = error
            self.terminate(error)

    def stats(self) -> PoolStats:
        """Return how the pool is. Within the loop."""
        running = sum(batch.stop - batch.start for batch in self._scheduler.assigned())
        return PoolStats(
            processes=self.settings.processes,
            ready=sum(worker.up and not worker.stopping for worker in self._workers.values()),
            waiting=self._scheduler.waiting,
            running=running,
            done=self._done - self._failed,
            failed=self._failed,
            died=self._died,
            seconds=self._seconds,
        )

    def pids(self) -> list[int]:
        """Return the process IDs of the workers that run. Within the loop."""
        children = [worker.child for worker in self._workers.values()]
        return [child.pid for child in children if child.pid is not None]


class _Closed(PoolError, ValueError):
    """The pool takes no more calls; a ValueError, as multiprocessing's."""


def describe_exit(exitcode: int | None) -> str:
    """Say in words how a process ended."""
    if exitcode is None:
        return "ended, nobody knows how"
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    try:
        return f"was ended by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was ended by signal {-exitcode}"


def _tail(stderr: str, lines: int = 20) -> str:
    """Return the last lines of a dead worker as an addition to a message."""
    last = stderr.rstrip().splitlines()[-lines:]
    if not last:
        return ""
    return "\nThe last lines that it wrote:\n" + "\n".join(f"    {line}" for line in last)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _key(function: Any) -> Any:
    """Return what a function is known by from call to call, without keeping it alive."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return getattr(function, "__code__", None) or getattr(function, "__qualname__", None)
