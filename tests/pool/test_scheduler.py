"""The scheduler as a pure machine: a model of workers drives it, plain histories show its rules.

    rules of the model ─ events ─► Scheduler ─ actions ─► the model's books ─► checks

The model keeps its own books of who has which item and compares them after each event. A failing
run prints its whole history: the events as hypothesis repeats them, the actions as notes between.
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fiber.pool.assignments import Batch, Fail, Finish, Retire, Send
from fiber.pool.scheduler import Scheduler

Item = tuple[int, int]  # call and number


@dataclass(eq=False)
class ModelCall:
    """What the model knows of a call."""

    retries: int
    chunk: int
    single: bool
    open: bool
    total: int = 0
    settled: set[int] = field(default_factory=set)
    sent: set[int] = field(default_factory=set)
    deaths: Counter[int] = field(default_factory=Counter)
    cancelled: bool = False
    finished: bool = False


@dataclass(eq=False)
class ModelBatch:
    """A batch as its worker has it."""

    id: int
    call: int
    start: int
    stop: int
    careful: bool


@dataclass(eq=False)
class ModelWorker:
    """A worker with its batches, the running one first."""

    left: int | None
    batches: list[ModelBatch] = field(default_factory=list)
    begun: int = 0
    retired: bool = False
    ending: bool = False
    ages: int = 0

    @property
    def idle(self) -> bool:
        return not (self.batches or self.retired or self.ending)


class Pool(RuleBasedStateMachine):
    """Calls, workers and their mishaps, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.calls: dict[int, ModelCall] = {}
        self.workers: dict[int, ModelWorker] = {}
        self.past: list[int] = []  # batches that are over
        self.numbers = itertools.count(1)

    # Choosing ----------------------------------------------------------------------------------

    def batches(self) -> list[tuple[ModelWorker, ModelBatch]]:
        return [(w, b) for w in self.workers.values() for b in w.batches]

    def running(self) -> list[tuple[ModelWorker, ModelBatch]]:
        return [(w, w.batches[0]) for w in self.workers.values() if w.batches]

    def places(self) -> dict[Item, int]:
        """Return the worker of each item that one has; no item may be in two places."""
        found: dict[Item, int] = {}
        for number, worker in self.workers.items():
            for batch in worker.batches:
                for item in range(batch.start, batch.stop):
                    key = (batch.call, item)
                    assert key not in found, f"item {key} is at {found[key]} and at {number}"
                    found[key] = number
        return found

    # Calls -------------------------------------------------------------------------------------

    @initialize(workers=st.integers(0, 4), left=st.none() | st.integers(1, 12))
    def begin(self, workers: int, left: int | None) -> None:
        for _ in range(workers):
            self.worker_up(left)

    @rule(
        items=st.integers(0, 30) | st.integers(30, 100),
        retries=st.integers(0, 3),
        chunk=st.sampled_from([1, 1, 1, 2, 7, 20]),
        single=st.sampled_from([False, False, False, True]),
        cost=st.sampled_from([None, None, 1e-6, 1e-4, 1e-3, 0.1]),
    )
    def submit(
        self, items: int, retries: int, chunk: int, single: bool, cost: float | None
    ) -> None:
        number = next(self.numbers)
        self.calls[number] = ModelCall(retries, chunk, single, False, items)
        self.scheduler.submit(number, items, retries=retries, chunk=chunk, single=single, cost=cost)
        self.carry_out()

    @rule(
        retries=st.integers(0, 2),
        chunk=st.sampled_from([1, 1, 5]),
        cost=st.sampled_from([None, 1e-5, 0.1]),
    )
    def submit_open(self, retries: int, chunk: int, cost: float | None) -> None:
        number = next(self.numbers)
        self.calls[number] = ModelCall(retries, chunk, False, True)
        self.scheduler.submit(number, 0, retries=retries, chunk=chunk, cost=cost, open=True)
        self.carry_out()

    def open_calls(self) -> list[int]:
        return [n for n, call in self.calls.items() if call.open and not call.cancelled]

    @precondition(lambda self: bool(self.open_calls()))
    @rule(data=st.data(), chunks=st.integers(0, 15))
    def extend(self, data: st.DataObject, chunks: int) -> None:
        number = data.draw(st.sampled_from(self.open_calls()))
        call = self.calls[number]
        call.total += chunks * call.chunk
        self.scheduler.extend(number, chunks * call.chunk)
        self.carry_out()

    @precondition(lambda self: bool(self.open_calls()))
    @rule(data=st.data(), last=st.integers(0, 4))
    def complete(self, data: st.DataObject, last: int) -> None:
        number = data.draw(st.sampled_from(self.open_calls()))
        call = self.calls[number]
        call.total += last
        self.scheduler.extend(number, last)
        call.open = False
        self.scheduler.complete(number)
        self.carry_out()

    @precondition(lambda self: bool(self.calls))
    @rule(data=st.data(), extend=st.booleans())
    def cancel(self, data: st.DataObject, extend: bool) -> None:
        number = data.draw(st.sampled_from(list(self.calls)))
        self.calls[number].cancelled |= not self.calls[number].finished
        self.scheduler.cancel(number)
        if extend:  # what comes too late for the call has no effect
            self.scheduler.extend(number, 3)
            self.scheduler.complete(number)
        self.carry_out()

    @precondition(lambda self: bool(self.calls))
    @rule(data=st.data(), size=st.floats(1, 1e7))
    def weigh(self, data: st.DataObject, size: float) -> None:
        self.scheduler.weigh(data.draw(st.sampled_from(list(self.calls))), size)

    # Workers -----------------------------------------------------------------------------------

    @precondition(lambda self: len(self.workers) < 6)
    @rule(left=st.none() | st.integers(1, 12))
    def worker_up(self, left: int | None) -> None:
        number = next(self.numbers)
        self.workers[number] = ModelWorker(left)
        self.scheduler.worker_up(number, left)
        self.carry_out()

    @precondition(lambda self: bool(self.workers))
    @rule(data=st.data(), charged=st.sampled_from([True, True, False]))
    def worker_down(self, data: st.DataObject, charged: bool) -> None:
        number = data.draw(st.sampled_from(list(self.workers)))
        worker = self.workers.pop(number)
        if worker.batches and charged:
            first = worker.batches[0]
            # A careful batch is reported item by item; of others nobody knows how far they are.
            last = first.start if first.careful else first.stop - 1
            item = data.draw(st.integers(first.start, last), label="it was running")
            self.calls[first.call].deaths[item] += 1
        self.past += [batch.id for batch in worker.batches]
        self.scheduler.worker_down(number, charged=charged)
        self.carry_out()

    @precondition(lambda self: bool(self.running()))
    @rule(data=st.data(), seconds=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2, 1.0]))
    def progress(self, data: st.DataObject, seconds: float) -> None:
        worker, batch = data.draw(st.sampled_from(self.running()))
        size = batch.stop - batch.start
        done = 1 if batch.careful else data.draw(st.integers(0, size), label="done")
        most = 0 if batch.careful else size - done
        self.report(worker, batch, done, data.draw(st.integers(0, most), label="back"), seconds)

    @precondition(lambda self: bool(self.running()))
    @rule(data=st.data(), seconds=st.sampled_from([1e-6, 1e-4, 1e-2]))
    def progress_to_the_end(self, data: st.DataObject, seconds: float) -> None:
        worker, batch = data.draw(st.sampled_from(self.running()))
        self.report(worker, batch, batch.stop - batch.start, 0, seconds)

    @precondition(lambda self: bool(self.running()))
    @rule(data=st.data())
    def progress_of_a_call_that_is_just_cancelled(self, data: st.DataObject) -> None:
        """What was to be sent is not: nobody wants it any more."""
        worker, batch = data.draw(st.sampled_from(self.running()))
        self.report(worker, batch, batch.stop - batch.start, 0, 1e-4, cancel=True)

    @precondition(lambda self: any(len(w.batches) > 1 for w in self.workers.values()))
    @rule(data=st.data())
    def hand_back_what_waits(self, data: st.DataObject) -> None:
        crowded = [w for w in self.workers.values() if len(w.batches) > 1]
        worker = data.draw(st.sampled_from(crowded))
        batch = worker.batches[1]
        self.report(worker, batch, 0, batch.stop - batch.start, 0.0)

    def report(
        self,
        worker: ModelWorker,
        batch: ModelBatch,
        done: int,
        returned: int,
        seconds: float,
        *,
        cancel: bool = False,
    ) -> None:
        call = self.calls[batch.call]
        start = batch.start
        batch.start += done
        batch.stop -= returned
        worker.begun -= returned
        if batch.start == batch.stop:
            worker.batches.remove(batch)
            self.past.append(batch.id)
        settled = self.scheduler.progress(batch.id, done, seconds, returned)
        if done and not call.cancelled:
            assert settled == (batch.call, start, start + done)
            self.settle(batch.call, range(start, start + done))
        else:
            assert settled is None
        if cancel:
            call.cancelled |= call.open or len(call.settled) < call.total
            self.scheduler.cancel(batch.call)
        self.carry_out(cancelled=cancel)

    @precondition(lambda self: bool(self.batches()))
    @rule(data=st.data())
    def unloadable(self, data: st.DataObject) -> None:
        worker, batch = data.draw(st.sampled_from(self.batches()))
        self.calls[batch.call].single = True
        worker.batches.remove(batch)
        worker.begun -= batch.stop - batch.start
        self.past.append(batch.id)
        self.scheduler.unloadable(batch.id)
        self.carry_out()

    def alone(self) -> list[tuple[ModelWorker, ModelBatch]]:
        return [(w, b) for w, b in self.running() if b.stop - b.start == 1 and len(w.batches) == 1]

    @precondition(lambda self: bool(self.alone()))
    @rule(data=st.data(), worker_ends=st.booleans())
    def fail(self, data: st.DataObject, worker_ends: bool) -> None:
        worker, batch = data.draw(st.sampled_from(self.alone()))
        worker.batches.remove(batch)
        worker.ending |= worker_ends
        self.past.append(batch.id)
        failed = self.scheduler.fail(batch.id, worker_ends=worker_ends)
        if self.calls[batch.call].cancelled:
            assert failed is None
        else:
            assert failed == (batch.call, batch.start)
            self.settle(batch.call, [batch.start])
        self.carry_out()

    @precondition(lambda self: bool(self.workers))
    @rule(data=st.data())
    def worker_lost(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(list(self.workers)))
        self.workers[number].ending = True
        self.scheduler.worker_lost(number)
        self.carry_out()

    @rule(ages=st.integers(1, 3), spare=st.integers(0, 3))
    def age(self, ages: int, spare: int) -> None:
        for worker in self.workers.values():
            worker.ages += worker.idle
        old = {n for n, worker in self.workers.items() if worker.idle and worker.ages >= ages}
        self.scheduler.age(ages, spare)
        self.carry_out()
        gone = {number for number in old if self.workers[number].retired}
        assert len(gone) == min(len(old), spare)

    # What comes twice, or too late ---------------------------------------------------------------

    @precondition(lambda self: bool(self.past))
    @rule(data=st.data(), done=st.integers(0, 3), returned=st.integers(0, 3))
    def late(self, data: st.DataObject, done: int, returned: int) -> None:
        batch = data.draw(st.sampled_from(self.past))
        assert self.scheduler.progress(batch, done, 0.1, returned) is None
        assert self.scheduler.fail(batch) is None
        self.scheduler.unloadable(batch)
        assert self.scheduler.actions() == []

    @precondition(lambda self: bool(self.batches()))
    @rule(data=st.data(), more=st.integers(1, 5))
    def too_much(self, data: st.DataObject, more: int) -> None:
        _, batch = data.draw(st.sampled_from(self.batches()))
        done = batch.stop - batch.start + more
        assert self.scheduler.progress(batch.id, done, 0.1) is None
        assert self.scheduler.actions() == []

    # The model's books -------------------------------------------------------------------------

    def settle(self, number: int, items: range | list[int]) -> None:
        call = self.calls[number]
        assert not call.finished
        for item in items:
            assert item < call.total
            assert item not in call.settled, f"item {item} of call {number} settled twice"
            call.settled.add(item)

    def carry_out(self, *, cancelled: bool = False) -> None:
        """Do what the scheduler wants; a call was `cancelled` in between, or not."""
        while actions := self.scheduler.actions():
            for action in actions:
                note(f"    {describe(action)}")
                if isinstance(action, Send) and cancelled and not self.is_wanted(action.batch):
                    self.past.append(action.batch.id)
                    self.scheduler.unsent(action.batch.id)
                elif isinstance(action, Send):
                    self.sent(action.batch)
                elif isinstance(action, Fail):
                    call = self.calls[action.call]
                    assert not call.cancelled
                    assert action.attempts == call.retries + 1
                    assert call.deaths[action.item] >= action.attempts, (
                        "an innocent item was charged"
                    )
                    self.settle(action.call, [action.item])
                elif isinstance(action, Finish):
                    call = self.calls[action.call]
                    assert not call.finished
                    assert not call.cancelled
                    assert not call.open
                    assert len(call.settled) == call.total
                    call.finished = True
                else:
                    worker = self.workers[action.worker]
                    assert not worker.batches
                    assert not worker.retired
                    if action.needless:
                        assert worker.idle
                    else:
                        assert worker.left == worker.begun
                    worker.retired = True

    def is_wanted(self, batch: Batch) -> bool:
        return not self.calls[batch.call.id].cancelled

    def sent(self, batch: Batch) -> None:
        # A batch whose worker died within the same event would be sent to nobody.
        worker, number = self.workers[batch.worker], batch.call.id
        call = self.calls[number]
        items = range(batch.start, batch.stop)
        assert items
        assert not call.cancelled
        assert not call.finished
        assert not worker.retired
        assert not worker.ending
        assert batch.stop <= call.total
        assert call.settled.isdisjoint(items)
        allowed = None if worker.left is None else worker.left - worker.begun
        if not call.single:
            self.check_chunks(call, batch, allowed)
        call.sent.update(items)
        worker.begun += len(items)
        assert worker.left is None or worker.begun <= worker.left
        if call.single:
            assert len(items) == 1
            assert not worker.batches
        worker.ages = 0
        worker.batches.append(ModelBatch(batch.id, number, batch.start, batch.stop, batch.careful))
        assert len(worker.batches) <= 2
        self.places()

    def check_chunks(self, call: ModelCall, batch: Batch, allowed: int | None) -> None:
        """A chunk of which nothing was sent yet goes out whole."""
        for first in range(batch.start - batch.start % call.chunk, batch.stop, call.chunk):
            chunk = range(first, min(first + call.chunk, call.total))
            if call.sent.isdisjoint(chunk) and batch.stop - batch.start != allowed:
                assert batch.start <= chunk.start
                assert chunk.stop <= batch.stop

    # What holds at any time --------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        theirs = {
            number: [(b.id, b.call.id, b.start, b.stop) for b in self.scheduler.batches_of(number)]
            for number in self.workers
        }
        ours = {
            number: [(b.id, b.call, b.start, b.stop) for b in worker.batches]
            for number, worker in self.workers.items()
        }
        assert theirs == ours
        assert {b.id for b in self.scheduler.assigned()} == {b.id for _, b in self.batches()}

    @invariant()
    def all_who_are_done_are_finished(self) -> None:
        for number, call in self.calls.items():
            done = not call.open and len(call.settled) == call.total
            assert call.finished == (done and not call.cancelled), f"call {number}"

    @invariant()
    def nobody_idles_while_work_waits(self) -> None:
        places = self.places()
        live = [n for n, call in self.calls.items() if not (call.cancelled or call.finished)]
        at_workers = Counter(number for number, _ in places)
        waiting = sum(
            self.calls[n].total - len(self.calls[n].settled) - at_workers[n] for n in live
        )
        assert self.scheduler.waiting == waiting
        assert self.scheduler.unfinished == bool(live)
        idle = [number for number, worker in self.workers.items() if worker.idle]
        assert not (waiting and idle), f"{waiting} items wait while workers {idle} are idle"
        assert self.scheduler.short == bool(waiting)
        assert 0 < self.scheduler.shortage(0.1) <= waiting if waiting else True

    def teardown(self) -> None:
        """Let all workers finish: then every call is finished too."""
        if sys.exc_info()[0] is not None:
            return
        for number in self.open_calls():
            self.calls[number].open = False
            self.scheduler.complete(number)
        for number, worker in list(self.workers.items()):
            if worker.ending:
                del self.workers[number]
                self.scheduler.worker_down(number, charged=False)
        self.carry_out()
        self.worker_up(None)
        while busy := self.running():
            worker, batch = busy[0]
            self.report(worker, batch, batch.stop - batch.start, 0, 1e-5)
        assert not self.scheduler.unfinished
        assert all(call.finished or call.cancelled for call in self.calls.values())


