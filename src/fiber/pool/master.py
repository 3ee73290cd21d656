"""The master of a pool: carries out what the scheduler decides.

    callers ─ submit, stream ─► Scheduler ─ Send ─► crew ─► workers
                                    ▲                         │
    results ◄─ deliver ─────────────┴── progress, down ◄──────┘

It keeps the calls; the crew keeps the workers. Everything here runs within the session's loop, by
whichever thread leads it.
"""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any

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
from fiber.pool.assignments import Batch, Fail, Finish, Retire, Send
from fiber.pool.calls import Call, Options, Sink
from fiber.pool.crew import Crew, Settings, Worker
from fiber.pool.feeding import Feeder
from fiber.pool.keeping import Keeping
from fiber.pool.lending import LENT
from fiber.pool.packer import Packer
from fiber.pool.results import IMapUnorderedIterator
from fiber.pool.scheduler import Scheduler
from fiber.pool.stats import PoolStats
from fiber.process import Process
from fiber.resources import Resources
from fiber.runtime import session
from fiber.runtime.logs import WARNING, log
from fiber.runtime.loop import Event
from fiber.wire import exceptions
from fiber.wire.framing import Frame
from fiber.wire.pickling import Packed, reason

if TYPE_CHECKING:
    from fiber.pool.constants import Constants
    from fiber.pool.elastic import Elastic

__all__ = ["Master"]

_IDLE_DEATHS = 10  # for each worker: so many in a row, without any result, are not by chance
_SMALL = 1 << 16  # bytes of a function that a worker may keep until it hears from us again


