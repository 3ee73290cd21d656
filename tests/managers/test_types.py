"""The types of a SyncManager, each used by several processes."""

from __future__ import annotations

import multiprocessing.managers
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.managers import targets

import fiber
from fiber import managers, queues, synchronize

Run = Callable[..., Any]


def test_a_list_is_shared(manager: Any, run: Run) -> None:
    items = manager.list([1, 2])
    assert run(targets.append, items, 3) == [1, 2, 3]
    items += [4]
    items *= 2
    assert items[:] == [1, 2, 3, 4] * 2
    assert items + [5] == [1, 2, 3, 4, 1, 2, 3, 4, 5]  # noqa: RUF005
    del items[4:]
    items.sort(reverse=True)
    assert (len(items), items.pop(), items.index(3), 2 in items) == (4, 1, 1, True)
    assert [item for item in items] == [4, 3, 2]  # noqa: C416


def test_a_dictionary_is_shared(manager: Any, run: Run) -> None:
    items = manager.dict({"a": 1}, b=2)
    run(items.update, {"c": 3})
    assert items.copy() == {"a": 1, "b": 2, "c": 3}
    assert (items.get("d", 4), items.setdefault("e", 5), items.pop("a")) == (4, 5, 1)
    assert sorted(items) == sorted(items.keys()) == ["b", "c", "e"]
    assert sorted(items.items()) == [("b", 2), ("c", 3), ("e", 5)]
    del items["e"]
    assert items == items
    assert dict(items) == {"b": 2, "c": 3}


def test_a_value_is_shared(manager: Any, run: Run) -> None:
    value = manager.Value("i", 1)
    run(value.set, 2)
    assert value.value == value.get() == 2
    value.value = 3
    assert run(value.get) == 3


def test_an_array_is_shared(manager: Any, run: Run) -> None:
    array = manager.Array("i", [1, 2, 3])
    assert run(targets.read, array, 1) == 2
    array[1] = 5
    assert list(array) == [1, 5, 3]
    assert len(array) == 3


def test_a_namespace_is_shared(manager: Any, run: Run) -> None:
    space = manager.Namespace(x=1)
    run(setattr, space, "y", 2)
    assert (space.x, space.y) == (1, 2)
    del space.x
    with pytest.raises(AttributeError):
        space.x  # noqa: B018
    assert str(space) == "Namespace(y=2)"


def test_a_pool_is_shared(manager: Any, run: Run) -> None:
    with manager.Pool(2) as pool:
        assert run(pool.map, abs, [-1, -2]) == [1, 2]
        assert pool.apply(abs, (-3,)) == 3
        assert pool.apply_async(abs, (-4,)).get(targets.FOREVER) == 4
        assert list(pool.imap(abs, [-5, -6])) == [5, 6]
        assert sorted(pool.imap_unordered(abs, [-5, -6])) == [5, 6]


@pytest.mark.parametrize(
    ("typeid", "kind", "args"),
    [
        ("Lock", synchronize.Lock, ()),
        ("RLock", synchronize.RLock, ()),
        ("Semaphore", synchronize.Semaphore, (1,)),
        ("BoundedSemaphore", synchronize.BoundedSemaphore, (1,)),
        ("Condition", synchronize.Condition, ()),
        ("Event", synchronize.Event, ()),
        ("Barrier", synchronize.Barrier, (2,)),
        ("Queue", queues.Queue, ()),
        ("JoinableQueue", queues.JoinableQueue, ()),
        ("SimpleQueue", queues.SimpleQueue, ()),
    ],
)
def test_what_is_fibers_own_lives_in_the_managers_process(
    manager: Any, typeid: str, kind: type, args: tuple[Any, ...]
) -> None:
    made = getattr(manager, typeid)(*args)
    assert isinstance(made, kind)
    ref = getattr(made, "_ref", None) or made._lock._ref
    assert f"/{manager._process.pid}." in ref.address
    assert repr(made).startswith("<")
    assert f"typeid '{typeid}' at 0x" in repr(made)


@pytest.mark.parametrize("typeid", ["Lock", "RLock", "Semaphore", "BoundedSemaphore"])
def test_locks_exclude_processes(
    manager: Any, typeid: str, run: Run, in_thread: Callable[..., Any]
) -> None:
    lock = getattr(manager, typeid)()
    assert lock.acquire() is True
    assert run(lock.acquire, False) is False
    waiting = in_thread(run, targets.acquire, lock)
    assert not waiting.done()
    lock.release()
    assert waiting.result(20) is True