def describe(action: Send | Fail | Finish | Retire) -> str:
    """Return one line of a printed history."""
    if isinstance(action, Send):
        b = action.batch
        careful = ", carefully" if b.careful else ""
        return f"Send batch {b.id}: items {b.start}-{b.stop} of {b.call.id} to {b.worker}{careful}"
    return repr(action)


TestPool = Pool.TestCase
TestPool.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    phases=[phase for phase in Phase if phase is not Phase.explain],  # it traces each line
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# Plain histories --------------------------------------------------------------------------------


class Simulation:
    """Workers that take as long as `cost(item)` says, in a time of their own.

    Attributes:
        now: seconds since the begin.
        sent: all batches as (time, worker, start, stop, careful).
        deaths, failed: workers that a poison item killed, and the items that failed by it.
    """

    LATENCY = 1e-4

    def __init__(
        self, workers: int, cost: Callable[[int], float], poison: frozenset[int] = frozenset()
    ) -> None:
        self.scheduler = Scheduler()
        self.now = 0.0
        self.sent: list[tuple[float, int, int, int, bool]] = []
        self.deaths = 0
        self.failed: list[int] = []
        self.done: list[int] = []
        self.finished = False
        self.most_batches = 0
        self._cost = cost
        self._poison = poison
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._free_at: dict[int, float] = {}
        self._workers = itertools.count(1)
        for _ in range(workers):
            self._start()

    def _start(self) -> None:
        number = next(self._workers)
        self._free_at[number] = self.now
        self.scheduler.worker_up(number)

    def _at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), call))

    def run(self) -> Simulation:
        """Go on until nothing happens any more."""
        self._act()
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call()
            self._act()
        return self

    def _act(self) -> None:
        for action in self.scheduler.actions():
            if isinstance(action, Send):
                self._run_batch(action.batch)
            elif isinstance(action, Fail):
                self.failed.append(action.item)
            elif isinstance(action, Finish):
                assert not self.finished
                self.finished = True

    def _run_batch(self, batch: Batch) -> None:
        worker, items = batch.worker, range(batch.start, batch.stop)
        self.sent.append((self.now, worker, batch.start, batch.stop, batch.careful))
        self.most_batches = max(self.most_batches, len(self.scheduler.batches_of(worker)))
        clock = began = max(self._free_at[worker], self.now + self.LATENCY)
        for item in items:
            if item in self._poison:
                self._at(clock + self.LATENCY, lambda: self._die(worker))
                return
            clock += self._cost(item)
            if batch.careful:
                self._report(batch, clock, 1, 0.0)
        self._free_at[worker] = clock
        if not batch.careful:
            self._report(batch, clock, len(items), clock - began)

    def _report(self, batch: Batch, clock: float, done: int, seconds: float) -> None:
        def report() -> None:
            settled = self.scheduler.progress(batch.id, done, seconds)
            if settled is not None:
                self.done += range(*settled[1:])

        self._at(clock + self.LATENCY, report)

    def _die(self, worker: int) -> None:
        if self.scheduler.batches_of(worker):
            self.deaths += 1
            self.scheduler.worker_down(worker)
            self._start()


