"""Many producers and consumers: each item comes once, and those of one producer in order."""

from __future__ import annotations

import gc
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.objects import actors

import fiber

DEADLINE = 20.0

KINDS = {
    "Queue": fiber.Queue,
    "Queue of 4": lambda: fiber.Queue(4),
    "JoinableQueue": fiber.JoinableQueue,
    "JoinableQueue of 4": lambda: fiber.JoinableQueue(4),
    "SimpleQueue": fiber.SimpleQueue,
}


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(usual)


def in_order(taken: list[Any]) -> bool:
    """Whether the items of each producer are in the order in which they were put."""
    last: dict[int, int] = {}
    for producer, number in taken:
        if number <= last.get(producer, -1):
            return False
        last[producer] = number
    return True


def everything(producers: int, count: int) -> list[tuple[int, int]]:
    return [(producer, number) for producer in range(producers) for number in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("consumers", [1, 3])
def test_many_producers_and_consumers(
    kind: str, consumers: int, start: Callable[..., Any], ends_well: Callable[..., None]
) -> None:
    q, back = KINDS[kind](), fiber.Queue()
    count = 100 if "4" in kind else 1000
    taking = [start(actors.consume, q, back) for _ in range(consumers)]
    putting = [start(actors.produce, q, me, count) for me in range(3)]
    actors.produce(q, 3, count)
    ends_well(*putting)
    if hasattr(q, "join"):
        q.join()
        assert q.empty()
    for _ in taking:
        q.put(None)
    lists = [back.get(timeout=DEADLINE) for _ in taking]
    assert sorted(item for taken in lists for item in taken) == everything(4, count)
    assert all(in_order(taken) for taken in lists)
    ends_well(*taking)


@pytest.mark.parametrize("pad", [5_000, 200_000])
@pytest.mark.parametrize("kind", ["Queue", "Queue of 4"])
def test_many_with_large_items(kind: str, pad: int, start: Callable[..., Any]) -> None:
    q, back = KINDS[kind](), fiber.Queue()
    taking = [start(actors.consume, q, back) for _ in range(2)]
    putting = [start(actors.produce, q, me, 60, pad) for me in range(2)]
    actors.produce(q, 2, 60, pad)
    for process in putting:
        process.join()
    for _ in taking:
        q.put(None)
    lists = [back.get(timeout=DEADLINE) for _ in taking]
    assert sorted(item for taken in lists for item in taken) == everything(3, 60)
    assert all(in_order(taken) for taken in lists)


def test_small_and_large_items_keep_their_order(start: Callable[..., Any]) -> None:
    def produce(q: Any) -> None:
        for number in range(300):
            q.put(number)
            q.put(bytes([number % 256]) * (20_000 if number % 7 else 2_000_000))

    q = fiber.Queue()
    start(produce, q)
    for number in range(300):
        assert q.get(timeout=DEADLINE) == number
        assert q.get(timeout=DEADLINE)[:1] == bytes([number % 256])


def test_the_home_takes_too(start: Callable[..., Any], switching: None) -> None:
    q, back = fiber.Queue(), fiber.Queue()
    taking = [start(actors.consume, q, back) for _ in range(2)]
    putting = threading.Thread(target=actors.produce, args=(q, 0, 40_000))
    putting.start()
    mine = [q.get(timeout=DEADLINE) for _ in range(5_000)]
    putting.join()
    for _ in taking:
        q.put(None)
    lists = [mine, *(back.get(timeout=DEADLINE) for _ in taking)]
    assert sorted(item for taken in lists for item in taken) == everything(1, 40_000)
    assert all(in_order(taken) for taken in lists)


@pytest.mark.parametrize("consumers", [2, 4])
def test_quick_consumers_take_turns(consumers: int, start: Callable[..., Any]) -> None:
    """What was granted to one is recalled for another many times, and often while it is taken."""
    q, back = fiber.Queue(), fiber.Queue()
    for _ in range(consumers):
        start(actors.consume, q, back)
    actors.produce(q, 0, 60_000)
    for _ in range(consumers):
        q.put(None)
    lists = [back.get(timeout=DEADLINE) for _ in range(consumers)]
    assert sorted(item for taken in lists for item in taken) == everything(1, 60_000)
    assert all(in_order(taken) for taken in lists)


def test_threads_of_one_process(switching: None, aside: Callable[..., Any]) -> None:
    """They have the queue in their own process."""
    for q in (fiber.Queue(), fiber.Queue(3), fiber.SimpleQueue()):
        lists: list[list[Any]] = [[] for _ in range(3)]

        def take(mine: list[Any], q: Any = q) -> None:
            while (item := q.get()) is not None:
                mine.append(item)

        taking = [aside(take, mine) for mine in lists]
        putting = [aside(actors.produce, q, me, 300) for me in range(3)]
        for each in putting:
            each.result()
        for _ in taking:
            q.put(None)
        for each in taking:
            each.result()
        assert sorted(item for taken in lists for item in taken) == everything(3, 300)
        assert all(in_order(taken) for taken in lists)


@pytest.mark.parametrize("kind", ["Queue", "Queue of 4", "SimpleQueue"])
def test_threads_of_a_child_put(kind: str, start: Callable[..., Any]) -> None:
    q = KINDS[kind]()
    count = 60 if "4" in kind else 600
    start(actors.put_in_threads, q, 4, count)
    taken = [q.get() for _ in range(4 * count)]
    assert sorted(taken) == everything(4, count)
    assert in_order(taken)
    assert q.empty()


def test_each_thread_of_a_child_has_its_end(start: Callable[..., Any]) -> None:
    """None of what a process was granted ahead lies with one thread while another waits."""
    for _ in range(5):
        q, back = fiber.Queue(), fiber.Queue()
        start(actors.take_in_threads, q, 4, back)
        for number in range(2_000):
            q.put((0, number))
        for _ in range(4):
            q.put(None)
        lists = back.get(timeout=DEADLINE)
        assert [taken.pop() for taken in lists] == [None] * 4
        assert sorted(item for taken in lists for item in taken) == everything(1, 2_000)
        assert all(in_order(taken) for taken in lists)
        assert q.empty()


def test_names_that_come_and_go(start: Callable[..., Any]) -> None:
    for each in (1, 7, 50):
        q, back = fiber.Queue(), fiber.Queue()
        for number in range(700):
            q.put(number)
        start(actors.take_by_new_names, pickle.dumps(q), 350, each, back)
        start(actors.take_by_new_names, pickle.dumps(q), 350, each, back)
        lists = [back.get(timeout=DEADLINE) for _ in range(2)]
        assert sorted(lists[0] + lists[1]) == list(range(700))
        assert [sorted(taken) for taken in lists] == lists
        assert q.empty()


# Bounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue"])
def test_no_more_than_its_bound_is_accepted(kind: str, start: Callable[..., Any]) -> None:
    q, back = getattr(fiber, kind)(5), fiber.Queue()

    def accepted() -> int:
        for me in range(3):
            start(actors.put_until_full, q, me, back)
        return sum(back.get(timeout=DEADLINE) for _ in range(3))

    assert accepted() == 5
    assert (q.qsize(), q.full()) == (5, True)
    for count in (1, 3, 5):
        for _ in range(count):
            q.get_nowait()
        assert accepted() == count
    taken = [q.get_nowait() for _ in range(5)]
    assert in_order(sorted(taken))
    assert q.empty()


def test_a_bound_holds_all_the_time(start: Callable[..., Any]) -> None:
    q, back = fiber.Queue(3), fiber.Queue()
    taking = [start(actors.consume, q, back) for _ in range(2)]
    putting = [start(actors.produce, q, me, 150) for me in range(3)]
    most = 0
    while any(process.is_alive() for process in putting):
        most = max(most, q.qsize())
    assert 1 <= most <= 3
    for _ in taking:
        q.put(None, timeout=DEADLINE)
    lists = [back.get(timeout=DEADLINE) for _ in taking]
    assert sorted(item for taken in lists for item in taken) == everything(3, 150)


def test_producers_wait_in_line(start: Callable[..., Any]) -> None:
    """Who waits for room is served in the order of coming, also before who comes later."""
    q, told = fiber.Queue(1), fiber.Queue()
    q.put("first")

    def put(me: int) -> None:
        told.put(me)
        q.put(me)

    for me in range(3):
        start(put, me)
        assert told.get(timeout=DEADLINE) == me
        with pytest.raises(queue.Full):
            q.put("pushy", timeout=0.1)
    taken = [q.get(timeout=DEADLINE) for _ in range(4)]
    assert taken == ["first", 0, 1, 2]


# What was granted ahead ------------------------------------------------------------------------


@pytest.fixture
def sitting(start: Callable[..., Any]) -> Callable[..., Any]:
    """`sitting(q, 500)`: a child that took 500 items quickly, and has others ready; then it waits.

    Returns a function that lets it take the rest, up to None, and returns all that it took.
    """

    def sit(q: Any, count: int) -> Callable[[], list[Any]]:
        told, go_on, back = fiber.Event(), fiber.Event(), fiber.Queue()
        start(actors.take_and_sit, q, count, told, go_on, back)
        assert told.wait(DEADLINE)

        def rest() -> list[Any]:
            go_on.set()
            taken: list[Any] = back.get(timeout=DEADLINE)
            return taken

        return rest

    return sit


TAKES: dict[str, Callable[[Any], Any]] = {
    "get": lambda q: q.get(),
    "get(timeout)": lambda q: q.get(timeout=DEADLINE),
    "get_nowait": lambda q: q.get_nowait(),
}


@pytest.mark.parametrize("how", TAKES)
def test_what_one_does_not_use_is_there_for_others(
    how: str, sitting: Callable[..., Any], start: Callable[..., Any]
) -> None:
    q = fiber.Queue()
    for number in range(2_000):
        q.put(number)
    rest = sitting(q, 500)
    mine = []
    for left in range(1500, 0, -1):
        assert left % 100 or (q.qsize(), q.empty()) == (left, False)
        mine.append(TAKES[how](q))
    assert mine == list(range(500, 2_000))
    assert (q.qsize(), q.empty()) == (0, True)
    with pytest.raises(queue.Empty):
        q.get_nowait()
    q.put("more")
    q.put(None)
    assert rest() == [*range(500), "more"]


def test_it_is_there_for_another_process(
    sitting: Callable[..., Any], start: Callable[..., Any]
) -> None:
    q, back = fiber.Queue(), fiber.Queue()
    for number in range(2_000):
        q.put((0, number))
    rest = sitting(q, 500)
    start(actors.consume, q, back)
    q.put(None)
    assert back.get(timeout=DEADLINE) == [(0, number) for number in range(500, 2_000)]
    q.put(None)
    assert rest() == [(0, number) for number in range(500)]


def test_it_is_back_when_its_process_ends(start: Callable[..., Any]) -> None:
    def take(q: Any) -> None:
        for _ in range(500):
            q.get()

    q = fiber.Queue()
    for number in range(2_000):
        q.put(number)
    start(take, q).join()
    assert q.qsize() == 1_500
    assert [q.get_nowait() for _ in range(1_500)] == list(range(500, 2_000))


def test_it_is_back_when_its_process_lets_go_of_the_queue(start: Callable[..., Any]) -> None:
    def take(data: bytes, told: Any, go_on: Any) -> None:
        q = pickle.loads(data)
        for _ in range(500):
            q.get()
        del q
        gc.collect()
        told.set()
        go_on.wait()

    q, told, go_on = fiber.Queue(), fiber.Event(), fiber.Event()
    for number in range(2_000):
        q.put(number)
    start(take, pickle.dumps(q), told, go_on)
    assert told.wait(DEADLINE)
    assert [q.get(timeout=DEADLINE) for _ in range(1_500)] == list(range(500, 2_000))
    go_on.set()


def test_idle_threads_of_the_home_get_their_part(
    sitting: Callable[..., Any], aside: Callable[..., Any]
) -> None:
    """A quick child waits as well, and first; a burst is for all, though it could take it all."""
    q = fiber.Queue()
    for number in range(2_000):
        q.put(number)
    rest = sitting(q, 2_000)
    waiting = [aside(q.get) for _ in range(3)]
    for number in range(8):  # a burst: sent in one or two messages
        q.put(number)
    mine = [each.result() for each in waiting]
    q.put(None)
    assert sorted([*mine, *rest()[2_000:]]) == list(range(8))


# Ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 100, 20_000])
@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue"])
def test_all_is_there_once_its_producer_was_joined(
    kind: str, count: int, start: Callable[..., Any]
) -> None:
    q = getattr(fiber, kind)()
    start(actors.produce, q, 0, count).join()
    assert not q.empty()
    if kind == "Queue":
        assert q.qsize() == count
        assert [q.get_nowait() for _ in range(count)] == everything(1, count)
    else:
        assert [q.get() for _ in range(count)] == everything(1, count)
    assert q.empty()


def test_large_items_are_there_once_their_producer_was_joined(start: Callable[..., Any]) -> None:
    q = fiber.Queue()
    start(actors.produce, q, 0, 5, 10_000_000).join()
    assert q.qsize() == 5
    for number in range(5):
        assert q.get_nowait()[:2] == [0, number]


def test_short_children_lose_nothing(start: Callable[..., Any]) -> None:
    q = fiber.Queue()
    for base in range(0, 240, 8):
        processes = [start(actors.call, q, "put", base + n) for n in range(8)]
        for process in processes:
            process.join()
        assert q.qsize() == 8
        assert sorted(q.get_nowait() for _ in range(8)) == list(range(base, base + 8))


def test_producers_that_end_early_while_others_go_on(start: Callable[..., Any]) -> None:
    """An end as it should be is no reason for `get` to complain."""
    q, go_on = fiber.Queue(), fiber.Event()

    def late() -> None:
        go_on.wait()
        q.put("late")

    for _ in range(3):
        start(actors.call, q, "put", "early").join()
    start(late)
    assert [q.get() for _ in range(3)] == ["early"] * 3
    timer = threading.Timer(1.5, go_on.set)  # longer than `get` would wait before it complains
    timer.start()
    assert q.get() == "late"
    timer.join()
