"""Locks, semaphores, conditions and events: as multiprocessing has them, and among processes.

What can be said of one process is said of multiprocessing's own objects as well, which shows that
the tests ask for what is there.
"""

from __future__ import annotations

import gc
import inspect
import multiprocessing
import multiprocessing.synchronize
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.objects import actors
from tests.waiting import until

import fiber
import fiber.synchronize

DEADLINE = 20.0
MOMENT = 0.15  # seconds, of a wait that shall run out
LOCKS = ["Lock", "RLock", "Semaphore", "BoundedSemaphore"]
multiprocessing.Barrier(1)  # its shared memory stays for good: let it be there before any test
CONDITIONS: list[Callable[[Any], Any]] = [
    lambda mp: mp.Condition(),
    lambda mp: mp.Condition(mp.RLock()),
    lambda mp: mp.Condition(mp.Lock()),
    lambda mp: mp.Condition(lock=None),
]


@pytest.fixture(params=[fiber, multiprocessing], ids=["fiber", "multiprocessing"])
def mp(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield request.param
    gc.collect()


def took_about(seconds: float, began: float) -> bool:
    return seconds * 0.95 <= time.monotonic() - began < seconds + 5


# In one process --------------------------------------------------------------------------------


AT_ONCE: list[Callable[[Any], bool]] = [
    lambda lock: lock.acquire(False),
    lambda lock: lock.acquire(block=False),
    lambda lock: lock.acquire(False, 60),
    lambda lock: lock.acquire(True, 0),
    lambda lock: lock.acquire(timeout=-1),
]


@pytest.mark.parametrize("kind", LOCKS)
def test_acquire(mp: Any, kind: str, aside: Callable[..., Any]) -> None:
    lock = getattr(mp, kind)()
    assert lock.acquire() is True
    began = time.monotonic()
    for acquire in AT_ONCE:  # in a thread of its own, that RLock says no as well
        assert aside(acquire, lock).result() is False
    assert time.monotonic() - began < 5
    lock.release()
    for acquire in (*AT_ONCE, lambda lock: lock.acquire(True, None)):
        assert acquire(lock) is True
        lock.release()


@pytest.mark.parametrize("kind", LOCKS)
def test_acquire_waits(mp: Any, kind: str, aside: Callable[..., Any]) -> None:
    lock = getattr(mp, kind)()
    lock.acquire()
    began = time.monotonic()
    assert aside(lock.acquire, True, MOMENT).result() is False
    assert took_about(MOMENT, began)

    def acquire_and_release(*args: Any) -> Any:
        got = lock.acquire(*args)
        lock.release()
        return got

    waiting = [aside(acquire_and_release, *args) for args in ((), (True, None), (True, DEADLINE))]
    time.sleep(0.02)
    assert all(each.runs for each in waiting)
    lock.release()
    assert [each.result() for each in waiting] == [True, True, True]


@pytest.mark.parametrize("kind", [*LOCKS, "Condition"])
def test_context_manager(mp: Any, kind: str, aside: Callable[..., Any]) -> None:
    lock = getattr(mp, kind)()
    with lock as got:
        assert got is True
        assert aside(lock.acquire, False).result() is False
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    assert lock.acquire(False)
    lock.release()


def test_released_too_often(mp: Any) -> None:
    for kind in ("Lock", "BoundedSemaphore"):
        with pytest.raises(ValueError, match="semaphore or lock released too many times"):
            getattr(mp, kind)().release()
    for lock in (mp.RLock(), mp.Condition()):
        with pytest.raises(AssertionError, match="not owned by thread"):
            lock.release()
    lock = mp.Lock()
    with pytest.raises(ValueError, match="too many times"), lock:
        lock.release()


def test_a_lock_can_be_released_by_another_thread(mp: Any, aside: Callable[..., Any]) -> None:
    lock = mp.Lock()
    aside(lock.acquire).result()
    assert not lock.acquire(False)
    lock.release()
    assert lock.acquire(False)
    lock.release()


def test_an_rlock_is_its_thread_s(mp: Any, aside: Callable[..., Any]) -> None:
    lock = mp.RLock()
    for _ in range(3):
        assert lock.acquire(False)
    for _ in range(3):
        assert aside(lock.acquire, False).result() is False
        with pytest.raises(AssertionError, match="not owned"):
            aside(lock.release).result()
        lock.release()

    def both() -> bool:
        got = lock.acquire(False)
        lock.release()
        return bool(got)

    assert aside(both).result() is True
    with pytest.raises(AssertionError, match="not owned"):
        lock.release()


@pytest.mark.parametrize("kind", ["Semaphore", "BoundedSemaphore"])
def test_semaphores_count(mp: Any, kind: str) -> None:
    semaphore = getattr(mp, kind)(3)
    for left in (2, 1, 0):
        assert semaphore.acquire(False)
        assert semaphore.get_value() == left
    assert not semaphore.acquire(False)
    for value in (1, 2, 3):
        semaphore.release()
        assert semaphore.get_value() == value
    if kind == "Semaphore":
        semaphore.release()
        assert semaphore.get_value() == 4
    else:
        with pytest.raises(ValueError, match="too many times"):
            semaphore.release()
        assert semaphore.get_value() == 3


@pytest.mark.parametrize("kind", ["Semaphore", "BoundedSemaphore"])
def test_values_of_semaphores(mp: Any, kind: str) -> None:
    make = getattr(mp, kind)
    assert make().get_value() == 1
    assert make(value=2).get_value() == 2
    with pytest.raises((ValueError, OSError)):  # as CPython's version has it
        make(-1)
    none = make(0)
    assert not none.acquire(False)


def test_an_initial_value_of_zero_is_for_others_to_raise(
    mp: Any, aside: Callable[..., Any]
) -> None:
    semaphore = mp.Semaphore(0)
    waiting = [aside(semaphore.acquire) for _ in range(3)]
    for count in range(3):
        assert sum(each.runs for each in waiting) >= 3 - count
        semaphore.release()
    assert [each.result() for each in waiting] == [True] * 3
    assert semaphore.get_value() == 0


def test_what_repr_says(aside: Callable[..., Any]) -> None:
    def look(mp: Any) -> list[str]:
        said = []
        for kind in LOCKS:
            lock = getattr(mp, kind)()
            said.append(repr(lock))
            lock.acquire()
            said.append(repr(lock))
            said.append(aside(repr, lock).result())
            lock.release()
            said.append(repr(lock))
            aside(lock.acquire).result()
            said.append(repr(lock))
        said.append(repr(mp.Semaphore(5)))
        said.append(repr(mp.BoundedSemaphore(5)))
        rlock = mp.RLock()
        with rlock, rlock:
            said.append(repr(rlock))
        return said

    assert look(fiber) == look(multiprocessing)
    event = fiber.Event()
    assert repr(event).endswith(" unset>")
    event.set()
    assert repr(event).endswith(" set>")
    assert repr(fiber.Condition()).startswith("<Condition(<RLock(None, 0)>")
    barrier = fiber.Barrier(3)
    assert "3" in repr(barrier)
    barrier.abort()
    assert "broken" in repr(barrier)


SAME = ["Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition", "Event", "Barrier"]


@pytest.mark.parametrize("kind", SAME)
def test_every_method_has_multiprocessing_s_parameters(kind: str) -> None:
    theirs = getattr(multiprocessing, kind)(*[2] * (kind == "Barrier"))
    ours = getattr(fiber, kind)(*[2] * (kind == "Barrier"))
    assert type(ours) is getattr(fiber.synchronize, kind)
    for name, value in inspect.getmembers(theirs):
        if name.startswith("_"):
            continue
        found = getattr(ours, name)
        if callable(value):
            expected = inspect.signature(value).parameters.values()
            given = inspect.signature(found).parameters.values()
            assert [(p.name, p.default) for p in given] == [(p.name, p.default) for p in expected]


@pytest.mark.parametrize("make", CONDITIONS)
def test_wait_and_notify(mp: Any, make: Callable[[Any], Any], aside: Callable[..., Any]) -> None:
    condition = make(mp)
    ready, woken = threading.Semaphore(0), mp.SimpleQueue()
    waiting = [aside(actors.wait_in, condition, ready, woken) for _ in range(5)]
    for _ in range(5):
        assert ready.acquire(timeout=DEADLINE)

    def notify(*args: int) -> None:
        with condition:  # all of them have let go of it, in `wait`
            condition.notify(*args)

    left = 5
    for args, count in (((), 1), ((2,), 2)):
        notify(*args)
        left -= count
        until(lambda left=left: sum(each.runs for each in waiting) == left)
    with condition:
        condition.notify_all()
    for each in waiting:
        each.result()
    assert [woken.get() for _ in range(5)] == [True] * 5
    notify(3)  # there is nobody
    with condition:
        condition.notify_all()
        assert condition.wait(0) is False  # and nothing is kept for later
    woken.close()


@pytest.mark.parametrize("make", CONDITIONS)
def test_condition_wants_its_lock_held(
    mp: Any, make: Callable[[Any], Any], aside: Callable[..., Any]
) -> None:
    condition = make(mp)
    for call in (condition.wait, condition.notify, condition.notify_all, lambda: condition.wait(1)):
        with pytest.raises(AssertionError):
            call()
    with condition:
        for call in (condition.wait, condition.notify, condition.notify_all):
            with pytest.raises(AssertionError):
                aside(call).result()


@pytest.mark.parametrize("make", CONDITIONS)
@pytest.mark.parametrize("timeout", [MOMENT, 0, -1])
def test_condition_waits_so_long(mp: Any, make: Callable[[Any], Any], timeout: float) -> None:
    condition = make(mp)
    with condition:
        began = time.monotonic()
        assert condition.wait(timeout) is False
        assert took_about(max(timeout, 0), began)
        condition.notify()  # it has the lock again
    with pytest.raises((AssertionError, ValueError)):
        condition.release()


def test_wait_lets_go_of_a_lock_that_is_held_three_times(
    mp: Any, aside: Callable[..., Any]
) -> None:
    condition = mp.Condition()

    def notify() -> None:
        with condition:
            condition.notify()

    with condition, condition, condition:
        notifying = aside(notify)
        assert condition.wait(DEADLINE) is True
        notifying.result()
        assert aside(condition.acquire, False).result() is False
    assert aside(condition.acquire, False).result() is True


def test_wait_for(mp: Any, aside: Callable[..., Any]) -> None:
    condition = mp.Condition()
    values: list[int] = []

    def add() -> None:
        for number in (1, 2, 3):
            with condition:
                values.append(number)
                condition.notify()

    with condition:
        assert condition.wait_for(lambda: "at once") == "at once"
        began = time.monotonic()
        assert condition.wait_for(list, MOMENT) == []
        assert took_about(MOMENT, began)
        assert condition.wait_for(lambda: 0, timeout=0) == 0
        adding = aside(add)
        assert condition.wait_for(lambda: sum(values) == 6 and "all", DEADLINE) == "all"
    adding.result()


def test_event(mp: Any, aside: Callable[..., Any]) -> None:
    event = mp.Event()
    assert event.is_set() is False
    began = time.monotonic()
    assert event.wait(MOMENT) is False
    assert took_about(MOMENT, began)
    assert event.wait(0) is False
    assert event.wait(timeout=-1) is False
    waiting = [aside(event.wait, *args) for args in ((), (None,), (DEADLINE,))]
    time.sleep(0.02)
    assert all(each.runs for each in waiting)
    event.set()
    assert [each.result() for each in waiting] == [True] * 3
    assert event.is_set() is True
    assert event.wait() is True
    assert event.wait(0) is True
    event.set()
    event.clear()
    event.clear()
    assert event.is_set() is False
    assert event.wait(0) is False


# Among processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*LOCKS, "Condition"])
def test_one_at_a_time(
    kind: str, tmp_path: Path, start: Callable[..., Any], ends_well: Callable[..., None]
) -> None:
    path = tmp_path / "number"
    path.write_text("0")
    lock = getattr(fiber, kind)()
    processes = [start(actors.count_up, lock, path, 100) for _ in range(3)]
    threads = [threading.Thread(target=actors.count_up, args=(lock, path, 50)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends_well(*processes)
    assert path.read_text() == "400"


@pytest.mark.parametrize("kind", ["Semaphore", "BoundedSemaphore"])
def test_so_many_at_a_time(
    kind: str, tmp_path: Path, start: Callable[..., Any], ends_well: Callable[..., None]
) -> None:
    semaphore = getattr(fiber, kind)(2)
    processes = [start(actors.take_a_place, semaphore, tmp_path, 2, 100) for _ in range(4)]
    actors.take_a_place(semaphore, tmp_path, 2, 100)
    ends_well(*processes)
    assert semaphore.get_value() == 2


@pytest.mark.parametrize("kind", [*LOCKS, "Condition"])
def test_held_by_another_process(kind: str, start: Callable[..., Any]) -> None:
    lock = getattr(fiber, kind)()
    held, enough = fiber.Event(), fiber.Event()
    process = start(actors.hold, lock, held, enough)
    assert held.wait(DEADLINE)
    assert lock.acquire(False) is False
    assert lock.acquire(timeout=MOMENT) is False
    if kind in ("RLock", "Condition"):
        with pytest.raises(AssertionError, match="not owned"):
            lock.release()
    enough.set()
    assert lock.acquire(timeout=DEADLINE)
    lock.release()
    process.join()


def test_repr_tells_that_another_process_has_it(start: Callable[..., Any]) -> None:
    for lock, text in (
        (fiber.Lock(), "<Lock(owner=SomeOtherProcess)>"),
        (fiber.RLock(), "<RLock(SomeOtherProcess, nonzero)>"),
        (fiber.Semaphore(), "<Semaphore(value=0)>"),
    ):
        held, enough = fiber.Event(), fiber.Event()
        start(actors.hold, lock, held, enough)
        assert held.wait(DEADLINE)
        assert repr(lock) == text
        enough.set()


def test_released_by_another_process(
    start: Callable[..., Any], ends_well: Callable[..., None]
) -> None:
    back = fiber.Queue()
    lock, semaphore, bounded = fiber.Lock(), fiber.Semaphore(0), fiber.BoundedSemaphore(2)
    lock.acquire()
    bounded.acquire()
    ends_well(*[start(actors.call, each, "release") for each in (lock, semaphore, bounded)])
    assert lock.acquire(False)
    assert semaphore.acquire(False)
    assert bounded.get_value() == 2
    for each in (bounded, fiber.Lock()):
        start(actors.answer, back, each, "release")
        error = back.get(timeout=DEADLINE)
        assert isinstance(error, ValueError)
        assert "too many times" in str(error)
    start(actors.answer, back, fiber.RLock(), "release")
    assert isinstance(back.get(timeout=DEADLINE), AssertionError)


def test_a_process_that_ends_well_with_a_lock_keeps_it(
    start: Callable[..., Any], ends_well: Callable[..., None]
) -> None:
    for kind in LOCKS:
        lock = getattr(fiber, kind)()
        ends_well(start(actors.call, lock, "acquire"))
        assert not lock.acquire(False)
        assert not lock.acquire(timeout=0.05)
        if kind != "RLock":
            lock.release()
            assert lock.acquire(False)


def test_notify_wakes_so_many_processes(start: Callable[..., Any]) -> None:
    condition, ready, woken = fiber.Condition(), fiber.Semaphore(0), fiber.Queue()
    for _ in range(5):
        start(actors.wait_in, condition, ready, woken)
    for _ in range(5):
        assert ready.acquire(timeout=DEADLINE)
    for count in (1, 2):
        with condition:
            condition.notify(count)
        assert [woken.get(timeout=DEADLINE) for _ in range(count)] == [True] * count
        with condition:  # whoever was notified before has had it, and has put its answer
            assert woken.empty()
    with condition:
        condition.notify_all()
    assert [woken.get(timeout=DEADLINE) for _ in range(2)] == [True] * 2


def test_time_out_of_a_wait_in_another_process(start: Callable[..., Any]) -> None:
    condition, ready, woken = fiber.Condition(), fiber.Semaphore(0), fiber.Queue()
    start(actors.wait_in, condition, ready, woken, MOMENT)
    assert woken.get(timeout=DEADLINE) is False
    start(actors.wait_in, condition, ready, woken, 0)
    assert woken.get(timeout=DEADLINE) is False


def test_processes_take_turns(start: Callable[..., Any], ends_well: Callable[..., None]) -> None:
    condition, turns = fiber.Condition(), fiber.Queue()
    processes = [start(actors.take_turns, condition, turns, me, 4, 25) for me in range(1, 4)]
    actors.take_turns(condition, turns, 0, 4, 25)
    ends_well(*processes)
    assert [turns.get_nowait() for _ in range(100)] == [0, 1, 2, 3] * 25


def test_events_wake_all_processes(start: Callable[..., Any]) -> None:
    event, back = fiber.Event(), fiber.Queue()
    for _ in range(4):
        start(actors.answer, back, event, "wait")
    start(actors.answer, back, event, "wait", MOMENT)
    assert back.get(timeout=DEADLINE) is False
    start(actors.call, event, "set")
    assert [back.get(timeout=DEADLINE) for _ in range(4)] == [True] * 4
    assert event.is_set()
    start(actors.call, event, "clear").join()
    assert not event.is_set()