def simulate(
    items: int,
    cost: float | Callable[[int], float],
    *,
    workers: int = 2,
    poison: frozenset[int] = frozenset(),
    retries: int = 2,
    chunk: int = 1,
    single: bool = False,
    known: float | None = None,
) -> Simulation:
    simulation = Simulation(workers, cost if callable(cost) else lambda item: cost, poison)
    simulation.scheduler.submit(1, items, retries=retries, chunk=chunk, single=single, cost=known)
    simulation.run()
    assert simulation.finished
    assert sorted(simulation.done + simulation.failed) == list(range(items))
    return simulation


def sizes(simulation: Simulation) -> list[int]:
    return [stop - start for _, _, start, stop, _ in simulation.sent]


@pytest.mark.parametrize("cost", [1e-6, 1e-5, 1e-4, 1e-3])
def test_a_batch_holds_some_milliseconds_of_work(cost: float) -> None:
    typical = sorted(sizes(simulate(200_000, cost)))[-5]
    assert 0.002 <= typical * cost <= 0.04


def test_long_items_go_out_one_by_one() -> None:
    assert set(sizes(simulate(50, 0.1))) == {1}


def test_the_first_batches_of_an_unknown_function_are_small() -> None:
    first = sizes(simulate(10_000, 1e-6))[:8]
    assert first[:2] == [1, 1]
    assert all(size <= 8 * max(first[:place]) for place, size in enumerate(first) if place)


