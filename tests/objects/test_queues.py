"""The methods of queues and their arguments, within one process: as multiprocessing has them.

Most tests run on multiprocessing's own queues as well, which shows that they ask for what is there.
"""

from __future__ import annotations

import gc
import inspect
import multiprocessing.queues
import pickle
import queue
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from tests.objects import actors
from tests.waiting import until

import fiber
import fiber.queues

DEADLINE = 20.0
MOMENT = 0.15  # seconds, of a wait that shall run out


@pytest.fixture(params=[fiber, multiprocessing], ids=["fiber", "multiprocessing"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """`make("Queue", *args)`: a queue of Fiber or of multiprocessing."""
    module: ModuleType = request.param
    made: list[Any] = []

    def new(kind: str, *args: int) -> Any:
        made.append(getattr(module, kind)(*args))
        return made[-1]

    yield new
    for each in made:
        each.close()
        if hasattr(each, "join_thread"):
            each.join_thread()
    made.clear()
    gc.collect()


@pytest.fixture(params=["Queue", "JoinableQueue"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def took_about(seconds: float, began: float) -> bool:
    return seconds * 0.95 <= time.monotonic() - began < seconds + 5


def test_first_in_first_out(make: Callable[..., Any], kind: str) -> None:
    q = make(kind)
    for item in (1, "two", [3], None, {"f": 4.0}):
        q.put(item)
    assert [q.get(timeout=DEADLINE) for _ in range(5)] == [1, "two", [3], None, {"f": 4.0}]


def test_sizes(make: Callable[..., Any], kind: str) -> None:
    q = make(kind, 2)
    assert (q.qsize(), q.empty(), q.full()) == (0, True, False)
    q.put("a")
    until(lambda: not q.empty())
    assert (q.qsize(), q.full()) == (1, False)
    q.put("b")
    assert (q.qsize(), q.full()) == (2, True)
    assert q.get(timeout=DEADLINE) == "a"
    assert (q.qsize(), q.full()) == (1, False)


def test_fiber_s_queue_knows_at_once_what_was_put() -> None:
    q = fiber.Queue()
    for count in range(1, 100):
        q.put(count)
        assert q.qsize() == count
    assert not q.empty()
    assert [q.get_nowait() for _ in range(99)] == list(range(1, 100))
    assert q.empty()


def test_without_bounds(make: Callable[..., Any], kind: str) -> None:
    for size in (0, -1):
        q = make(kind, size)
        for item in range(300):
            q.put(item, False)
        assert not q.full()
        assert [q.get(timeout=DEADLINE) for _ in range(300)] == list(range(300))


GETS: list[Callable[[Any], Any]] = [
    lambda q: q.get_nowait(),
    lambda q: q.get(False),
    lambda q: q.get(block=False),
    lambda q: q.get(False, 60),
    lambda q: q.get(True, 0),
    lambda q: q.get(True, 0.0),
    lambda q: q.get(timeout=-1),
]


def test_get_without_waiting(make: Callable[..., Any], kind: str) -> None:
    q = make(kind)
    began = time.monotonic()
    for get in GETS:
        with pytest.raises(queue.Empty):
            get(q)
    assert time.monotonic() - began < 5
    for get in GETS:
        q.put("item")

        def gets(get: Callable[[Any], Any] = get) -> Any:
            try:
                return get(q)
            except queue.Empty:  # multiprocessing's feeder thread takes a moment
                assert not isinstance(q, fiber.queues.Queue)
                return None

        assert until(gets) == "item"


def test_get_waits_so_long(make: Callable[..., Any], kind: str) -> None:
    q = make(kind)
    began = time.monotonic()
    with pytest.raises(queue.Empty):
        q.get(True, MOMENT)
    assert took_about(MOMENT, began)


FOR_LONG: list[tuple[Any, ...]] = [(), (True,), (True, None), (True, DEADLINE)]


def test_get_waits_for_an_item(
    make: Callable[..., Any], kind: str, aside: Callable[..., Any]
) -> None:
    q = make(kind)
    for args in FOR_LONG:
        waiting = aside(q.get, *args)
        time.sleep(0.02)
        q.put("late")
        assert waiting.result() == "late"


PUTS: list[Callable[[Any], Any]] = [
    lambda q: q.put_nowait("more"),
    lambda q: q.put("more", False),
    lambda q: q.put("more", block=False),
    lambda q: q.put("more", False, 60),
    lambda q: q.put("more", True, 0),
    lambda q: q.put("more", timeout=-1),
    lambda q: q.put(obj="more", timeout=0.0),
]


def test_put_without_waiting(make: Callable[..., Any], kind: str) -> None:
    q = make(kind, 2)
    q.put("more")
    q.put("more")
    began = time.monotonic()
    for put in PUTS:
        with pytest.raises(queue.Full):
            put(q)
    assert time.monotonic() - began < 5
    for put in PUTS:
        assert q.get(timeout=DEADLINE) == "more"
        put(q)
    assert [q.get(timeout=DEADLINE) for _ in range(2)] == ["more", "more"]


def test_put_waits_so_long(make: Callable[..., Any], kind: str) -> None:
    q = make(kind, 1)
    q.put("a")
    began = time.monotonic()
    with pytest.raises(queue.Full):
        q.put("b", True, MOMENT)
    assert took_about(MOMENT, began)
    assert q.get(timeout=DEADLINE) == "a"
    with pytest.raises(queue.Empty):
        q.get(timeout=0.05)


def test_put_waits_for_room(make: Callable[..., Any], kind: str, aside: Callable[..., Any]) -> None:
    q = make(kind, 1)
    for args in FOR_LONG:
        q.put("a")
        waiting = aside(q.put, "b", *args)
        time.sleep(0.02)
        assert waiting.runs
        assert q.get(timeout=DEADLINE) == "a"
        waiting.result()
        assert q.get(timeout=DEADLINE) == "b"


def test_closed(make: Callable[..., Any], kind: str) -> None:
    q = make(kind)
    q.put("a")
    with pytest.raises(AssertionError):
        q.join_thread()  # before close
    q.cancel_join_thread()
    q.close()
    q.close()
    for call in (q.get, q.get_nowait, lambda: q.put("b"), lambda: q.put_nowait("b")):
        with pytest.raises(ValueError, match="closed"):
            call()
    q.join_thread()
    q.join_thread()


def test_only_this_process_has_closed_it(start: Callable[..., Any]) -> None:
    q = fiber.Queue()
    back = fiber.Queue()
    start(actors.echo, q, back)
    q.put("x")
    q.close()
    q.join_thread()
    assert back.get(timeout=DEADLINE) == "x"


def test_join_waits_until_all_is_done(make: Callable[..., Any], aside: Callable[..., Any]) -> None:
    q = make("JoinableQueue")
    q.join()
    for item in range(3):
        q.put(item)
    waiting = aside(q.join)
    for item in range(3):
        assert q.get(timeout=DEADLINE) == item
        time.sleep(0.02)
        assert waiting.runs
        q.task_done()
    waiting.result()
    q.join()
    with pytest.raises(ValueError, match=r"task_done\(\) called too many times"):
        q.task_done()


def test_items_that_are_not_taken_can_be_marked_as_done(make: Callable[..., Any]) -> None:
    q = make("JoinableQueue", 5)
    q.put("a")
    q.task_done()
    q.join()
    with pytest.raises(ValueError, match="too many times"):
        q.task_done()
    assert q.get(timeout=DEADLINE) == "a"


def test_simple_queue(make: Callable[..., Any], aside: Callable[..., Any]) -> None:
    q = make("SimpleQueue")
    assert q.empty()
    q.put([1])
    q.put(2)
    assert not q.empty()
    assert [q.get(), q.get()] == [[1], 2]
    assert q.empty()
    waiting = aside(q.get)
    time.sleep(0.02)
    q.put("late")
    assert waiting.result() == "late"
    q.close()
    for call in (q.get, q.empty, lambda: q.put(1)):
        with pytest.raises(OSError, match="closed"):
            call()


CLASSES = ["Queue", "JoinableQueue", "SimpleQueue"]


@pytest.mark.parametrize("name", CLASSES)
def test_every_method_has_multiprocessing_s_parameters(name: str) -> None:
    theirs, ours = getattr(multiprocessing.queues, name), getattr(fiber.queues, name)
    for method, function in inspect.getmembers(theirs, inspect.isfunction):
        if not method.startswith("_"):
            expected = inspect.signature(function).parameters.values()
            found = inspect.signature(getattr(ours, method)).parameters.values()
            assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected]


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name: str) -> None:
    kind = getattr(fiber.queues, name)
    assert type(getattr(fiber, name)()) is kind
    assert type(getattr(fiber.get_context("spawn"), name)()) is kind
    assert kind[int].__origin__ is kind  # in annotations
    assert isinstance(kind(ctx=fiber.get_context()), kind)
    assert (fiber.queues.Empty, fiber.queues.Full) == (queue.Empty, queue.Full)


def test_two_names_of_a_queue_are_one_queue() -> None:
    q = fiber.Queue(2)
    other = pickle.loads(pickle.dumps(q))
    q.put(1)
    other.put(2)
    assert q.full()
    assert other.full()
    assert [other.get(), q.get()] == [1, 2]
    q.close()
    other.put(3)  # that name was not closed
    assert other.get() == 3
