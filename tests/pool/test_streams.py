"""Iterators over results: lazy, bounded, abandoned; and how items are spread over workers."""

from __future__ import annotations

import functools
import gc
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.pool import tasks
from tests.waiting import until

import fiber
from fiber.config import config

METHODS = ["imap", "imap_unordered"]


class Counting:
    """An endless iterable that counts what was read of it."""

    def __init__(self, make: Any = lambda n: n) -> None:
        self.read = 0
        self.closed = threading.Event()
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        try:
            for n in itertools.count():
                self.read += 1
                yield self._make(n)
        finally:
            self.closed.set()

    def settle(self) -> int:
        """Wait until nothing more is read; return how much was."""
        deadline = time.monotonic() + 20
        before, since = self.read, time.monotonic()
        while time.monotonic() - since < 0.4:
            assert time.monotonic() < deadline, f"it goes on reading: {self.read} items"
            time.sleep(0.01)
            if self.read != before:
                before, since = self.read, time.monotonic()
        return before


@pytest.mark.parametrize("method", METHODS)
def test_an_endless_generator_is_read_as_results_are_taken(pool: fiber.Pool, method: str) -> None:
    items = Counting()
    results = getattr(pool, method)(functools.partial(tasks.nap_at, -1, 0, 0.001), items)
    taken = [next(results) for _ in range(5)]
    ahead = items.settle() - 5
    assert ahead < 5000
    taken += [next(results) for _ in range(3000)]
    assert items.settle() - 3005 < 5000
    if method == "imap":
        assert taken == list(range(3005))
    assert len(set(taken)) == 3005


@pytest.mark.parametrize("method", METHODS)
def test_large_items_are_not_read_far_ahead(pool: fiber.Pool, method: str) -> None:
    size = 1 << 18
    items = Counting(lambda n: bytes(size))
    results = getattr(pool, method)(len, items)
    assert [next(results) for _ in range(20)] == [size] * 20
    ahead = items.settle() - 20
    assert ahead * size < 1.5 * config.imap_buffer_mb * 2**20
    assert [next(results) for _ in range(500)] == [size] * 500


@pytest.mark.parametrize("method", METHODS)
def test_large_results_do_not_pile_up(pool: fiber.Pool, method: str) -> None:
    size = 1 << 18
    me = psutil.Process()
    results = getattr(pool, method)(functools.partial(tasks.big, size), itertools.count())
    assert len(next(results)) == size
    before = me.memory_info().rss
    deadline = time.monotonic() + 1.5  # the workers could make gigabytes
    while time.monotonic() < deadline:
        time.sleep(0.05)
        grown = me.memory_info().rss - before
        assert grown < 3 * config.imap_buffer_mb * 2**20
    assert [len(next(results)) for _ in range(300)] == [size] * 300


@pytest.mark.parametrize("method", METHODS)
def test_memory_stays_bounded_over_a_long_stream(pool: fiber.Pool, method: str) -> None:
    me = psutil.Process()
    results = getattr(pool, method)(tasks.same, itertools.count())
    for _ in range(20_000):
        next(results)
    before = me.memory_info().rss
    for _ in range(200_000):
        next(results)
    assert me.memory_info().rss - before < 50 * 2**20


@pytest.mark.parametrize("method", METHODS)
def test_results_come_while_the_generator_waits(pool: fiber.Pool, method: str) -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        assert gate.wait(20)
        yield 2

    results = getattr(pool, method)(tasks.square, items())
    assert results.next(20) == 1
    with pytest.raises(fiber.TimeoutError):
        results.next(0.05)
    gate.set()
    assert list(results) == [4]


@pytest.mark.parametrize("method", METHODS)
def test_the_next_item_may_follow_from_a_result(pool: fiber.Pool, method: str) -> None:
    """As in a conversation: the generator yields only what a result has led to."""
    answers: list[int] = [0]

    def items() -> Iterator[int]:
        for n in range(20):
            while len(answers) <= n:
                time.sleep(0.001)
            yield answers[-1] + 1

    for answer in getattr(pool, method)(tasks.same, items()):
        answers.append(answer)  # noqa: PERF402 - the generator reads it meanwhile
    assert answers == list(range(21))