def test_what_is_soon_done_is_not_cut_up_for_all_of_a_thousand_workers() -> None:
    few, many = (
        len(sizes(simulate(200_000, 2e-7, workers=workers, known=2e-7))) for workers in (2, 1024)
    )
    assert many < 2 * few + 20


def test_long_items_are_for_all_of_a_thousand_workers() -> None:
    simulation = simulate(1_024, 0.05, workers=1_024, known=0.05)
    assert set(sizes(simulation)) == {1}
    assert len({worker for _, worker, *_ in simulation.sent}) == 1_024


def test_many_workers_get_more_work_at_a_time_so_that_the_master_keeps_up() -> None:
    few, many = (
        sizes(simulate(20_000, 0.005, workers=workers, known=0.005)) for workers in (4, 256)
    )
    assert max(few) == 8
    assert 10 <= max(many) <= 30
    assert set(many[-256:]) == {1}  # and at the end they share what is left all the same


def test_a_worker_with_more_work_may_take_longer_before_it_gives_back() -> None:
    scheduler = Scheduler()
    scheduler.worker_up(1)
    alone = scheduler.hold
    for worker in range(2, 1_025):
        scheduler.worker_up(worker)
    assert 0.02 < alone < 0.1 < scheduler.hold < 5


def test_a_function_that_is_known_from_before_starts_with_full_batches() -> None:
    assert sizes(simulate(100_000, 1e-5, known=1e-5))[0] >= 100


