"""The master of a pool: carries out what the scheduler decides.

    callers ─ submit, stream ─► Scheduler ─ Send ─► crew ─► workers
                                    ▲                         │
    results ◄─ deliver ─────────────┴── progress, down ◄──────┘

It keeps the calls; the crew keeps the workers. Everything here runs within the session's loop, by
whichever thread leads it.
"""

from __future__ import annotations

import pickle
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from fiber.config import config
from fiber.errors import (
    PoolClosed,
    PoolError,
    PoolTerminated,
    SerializationError,
    TaskTimeout,
    WorkerDied,
)
from fiber.pool import protocol
from fiber.pool.calls import Call, Options, Sink, name_of, need_a_look, weight_of
from fiber.pool.crew import Crew, Settings, Worker
from fiber.pool.lending import LENT, Lending, arena_name
from fiber.pool.results import IMapUnorderedIterator
from fiber.pool.scheduler import Batch, Fail, Finish, Retire, Scheduler, Send
from fiber.pool.source import source_of
from fiber.process import Process
from fiber.resources import Resources
from fiber.runtime import folders, session
from fiber.runtime.logs import WARNING, log
from fiber.runtime.loop import Event, Timer
from fiber.wire import arena, exceptions
from fiber.wire.framing import Frame
from fiber.wire.pickling import Packed, dumps, loads, reason

if TYPE_CHECKING:
    from fiber.pool.constants import Constants

__all__ = ["Master", "PoolStats"]

_IDLE_DEATHS = 10  # for each worker: so many in a row, without any result, are not by chance
_LOOK = 1.0  # seconds between looks whether the user has let go of results
_ARRIVES = 0.5  # seconds that a message to a home takes at the most, while nothing is stuck
_READ_AHEAD = 1024  # items that a thread reads ahead of what is sent


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


class _Reference(weakref.ref[IMapUnorderedIterator]):
    """A reference to a stream's iterator; its callback is a method in C.

    A finalizer in Python would swallow the KeyboardInterrupt of a Ctrl-C that comes just then.
    """

    call = 0