@pytest.mark.parametrize(
    "error", [ValueError("the source is dry"), RuntimeError("odd"), KeyError(1)]
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("good", [0, 1, 300])
def test_a_generator_that_raises(
    pool: fiber.Pool, method: str, good: int, error: Exception
) -> None:
    def items() -> Iterator[int]:
        yield from range(good)
        raise error

    results = getattr(pool, method)(tasks.same, items())
    seen = [next(results) for _ in range(good)]
    assert sorted(seen) == list(range(good))
    with pytest.raises(type(error)) as caught:
        next(results)
    assert caught.value is error
    with pytest.raises(StopIteration):
        next(results)
    assert pool.map(tasks.square, [3]) == [9]


def test_map_raises_what_the_generator_raises(pool: fiber.Pool) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the source is dry")

    with pytest.raises(OSError, match="dry"):
        pool.map(tasks.square, items())
    assert pool.map(tasks.square, [3]) == [9]


@pytest.mark.parametrize("method", METHODS)
def test_a_generator_may_use_the_pool(pool: fiber.Pool, method: str) -> None:
    def items() -> Iterator[int]:
        for n in range(20):
            yield pool.apply(tasks.square, (n,))

    results = getattr(pool, method)(tasks.square, items())
    assert sorted(results) == [n**4 for n in range(20)]


def test_streams_can_be_chained(pool: fiber.Pool) -> None:
    first = pool.imap(tasks.square, range(500))
    second = pool.imap(tasks.square, first)
    third = pool.imap_unordered(tasks.same, second)
    assert sorted(third) == [n**4 for n in range(500)]


@pytest.mark.parametrize("method", METHODS)
def test_an_abandoned_iterator_stops_reading(pool: fiber.Pool, method: str) -> None:
    items = Counting()
    results = getattr(pool, method)(tasks.same, items)
    for _ in range(50):
        next(results)
    del results
    gc.collect()
    assert items.closed.wait(10)
    assert pool.map(tasks.square, range(50)) == [x * x for x in range(50)]
    assert pool.stats().waiting == 0
    pool.close()
    pool.join()


@pytest.mark.parametrize("method", METHODS)
def test_an_iterator_abandoned_half_way_leaves_the_pool_free(pool: fiber.Pool, method: str) -> None:
    for result in getattr(pool, method)(
        functools.partial(tasks.nap_at, -1, 0, 0.01), range(10_000)
    ):
        if result >= 20:
            break
    gc.collect()
    begin = time.monotonic()
    assert pool.map(tasks.square, range(50)) == [x * x for x in range(50)]
    pool.close()
    pool.join()
    assert time.monotonic() - begin < 8  # the rest would have taken 50 s


@pytest.mark.parametrize("method", METHODS)
def test_an_abandoned_iterator_keeps_no_worker(pool: fiber.Pool, method: str) -> None:
    for _ in range(10):
        results = getattr(pool, method)(tasks.square, itertools.count())
        for _ in range(20):
            next(results)
        del results  # while its next batch is about to be sent
        until(lambda: pool.stats().running == 0, "the workers are free")


def test_a_pool_with_an_endless_stream_can_be_ended() -> None:
    items = Counting()
    with fiber.Pool(2) as pool:
        results = pool.imap(tasks.same, items)
        next(results)
    assert items.closed.wait(10)
    with pytest.raises(fiber.PoolTerminated):
        list(itertools.islice(results, 10_000_000))


def test_many_streams_at_once(pool: fiber.Pool) -> None:
    streams = [pool.imap(tasks.same, itertools.count(n)) for n in range(10)]
    for step in range(200):
        assert [next(stream) for stream in streams] == [n + step for n in range(10)]


# How items are spread --------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 10, 1500])
def test_nobody_waits_behind_a_slow_item(place: int, tmp_path: Path) -> None:
    """The slow one ends only when all the others are there."""
    flag = tmp_path / "flag"
    with fiber.Pool(4) as pool:
        pool.map(tasks.square, range(8))
        func = functools.partial(tasks.wait_at, place, str(flag))
        results = pool.imap_unordered(func, range(3000))
        others = [results.next(timeout=60) for _ in range(2999)]
        flag.touch()
        assert list(results) == [place]
    assert sorted([*others, place]) == list(range(3000))


def test_a_slow_item_of_map_costs_its_own_time_only() -> None:
    with fiber.Pool(4) as pool:
        pool.map(tasks.square, range(8))
        begin = time.monotonic()
        func = functools.partial(tasks.nap_at, 2000, 1.5, 0.001)
        assert pool.map(func, range(3000)) == list(range(3000))
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("how", ["map", "imap", "imap_unordered"])
def test_long_tasks_are_spread_though_the_function_was_fast(how: str) -> None:
    with fiber.Pool(4) as pool:
        pool.map(tasks.nap, [0.0] * 5000)
        begin = time.monotonic()
        assert list(getattr(pool, how)(tasks.nap, [0.5] * 4)) == [0.5] * 4
        assert time.monotonic() - begin < 1.2


def test_few_tasks_are_spread_from_the_beginning() -> None:
    with fiber.Pool(4) as pool:
        pool.map(tasks.square, range(8))
        begin = time.monotonic()
        assert pool.map(tasks.nap, [0.5] * 8) == [0.5] * 8
        assert time.monotonic() - begin < 1.6