def test_batches_shrink_towards_the_end_of_a_call() -> None:
    simulation = simulate(40_000, 1e-4, workers=8, known=1e-4)
    last = sizes(simulation)[-8:]
    assert max(last) < max(sizes(simulation)) / 2
    ideal = 40_000 * 1e-4 / 8
    assert simulation.now < 1.05 * ideal + 0.005


def test_short_items_are_sent_ahead() -> None:
    assert simulate(1_000, 1e-3).most_batches == 2


def test_long_items_are_not_sent_ahead() -> None:
    assert simulate(20, 0.1).most_batches == 1


def test_items_with_a_time_limit_are_alone_at_their_worker() -> None:
    simulation = simulate(200, 1e-4, single=True)
    assert set(sizes(simulation)) == {1}
    assert simulation.most_batches == 1


def test_the_last_items_are_not_sent_ahead_to_a_busy_worker() -> None:
    for now, worker, *_ in (simulation := simulate(101, 0.01, workers=4)).sent[-3:]:
        before = [w for when, w, *_ in simulation.sent if when == now]
        assert before.count(worker) == 1


@pytest.mark.parametrize("retries", [1, 2, 5])
@pytest.mark.parametrize("place", [0, 37, 99])
def test_a_poison_item_in_a_batch_costs_one_death_more_than_it_has_attempts(
    retries: int, place: int
) -> None:
    simulation = Simulation(1, lambda item: 1e-6, frozenset({place}))
    simulation.scheduler.submit(1, 100, retries=retries, chunk=100)
    simulation.run()
    assert simulation.deaths == retries + 2
    assert simulation.failed == [place]
    assert sorted(simulation.done) == [item for item in range(100) if item != place]