def test_a_lock_may_be_released_by_another_process(manager: Any, run: Run) -> None:
    lock = manager.Lock()
    lock.acquire()
    run(targets.release, lock)
    assert lock.acquire(False)


@pytest.mark.parametrize("typeid", ["Lock", "RLock"])
def test_locks_have_the_arguments_and_errors_of_threading(manager: Any, typeid: str) -> None:
    for lock in (getattr(manager, typeid)(), getattr(threading, typeid)()):
        with pytest.raises(RuntimeError):
            lock.release()
        with pytest.raises(ValueError, match="non-blocking"):
            lock.acquire(False, 1)
        assert lock.acquire(blocking=True, timeout=-1)
        lock.release()
        with lock as taken:
            assert taken is True


def test_semaphores_have_the_arguments_and_errors_of_threading(manager: Any) -> None:
    for made in (manager, threading):
        bounded = made.BoundedSemaphore(1)
        with pytest.raises(ValueError, match="released too many times"):
            bounded.release()
        with pytest.raises(ValueError, match="non-blocking"):
            bounded.acquire(False, 1)
        semaphore = made.Semaphore(0)
        began = time.monotonic()
        assert semaphore.acquire(blocking=True, timeout=0.1) is False
        assert time.monotonic() - began >= 0.09
        semaphore.release()
        assert semaphore.acquire(timeout=0)


def test_a_condition_wakes_another_process(
    manager: Any, in_thread: Callable[..., Any], run: Run
) -> None:
    condition, items = manager.Condition(), manager.list()

    def wait() -> Any:
        with condition:
            return condition.wait_for(lambda: len(items), 20)

    waiting = in_thread(wait)
    with condition:
        run(targets.append, items, 1)
        condition.notify_all()
    assert waiting.result(20) == 1


def test_a_condition_has_the_errors_of_threading(manager: Any) -> None:
    for condition in (manager.Condition(), manager.Condition(manager.Lock())):
        for call in (condition.wait, condition.notify, condition.notify_all):
            with pytest.raises(RuntimeError, match="un-acquired lock"):
                call()
        with condition:
            assert condition.wait(0.01) is False


def test_an_event_is_seen_everywhere(manager: Any, run: Run) -> None:
    event = manager.Event()
    assert not run(event.wait, 0.01)
    run(event.set)
    assert event.wait(20)
    event.clear()
    assert not run(event.is_set)


def test_a_barrier_joins_processes(manager: Any, run: Run, in_thread: Callable[..., Any]) -> None:
    done = manager.list()
    barrier = manager.Barrier(2, lambda: done.append(1), timeout=20)
    other = in_thread(run, barrier.wait)
    assert {barrier.wait(), other.result(20)} == {0, 1}
    assert list(done) == [1]
    assert (barrier.parties, barrier.n_waiting, barrier.broken) == (2, 0, False)
    barrier.abort()
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait()


@pytest.mark.parametrize("typeid", ["Queue", "JoinableQueue"])
def test_queues_have_the_methods_of_threads(manager: Any, typeid: str, run: Run) -> None:
    items = getattr(manager, typeid)(2)
    run(items.put, "one")
    items.put_nowait(lambda: "two")
    assert (items.full(), items.qsize(), items.empty()) == (True, 2, False)
    with pytest.raises(queue.Full):
        items.put(3, timeout=0.01)
    assert run(items.get) == "one"
    items.task_done()
    assert items.get_nowait()() == "two"
    items.task_done()
    items.join()
    with pytest.raises(queue.Empty):
        items.get(block=False)
    with pytest.raises(ValueError, match="task_done"):
        items.task_done()


def test_what_cannot_be_pickled_is_refused_where_it_is_put(manager: Any) -> None:
    for call in (manager.Queue().put, manager.list().append):
        with pytest.raises(fiber.SerializationError):
            call(threading.Lock())


def test_proxies_are_multiprocessings_too(manager: Any) -> None:
    assert isinstance(manager, multiprocessing.managers.SyncManager)
    for made, kind in (
        (manager.dict(), "DictProxy"),
        (manager.list(), "ListProxy"),
        (manager.Value("i", 0), "ValueProxy"),
        (manager.Namespace(), "NamespaceProxy"),
    ):
        assert type(made) is getattr(managers, kind)
        assert isinstance(made, getattr(multiprocessing.managers, kind))
        assert repr(made).startswith(f"<{kind} object, typeid ")


def test_all_names_of_multiprocessing_are_there() -> None:
    for name in vars(multiprocessing.managers):
        assert getattr(managers, name) is not None or name == "HAS_SHMEM"
    with pytest.raises(AttributeError):
        managers.no_such_name  # noqa: B018