class Master:
    """See the module; the foreman of its crew.

    Attributes:
        loop: of the session.
        closing: whether it takes no more calls.
        packer: pickles what calls need.
    """

    def __init__(self, settings: Settings, resources: Resources) -> None:
        self.settings = settings
        self.loop = session.current().loop
        self.closing = False
        self._scheduler = Scheduler()
        self._calls: dict[int, Call] = {}
        self._call_ids = 0
        self._ended: BaseException | None = None  # why it takes no more calls
        self._acting = False
        self._idle_deaths = 0  # of workers in a row, without any result in between
        self._done = self._failed = 0
        self._seconds = 0.0
        self._crew = Crew(settings, resources, self)
        self._feeder = Feeder(self.loop, self._scheduler, self._crew, self._act)
        self._keeping = Keeping(
            session.current(),
            self._crew.workers,
            lambda: {batch.id for batch in self._scheduler.assigned()},
        )
        self.packer = Packer(lambda: self._crew.known_names)
        self._elastic: Elastic | None = None
        if settings.least < settings.processes:
            from fiber.pool.elastic import Elastic  # few pools are

            self._elastic = Elastic(self.loop, self._scheduler, self._crew, self._resized)

    def begin(self) -> None:
        """Start the workers."""
        with self.loop:
            self._crew.recruit()
            if self._elastic is not None:
                self._elastic.look()

    @property
    def gone(self) -> Event:
        """Set when the pool has ended and its last worker with it."""
        return self._crew.gone

    # Calls -------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise what the pool says to who wants to submit."""
        if self._ended is not None:
            raise self._ended
        if self.loop.closed:
            raise PoolError(
                "this pool's session has ended, or belongs to the process that this one was forked "
                "from; make a pool here"
            )

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
        call.items = items
        if constants is not None:
            call.constants = constants
        if keeps is not None:
            call.keeps = keeps
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
        self._feeder.begin(call, results, iterable)
        self._schedule(call, None, options)
        self._feeder.feed(call)

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
            kind=call.kind,
            open=items is None,
        )

    def consumed(self, call: int, items: int) -> None:
        """A stream's reader took `items` results."""
        self._feeder.consumed(call, items)

    def cancel(self, call: int) -> None:
        """Nobody waits for the call any more."""
        found = self._calls.pop(call, None)
        if found is not None:
            self._scheduler.cancel(call)
            self._forget(found)
            self._act()

    def _forget(self, call: Call) -> None:
        self._feeder.end(call)
        if call.known_by or call.constants is not None:
            self._tell_to_forget(call)
        if self.closing:
            self._crew.dismiss()

    def _tell_to_forget(self, call: Call) -> None:
        """Have the workers let go of a function: at once only if that frees a good deal.

        To wake a worker costs more than a short task; there may be a thousand.
        """
        body = pickle.dumps(call.id)
        size = len(call.packed.data) + sum(map(len, call.packed.buffers))
        told = call.constants.told if call.constants is not None else set()
        at_once = bool(told) or call.keeps is not None or size > _SMALL
        for number in call.known_by | told:
            worker = self._crew.workers[number]
            worker.knows.discard(call.id)
            if worker.link is not None:
                tell = worker.link.post if at_once else worker.link.enclose
                tell(protocol.FORGET, body)

    # What the scheduler asks for ---------------------------------------------------------------

    def _act(self) -> None:
        while self._feeder.dropped:
            self.cancel(self._feeder.dropped.popleft().call)
        self._keeping.give_back()
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
                        if action.needless:
                            self._crew.target -= 1
                        self._crew.retire(self._crew.workers[action.worker])
                        self._crew.recruit()
        finally:
            self._acting = False
        if self._elastic is not None:
            self._elastic.look()

    def _send(self, batch: Batch) -> None:
        call = self._calls.get(batch.call.id)
        if call is None:  # nobody wants it any more, since this was decided
            self._scheduler.unsent(batch.id)
            return
        worker = self._crew.workers[batch.worker]
        items = call.take(batch.start, batch.stop)
        handles: list[Any] = []
        session.lend_to(handles)
        try:
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
        finally:
            session.lend_to(None)
        if handles:
            self._keeping.keep(batch.id, handles)
        weight = (len(data) + sum(map(len, buffers))) / len(items)
        if call.constants is not None and worker.id not in call.constants.told:
            call.constants.told.add(worker.id)
            worker.knows.add(call.id)
            sources = [tuple(source) for source in call.constants.sources]
            worker.post(protocol.CONSTANTS, pickle.dumps((call.id, sources)))
        self._scheduler.weigh(call.id, weight)
        function, function_buffers = b"", ()
        if worker.id not in call.known_by:
            function, function_buffers, _ = call.packed  # type: ignore[assignment]
            if call.how != protocol.APPLY:
                call.known_by.add(worker.id)
                worker.knows.add(call.id)
        head = protocol.BATCH_HEAD.pack(
            batch.id,
            call.id,
            call.chunk,
            int(self._scheduler.hold * 1000),
            len(items),
            groups,
            call.how,
            batch.careful,
            len(function_buffers),
            len(function),
        )
        kind, apart = protocol.BATCH, [*function_buffers, *buffers]
        if apart:
            kind, apart = self._keeping.pack(worker, kind, apart)
        worker.latest = batch.id
        worker.post(kind, head + function + data, apart)
        if call.timeout is not None:
            when = monotonic() + call.timeout
            worker.item_timer = self.loop.call_at(when, lambda: self._expire(batch, call))

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
        self._feeder.feed(call)

    # What the crew tells -----------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether calls are not finished."""
        return bool(self._calls)

    def worker_up(self, worker: Worker) -> None:
        """A worker is ready."""
        self._scheduler.worker_up(worker.id, self.settings.maxtasksperchild)
        self._act()
        self._feeder.feed_all()

    def _resized(self) -> None:
        """The crew has got another size, or workers are to go."""
        self._feeder.feed_all()
        self._act()

    def worker_lost(self, worker: Worker) -> None:
        """A worker hung up."""
        self._scheduler.worker_lost(worker.id)

    def worker_down(self, worker: Worker) -> None:
        """A worker has ended: its work goes to others."""
        self._scheduler.worker_down(worker.id, charged=not self._is_innocent(worker))
        for id in worker.knows:
            call = self._calls.get(id)
            if call is not None:
                call.known_by.discard(worker.id)
                if call.constants is not None:
                    call.constants.told.discard(worker.id)
        self._keeping.down(worker)
        self._act()

    def _is_innocent(self, worker: Worker) -> bool:
        """Whether no item was running, so that none is what ended the worker."""
        batches = self._scheduler.batches_of(worker.id)
        if not batches:
            return False
        first = batches[0]
        # What it was sent last it may not have read.
        unread = worker.link is not None and worker.link.unread and len(batches) == 1
        idle = unread and not self._crew.was_at(worker, first.id)
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
                frame = self._keeping.unpack(worker, frame)
            except OSError as error:
                text = "results of %s cannot be read, so that it is ended: %s"
                log(WARNING, text, worker.child.name, error)
                worker.kill()  # they will be computed again elsewhere
                return
        if frame.kind == protocol.RESULTS:
            self._on_results(worker, frame)
        elif frame.kind == protocol.RETURN:
            self._keeping.taken_back(worker, frame)
        elif frame.kind == protocol.BLIND:
            self._keeping.is_blind(worker)
            self._on_unread(worker, pickle.loads(frame.body))
        elif frame.kind == protocol.STRANGE:
            self._on_unread(worker, pickle.loads(frame.body))
        elif frame.kind == protocol.UNLOADABLE:
            self._on_unloadable(worker, frame)
        del frame  # which has views of the results
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
            values = call.unpack(settled[1], packed, protocol.split(frame.buffers, counts), errors)
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
        if _is_lack_of_files(cause) and call.go_inline():
            self._scheduler.unloadable(number)
            return
        error = SerializationError(
            f"{call.describe(batch.start)}, or the function, cannot be unpickled by a worker: "
            f"{type(cause).__name__}: {cause}"
        )
        error.__cause__ = cause
        self._settle_failed(batch, error)

    def _on_unread(self, worker: Worker, number: int) -> None:
        """A worker could not even read a batch: it goes out again, with its function."""
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
        self.closing = self._feeder.closing = True
        self._act()
        self._feeder.feed_all()
        self._crew.dismiss()

    def terminate(self, error: BaseException | None = None) -> None:
        """End now: what is awaited fails, with `error` if there is one, and workers are ended."""
        if self._ended is None:
            self._ended = PoolClosed("Pool not running")
        self.closing = self._feeder.closing = True
        if self._elastic is not None:
            self._elastic.stop()
        reason = error or PoolTerminated("the pool was terminated")
        calls, self._calls = self._calls, {}
        for call in calls.values():
            self._feeder.end(call)
        for call in calls.values():
            self._scheduler.cancel(call.id)
            call.sink.abort(reason)
        self._crew.terminate()

    def stats(self) -> PoolStats:
        """Return how the pool is."""
        return PoolStats(
            processes=self._crew.target,
            ready=self._crew.up,
            waiting=self._scheduler.waiting,
            running=sum(batch.stop - batch.start for batch in self._scheduler.assigned()),
            done=self._done - self._failed,
            failed=self._failed,
            died=self._crew.died,
            seconds=self._seconds,
            minimum=self.settings.least,
            maximum=self.settings.processes,
        )

    def processes(self) -> list[Process]:
        """Return the workers that have not ended."""
        return [worker.process for worker in self._crew.workers.values()]

    def unheard(self) -> list[Event]:
        """Return what will be set when those workers have a process ID that are up without one."""
        workers = self._crew.workers.values()
        return [w.child.started for w in workers if w.up and not w.child.started.is_set]

    def pids(self) -> list[int]:
        """Return the process IDs of the workers that run."""
        children = [worker.child for worker in self._crew.workers.values()]
        return [child.pid for child in children if child.pid is not None]


def _is_lack_of_files(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