def test_a_poison_item_alone_in_its_batch_is_known_at_once() -> None:
    simulation = simulate(1, 1e-6, workers=1, poison=frozenset({0}))
    assert simulation.deaths == 3
    assert simulation.failed == [0]


def test_many_poison_items_fail_alone() -> None:
    poison = frozenset(range(0, 5_000, 250))
    simulation = simulate(5_000, 1e-5, workers=4, poison=poison, retries=1)
    assert set(simulation.failed) == poison
    assert simulation.deaths <= 4 * len(poison)


def test_a_chunk_size_is_honoured() -> None:
    for size in (1, 3, 250, 5_000):
        batches = simulate(1_000, 1e-4, chunk=size).sent
        for _, _, start, stop, _ in batches:
            assert start % size == 0
            assert stop % size == 0 or stop == 1_000


def test_a_long_item_does_not_hold_back_short_ones() -> None:
    simulation = simulate(3_000, lambda item: 10.0 if item == 500 else 0.001, workers=4)
    assert simulation.now < 10.3


# Single events ----------------------------------------------------------------------------------


def sent_by(scheduler: Scheduler) -> list[tuple[int, int, int, bool]]:
    """Return what was sent since the last time: worker, start, stop, careful."""
    return [
        (action.batch.worker, action.batch.start, action.batch.stop, action.batch.careful)
        for action in scheduler.actions()
        if isinstance(action, Send)
    ]