class Master:
    """See the module; the foreman of its crew.

    Attributes:
        loop: of the session.
        closing: whether it takes no more calls.
    """

    def __init__(self, settings: Settings, resources: Resources) -> None:
        self.settings = settings
        self._session = session.current()
        self.loop = self._session.loop
        self.closing = False
        self._scheduler = Scheduler()
        self._calls: dict[int, Call] = {}
        self._call_ids = 0
        self._packed: tuple[Any, Packed] = (None, Packed(b"", ()))  # the last function
        self._ended: BaseException | None = None  # why it takes no more calls
        self._dropped: deque[_Reference] = deque()  # iterators that nobody has any more
        self._acting = False
        self._idle_deaths = 0  # of workers in a row, without any result in between
        self._done = self._failed = 0
        self._seconds = 0.0
        self._lending = Lending(self._session.arena)
        self._blind: set[int] = set()  # workers that do not see what is lent to them
        self._looking: Timer | None = None
        self._handles: dict[int, tuple[list[Any], bool]] = {}
        """Of constants, by the batch that they are in; whether it was under way lately."""
        self._crew = Crew(settings, resources, self)

    def begin(self) -> None:
        """Start the workers."""
        with self.loop:
            self._crew.recruit()

    @property
    def gone(self) -> Event:
        """Set when the pool has ended and its last worker with it."""
        return self._crew.gone

    # Calls -------------------------------------------------------------------------------------

    def _memory_folder(self) -> str:
        return session.current().memory_folder()

    def check_open(self) -> None:
        """Raise what the pool says to who wants to submit."""
        if self._ended is not None:
            raise self._ended
        if self.loop.closed:
            raise PoolError(
                "this pool's session has ended, or belongs to the process that this one was forked "
                "from; make a pool here"
            )

    def pack(self, function: Callable[..., Any]) -> Packed:
        """Pickle a function for the workers; raises SerializationError."""
        known = self._crew.known_names
        last, last_packed = self._packed  # one reading: another thread may put its own there
        if known is None and function is last:
            return last_packed
        try:
            packed = dumps(function, known)
        except SerializationError as error:
            raise SerializationError(
                f"the function {name_of(function)} cannot be sent to the workers: {error}"
            ) from error.__cause__
        if packed.by_name and isinstance(function, types.FunctionType):
            self._packed = (function, packed)  # a name stays the same: no need to pickle it again
        return packed

    def constants_of(self, how: int, items: list[Any]) -> Constants | None:
        """Return what is to be sent once of all that the items have; not within the loop."""
        if not need_a_look(items):
            return None
        from fiber.pool.constants import constants_of  # not needed to import Fiber

        return constants_of(how, items, self._crew.known_names, self._memory_folder)

    def share(self, packed: Packed) -> tuple[Packed, Any]:
        """Return a function as it shall travel, and what keeps it; not within the loop."""
        if weight_of(packed) < arena.LEAST:
            return packed, None
        from fiber.pool.constants import share_function

        return share_function(packed, self._memory_folder)

    def submit(
        self,
        function: Callable[..., Any],
        packed: Packed,
        how: int,
        sink: Sink,
        items: list[Any],
        options: Options,
        constants: Constants | None = None,
        keeps: Any = None,
    ) -> None:
        """Begin a call over `items`."""
        call = self._new_call(function, packed, how, sink, options)
        call.items, call.constants, call.keeps = items, constants, keeps
        self._schedule(call, len(items), options)
        self._act()

    def stream(
        self,
        function: Callable[..., Any],
        packed: Packed,
        how: int,
        results: IMapUnorderedIterator,
        iterable: Iterable[Any],
        options: Options,
        keeps: Any,
    ) -> None:
        """Begin a call over an iterable that is read as results are taken."""
        self.check_open()
        arrivals = results.bind(self._call_ids + 1)
        call = self._new_call(function, packed, how, arrivals, options)
        call.keeps = keeps
        call.iterator = _Reference(results, self._dropped.append)
        call.iterator.call = call.id
        ahead = config.imap_buffer * self.settings.processes
        call.source = source_of(self.loop, iterable, lambda: self._feed(call), ahead)
        self._schedule(call, None, options)
        self._feed(call)

    def _new_call(
        self,
        function: Callable[..., Any],
        packed: Packed,
        how: int,
        sink: Sink,
        options: Options,
    ) -> Call:
        self.check_open()
        self._call_ids += 1
        timeout = self.settings.timeout if options.timeout is None else options.timeout
        call = Call(self._call_ids, function, packed, how, sink, timeout, options.chunk)
        self._calls[call.id] = call
        return call

    def _schedule(self, call: Call, items: int | None, options: Options) -> None:
        retries = self.settings.retries if options.retries is None else options.retries
        self._scheduler.submit(
            call.id,
            items or 0,
            retries=config.retries if retries is None else retries,
            chunk=call.chunk,
            single=call.timeout is not None,
            kind=_kind(call.function),
            open=items is None,
        )

    def _feed(self, call: Call) -> None:
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

    def _window(self, call: Call) -> int:
        """Return how many more items may be read before results are taken."""
        if self.closing:  # who waits in `join` takes none
            return _READ_AHEAD
        workers = max(len(self._crew.workers), 1)
        batch = self._scheduler.batch_items(call.id)
        most = max(config.imap_buffer * self.settings.processes, 4 * batch * workers)
        weight = self._scheduler.weight(call.id)
        if weight:
            most = min(most, max(int(config.imap_buffer_mb * 2**20 / weight), 2 * workers))
        if call.source is not None:
            call.source.ahead = min(most, _READ_AHEAD)
        return max(0, max(most, call.chunk) - (call.fed - call.consumed))

    def consumed(self, call: int, items: int) -> None:
        """A stream's reader took `items` results."""
        found = self._calls.get(call)
        if found is not None:
            found.consumed += items
            self._feed(found)

    def cancel(self, call: int) -> None:
        """Nobody waits for the call any more."""
        found = self._calls.pop(call, None)
        if found is not None:
            self._scheduler.cancel(call)
            self._forget(found)
            self._act()

    def _forget(self, call: Call) -> None:
        if call.source is not None:
            call.source.stop()
        told = call.constants.told if call.constants is not None else set()
        for number in call.known_by | told:
            self._crew.workers[number].post(protocol.FORGET, pickle.dumps(call.id))
        if self.closing:
            self._crew.dismiss()

    # What is lent ------------------------------------------------------------------------------

    def _look_soon(self) -> None:
        if self._looking is None:
            self._looking = self.loop.call_later(_LOOK, self._look)

    def _look(self) -> None:
        """Give back what the user has let go of, which nothing tells."""
        self._looking = None
        self._give_back()
        if self._lending.holding and self._crew.workers:
            self._look_soon()

    def _give_back(self) -> None:
        for owner, body in self._lending.returns().items():
            worker = self._crew.workers.get(owner)  # type: ignore[call-overload]
            if worker is not None:
                worker.post(protocol.RETURN, body)

    # What the scheduler asks for ---------------------------------------------------------------

    def _act(self) -> None:
        while self._dropped:
            self.cancel(self._dropped.popleft().call)
        if self._lending.ended:
            self._give_back()
        if self._acting:  # further out, where this is called from, the loop below goes on
            return
        self._acting = True
        try:
            while actions := self._scheduler.actions():
                for action in actions:
                    if isinstance(action, Send):
                        self._send(action.batch)
                    elif isinstance(action, Finish):
                        self._finish(action.call)
                    elif isinstance(action, Fail):
                        self._fail(action)
                    elif isinstance(action, Retire):
                        self._crew.workers[action.worker].stop()
                        self._crew.recruit()
        finally:
            self._acting = False

    def _send(self, batch: Batch) -> None:
        call = self._calls.get(batch.call.id)
        worker = self._crew.workers[batch.worker]
        if call is None:
            return
        items = call.take(batch.start, batch.stop)
        handles: list[Any] = []
        try:
            with session.lending(handles):
                data, buffers, groups = call.pack(items, self._crew.known_names)
        except BaseException as error:  # a user's code ran, and may have raised anything
            if len(items) > 1:
                self._scheduler.unloadable(batch.id)  # one by one, to find which
                return
            if isinstance(error, SerializationError) or not isinstance(error, Exception):
                text = f"{call.describe(batch.start)} cannot be sent to a worker: {reason(error)}"
                error = SerializationError(text)
            self._settle_failed(batch, error)
            return
        if handles:
            self._keep_handles(batch.id, handles)
        weight = (len(data) + sum(map(len, buffers))) / len(items)
        if call.constants is not None:
            weight += call.constants.size
            if worker.id not in call.constants.told:
                call.constants.told.add(worker.id)
                sources = [tuple(source) for source in call.constants.sources]
                worker.post(protocol.CONSTANTS, pickle.dumps((call.id, sources)))
        self._scheduler.weigh(call.id, weight)
        function, function_buffers = b"", ()
        if worker.id not in call.known_by:
            function, function_buffers, _ = call.packed  # type: ignore[assignment]
            if call.how != protocol.APPLY:
                call.known_by.add(worker.id)
        head = protocol.BATCH_HEAD.pack(
            batch.id,
            call.id,
            call.chunk,
            len(items),
            groups,
            call.how,
            batch.careful,
            len(function_buffers),
            len(function),
        )
        kind, buffers = protocol.BATCH, [*function_buffers, *buffers]
        if buffers and not (worker.child.agent.elsewhere or worker.id in self._blind):
            kind, buffers = self._lending.pack(worker.id, kind, buffers)  # type: ignore[assignment]
            if kind != protocol.BATCH:
                self._session.tend_arena()
        worker.post(kind, head + function + data, buffers)
        if call.timeout is not None:
            when = monotonic() + call.timeout
            worker.item_timer = self.loop.call_at(when, lambda: self._expire(batch, call))

    def _keep_handles(self, batch: int, handles: list[Any]) -> None:
        """Keep constants until a worker has unpickled the batch, and said so to their homes."""
        if not self._handles:
            self.loop.call_later(_ARRIVES, self._drop_handles)
        self._handles[batch] = (handles, True)

    def _drop_handles(self) -> None:
        """Drop those of batches that are done, and were already the last time."""
        under_way = {batch.id for batch in self._scheduler.assigned()}
        self._handles = {
            batch: (handles, batch in under_way)
            for batch, (handles, fresh) in self._handles.items()
            if fresh or batch in under_way
        }
        if self._handles:
            self.loop.call_later(_ARRIVES, self._drop_handles)

    def _expire(self, batch: Batch, call: Call) -> None:
        """An item took too long: it fails, and its worker is ended."""
        assert call.timeout is not None
        error = TaskTimeout(
            f"{call.describe(batch.start)} took longer than its time-out of {call.timeout:g} "
            "seconds; its worker was ended",
            batch.start,
            call.timeout,
        )
        if self._settle_failed(batch, error, worker_ends=True):
            self._crew.workers[batch.worker].kill()

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
        worker = self._crew.workers[action.worker]
        child = worker.child
        times = "once" if action.attempts == 1 else f"{action.attempts} times"
        error = WorkerDied(
            f"{call.describe(action.item)} ended its worker {times}; the last one, "
            f"{worker.describe_end()}{worker.last_words()}",
            action.item,
            action.attempts,
            child.exitcode,
            child.pid,
            child.stderr,
        )
        self._failed += 1
        self._deliver(call, action.item, [None], {0: error})

    def _finish(self, id: int) -> None:
        call = self._calls.pop(id, None)
        if call is None:
            return
        if call.source is not None and call.source.error is not None:
            call.sink.abort(call.source.error)
        else:
            call.sink.finish()
        self._forget(call)

    def _deliver(
        self, call: Call, start: int, values: list[Any], errors: dict[int, BaseException]
    ) -> None:
        self._done += len(values)
        call.settle(start, start + len(values))
        call.sink.deliver(start, values, errors)
        self._feed(call)

    # What the crew tells -----------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether calls are not finished."""
        return bool(self._calls)

    def worker_up(self, worker: Worker) -> None:
        """A worker is ready."""
        self._scheduler.worker_up(worker.id, self.settings.maxtasksperchild)
        self._act()

    def worker_lost(self, worker: Worker) -> None:
        """A worker hung up."""
        self._scheduler.worker_lost(worker.id)

    def worker_down(self, worker: Worker) -> None:
        """A worker has ended: its work goes to others."""
        self._scheduler.worker_down(worker.id, charged=not self._is_innocent(worker))
        for call in self._calls.values():
            call.known_by.discard(worker.id)
            if call.constants is not None:
                call.constants.told.discard(worker.id)
        self._lending.gone(worker.id)
        self._blind.discard(worker.id)
        if not worker.child.agent.elsewhere:
            memory = folders.memory_folder(self._session.folder)
            arena.remove(memory, arena_name(worker.child.pid))
        self._act()

    def _is_innocent(self, worker: Worker) -> bool:
        """Whether no item was running, so that none is what ended the worker."""
        batches = self._scheduler.batches_of(worker.id)
        if not batches:
            return False
        first = batches[0]
        # What it was sent last it may not have read.
        idle = worker.link is not None and worker.link.unread and len(batches) == 1
        # It may have had the result of an item, which will run again.
        if first.call.retries and self._crew.is_innocent(worker, first.id):
            idle = True
        # If this goes on, something about the items may be what ends workers all the same.
        self._idle_deaths = self._idle_deaths + 1 if idle else 0
        return idle and self._idle_deaths <= _IDLE_DEATHS * self.settings.processes

    def crew_failed(self, error: BaseException) -> None:
        """There can be no workers: all calls, and those to come, raise `error`."""
        if self._ended is None or isinstance(self._ended, PoolClosed):
            self._ended = error
            self.terminate(error)

    def worker_sent(self, worker: Worker, frame: Frame) -> None:
        """A worker sent results, or could not load a batch, or gives back what it was lent."""
        if frame.kind & LENT:
            try:
                frame = self._lending.unpack(worker.id, frame)
            except OSError as error:
                text = "results of %s cannot be read, so that it is ended: %s"
                log(WARNING, text, worker.child.name, error)
                worker.kill()  # they will be computed again elsewhere
                return
            self._look_soon()
        if frame.kind == protocol.RETURN:
            self._lending.taken_back(worker.id, frame.body)
        elif frame.kind == protocol.BLIND:
            self._on_blind(worker, pickle.loads(frame.body))
        elif frame.kind == protocol.RESULTS:
            self._on_results(worker, frame)
        elif frame.kind == protocol.UNLOADABLE:
            self._on_unloadable(worker, frame)
        self._act()

    def _on_results(self, worker: Worker, frame: Frame) -> None:
        batch, returned, seconds, values, packed, counts, encoded = pickle.loads(frame.body)
        done = len(values) if values is not None else len(packed)
        size = len(frame.body) + sum(map(len, frame.buffers))
        self._seconds += seconds
        self._idle_deaths = 0
        settled = self._scheduler.progress(batch, done, seconds, returned)
        if settled is None:
            return
        call = self._calls[settled[0]]
        if size > done * self._scheduler.weight(call.id):
            self._scheduler.weigh(call.id, size / done)  # results take their room as well
        errors = {place: exceptions.decode(error) for place, error in encoded.items()}
        if values is None:
            values = []
            for place, buffers in enumerate(protocol.split(frame.buffers, counts)):
                try:
                    values.append(loads(packed[place], buffers))
                except BaseException as error:
                    text = f"the result of {call.describe(settled[1] + place)}"
                    errors[place] = SerializationError(f"{text} cannot be unpickled: {error!r}")
                    errors[place].__cause__ = error
                    values.append(None)
        if call.timeout is not None:
            worker.cancel_item_timer()
        self._deliver(call, settled[1], values, errors)

    def _on_unloadable(self, worker: Worker, frame: Frame) -> None:
        number, whole, text = pickle.loads(frame.body)
        found = [b for b in self._scheduler.batches_of(worker.id) if b.id == number]
        call = self._calls.get(found[0].call.id) if found else None
        if call is None:
            self._scheduler.unloadable(number)
            return
        (batch,) = found
        call.known_by.discard(worker.id)
        if batch.stop - batch.start > 1:
            self._scheduler.unloadable(number)
            return
        cause = exceptions.decode((whole, text))
        error = SerializationError(
            f"{call.describe(batch.start)}, or the function, cannot be unpickled by a worker: "
            f"{type(cause).__name__}: {cause}"
        )
        error.__cause__ = cause
        self._settle_failed(batch, error)

    def _on_blind(self, worker: Worker, number: int) -> None:
        self._blind.add(worker.id)
        for batch in self._scheduler.batches_of(worker.id):
            call = self._calls.get(batch.call.id)
            if batch.id == number and call is not None:
                call.known_by.discard(worker.id)
        self._scheduler.unloadable(number)

    # The end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls; workers end when what is there is done."""
        if self._ended is None:
            self._ended = PoolClosed("Pool not running")
        self.closing = True
        self._act()
        for call in list(self._calls.values()):
            self._feed(call)
        self._crew.dismiss()

    def terminate(self, error: BaseException | None = None) -> None:
        """End now: what is awaited fails, with `error` if there is one, and workers are ended."""
        if self._ended is None:
            self._ended = PoolClosed("Pool not running")
        self.closing = True
        reason = error or PoolTerminated("the pool was terminated")
        calls, self._calls = self._calls, {}
        for call in calls.values():
            self._scheduler.cancel(call.id)
            if call.source is not None:
                call.source.stop()
            call.sink.abort(reason)
        self._crew.terminate()

    def stats(self) -> PoolStats:
        """Return how the pool is."""
        workers = self._crew.workers.values()
        return PoolStats(
            processes=self.settings.processes,
            ready=sum(worker.up and not worker.stopping for worker in workers),
            waiting=self._scheduler.waiting,
            running=sum(batch.stop - batch.start for batch in self._scheduler.assigned()),
            done=self._done - self._failed,
            failed=self._failed,
            died=self._crew.died,
            seconds=self._seconds,
        )

    def processes(self) -> list[Process]:
        """Return the workers that have not ended."""
        return [worker.process for worker in self._crew.workers.values()]

    def pids(self) -> list[int]:
        """Return the process IDs of the workers that run."""
        children = [worker.child for worker in self._crew.workers.values()]
        return [child.pid for child in children if child.pid is not None]


def _kind(function: Any) -> Any:
    """Return what a function is known by from call to call, without keeping it alive."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return getattr(function, "__code__", None) or getattr(function, "__qualname__", None)