def test_there_is_no_shortage_while_somebody_is_free() -> None:
    scheduler = Scheduler()
    scheduler.worker_up(1)
    scheduler.worker_up(2)
    scheduler.submit(1, 2, retries=2)
    assert not scheduler.short
    assert scheduler.shortage(0.1) == 0
    scheduler.submit(2, 5, retries=2)
    assert scheduler.short
    assert scheduler.shortage(0.1) == 5


@pytest.mark.parametrize(("cost", "more"), [(None, 100), (10.0, 100), (0.01, 10), (1e-6, 1)])
def test_short_items_call_for_fewer_workers(cost: float | None, more: int) -> None:
    scheduler = Scheduler()
    scheduler.submit(1, 100, retries=2, cost=cost)
    assert scheduler.shortage(0.1) == more


def test_a_chunk_is_for_one_worker() -> None:
    scheduler = Scheduler()
    scheduler.submit(1, 100, retries=2, chunk=30)
    assert scheduler.shortage(0.1) == 4


def test_only_who_was_idle_for_long_retires() -> None:
    scheduler = Scheduler()
    for worker in range(1, 5):
        scheduler.worker_up(worker)
    scheduler.age(2, 4)
    scheduler.submit(1, 1, retries=2)
    [send] = scheduler.actions()
    assert isinstance(send, Send)
    scheduler.age(2, 2)
    others = sorted({1, 2, 3, 4} - {send.batch.worker})
    assert scheduler.actions() == [Retire(worker, needless=True) for worker in others[:2]]
    scheduler.progress(send.batch.id, 1, 0.1)
    scheduler.age(2, 4)
    assert scheduler.actions() == [Finish(1), Retire(others[2], needless=True)]
    scheduler.age(2, 4)
    assert scheduler.actions() == [Retire(send.batch.worker, needless=True)]
    scheduler.submit(2, 1, retries=2)
    assert scheduler.actions() == []


def test_a_call_without_items_finishes_at_once() -> None:
    scheduler = Scheduler()
    scheduler.submit(1, 0, retries=2)
    assert scheduler.actions() == [Finish(1)]


def test_an_open_call_finishes_when_it_is_complete() -> None:
    scheduler = Scheduler()
    scheduler.worker_up(1)
    scheduler.submit(1, 1, retries=2, open=True)
    [send] = scheduler.actions()
    assert isinstance(send, Send)
    scheduler.progress(send.batch.id, 1, 0.1)
    assert scheduler.actions() == []
    scheduler.complete(1)
    assert scheduler.actions() == [Finish(1)]


def test_a_report_after_the_death_of_its_worker_counts_for_nothing() -> None:
    scheduler = Scheduler()
    scheduler.worker_up(1)
    scheduler.submit(1, 1, retries=2)
    [send] = scheduler.actions()
    assert isinstance(send, Send)
    scheduler.worker_down(1)
    assert scheduler.progress(send.batch.id, 1, 0.1) is None
    scheduler.worker_up(2)
    assert sent_by(scheduler) == [(2, 0, 1, True)]


def test_a_worker_that_was_taken_away_costs_no_attempt() -> None:
    scheduler = Scheduler()
    scheduler.submit(1, 1, retries=0)
    for worker in range(1, 20):
        scheduler.worker_up(worker)
        assert len(sent_by(scheduler)) == 1
        scheduler.worker_down(worker, charged=False)
    assert scheduler.actions() == []


@pytest.mark.parametrize("place", [0, 37, 99])
def test_an_item_that_may_run_but_once_costs_one_death(place: int) -> None:
    simulation = Simulation(1, lambda item: 1e-6, frozenset({place}))
    simulation.scheduler.submit(1, 100, retries=0, chunk=100)
    simulation.run()
    assert simulation.deaths == 1
    assert simulation.failed == [place]
    assert sorted(simulation.done) == [item for item in range(100) if item != place]


def test_a_batch_that_waited_behind_the_deadly_one_is_not_suspect() -> None:
    scheduler = Scheduler()
    scheduler.worker_up(1)
    scheduler.submit(1, 100, retries=1, cost=1e-3)
    first, second = sent_by(scheduler)
    scheduler.worker_down(1)
    scheduler.worker_up(2)
    again = sent_by(scheduler)
    assert again[0] == (2, first[1], first[2], True)
    for batch in scheduler.batches_of(2):
        scheduler.progress(batch.id, batch.stop - batch.start, 1e-3)
    assert sent_by(scheduler)[0] == (2, second[1], second[2], False)


def test_a_worker_takes_no_more_than_it_may_and_retires() -> None:
    scheduler = Scheduler()
    scheduler.submit(1, 100, retries=2, chunk=30)
    scheduler.worker_up(1, 20)
    assert sent_by(scheduler) == [(1, 0, 20, False)]
    [batch] = scheduler.batches_of(1)
    scheduler.progress(batch.id, 20, 0.1)
    assert scheduler.actions() == [Retire(1)]
    scheduler.worker_up(2, 20)
    assert sent_by(scheduler) == [(2, 20, 30, False)]


def test_chunks_stay_whole_behind_one_that_did_not_fit() -> None:
    scheduler = Scheduler()
    scheduler.worker_up(1)
    scheduler.worker_up(2, 3)
    scheduler.submit(1, 100, retries=2, chunk=10, cost=4e-3)
    assert {(start, stop) for _, start, stop, _ in sent_by(scheduler)} <= {
        (0, 3),
        (3, 10),
        (10, 20),
        (20, 30),
        (0, 10),
        (10, 13),
        (13, 20),
    }


def test_a_worker_whose_end_is_near_gets_nothing_more() -> None:
    scheduler = Scheduler()
    scheduler.submit(1, 10, retries=2, cost=0.001)
    scheduler.worker_up(1)
    scheduler.worker_lost(1)
    scheduler.actions()
    for batch in scheduler.batches_of(1):
        scheduler.progress(batch.id, batch.stop - batch.start, 0.001)
    assert sent_by(scheduler) == []
    scheduler.worker_down(1)
    scheduler.worker_up(2)
    assert sent_by(scheduler)


def test_items_that_come_back_may_be_replaced_by_others() -> None:
    scheduler = Scheduler()
    scheduler.submit(1, 10, retries=2, chunk=10)
    scheduler.worker_up(1, 10)
    [batch] = [action.batch for action in scheduler.actions() if isinstance(action, Send)]
    assert scheduler.progress(batch.id, 1, 0.0, 9) == (1, 0, 1)
    assert sum(stop - start for _, start, stop, _ in sent_by(scheduler)) == 9


def test_items_that_cannot_be_loaded_together_go_out_one_by_one() -> None:
    scheduler = Scheduler()
    scheduler.submit(1, 10, retries=2, chunk=10)
    scheduler.worker_up(1)
    scheduler.unloadable(scheduler.batches_of(1)[0].id)
    scheduler.actions()
    seen = []
    while batches := scheduler.batches_of(1):
        [batch] = batches
        seen.append((batch.start, batch.stop))
        scheduler.progress(batch.id, 1, 1e-5)
    assert seen == [(item, item + 1) for item in range(10)]


def test_suspects_that_cannot_be_loaded_together_go_out_one_by_one() -> None:
    scheduler = Scheduler()
    scheduler.submit(1, 10, retries=2, chunk=10)
    scheduler.worker_up(1)
    scheduler.worker_down(1)
    scheduler.worker_up(2)
    [batch] = scheduler.batches_of(2)
    assert batch.careful
    scheduler.unloadable(batch.id)
    [batch] = scheduler.batches_of(2)
    assert (batch.start, batch.stop) == (0, 1)


def test_a_cancelled_call_gives_way_to_the_next() -> None:
    scheduler = Scheduler()
    scheduler.worker_up(1)
    scheduler.submit(1, 1_000, retries=2)
    scheduler.submit(2, 1, retries=2)
    [send] = scheduler.actions()
    assert isinstance(send, Send)
    scheduler.cancel(1)
    assert scheduler.waiting == 1
    assert scheduler.progress(send.batch.id, 1, 0.1) is None
    [send] = scheduler.actions()
    assert isinstance(send, Send)
    assert send.batch.call.id == 2
