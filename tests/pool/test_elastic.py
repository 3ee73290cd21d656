"""Elastic pools: workers come while items wait and go when they are idle, and no work is lost."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.pool import tasks
from tests.waiting import until

import fiber


@pytest.fixture
def quick() -> Iterator[None]:
    """Let workers be idle for a moment only."""
    fiber.config.pool_idle_timeout = 0.2
    yield
    fiber.reset()


def size(pool: fiber.Pool) -> tuple[int, int]:
    """Return how many workers there should be, and are."""
    stats = pool.stats()
    return stats.processes, stats.ready


def wait_for_size(pool: fiber.Pool, workers: int) -> None:
    until(lambda: size(pool) == (workers, workers), f"{workers} workers", patience=20)


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def meeting(folder: Path, submit: Callable[[Callable[[Any], Any], range], Any], size: int) -> Any:
    """Submit items that all wait until `size` of them run at once; return what was submitted."""
    log, flag = folder / "log", folder / "flag"
    wait = functools.partial(tasks.wait_for, str(flag))
    submitted = submit(functools.partial(tasks.log_and, str(log), wait), range(size))
    until(lambda: lines_of(log) == size, f"{size} items run at once", patience=30)
    flag.touch()
    return submitted


# Growing ----------------------------------------------------------------------------------------


def test_a_pool_begins_with_the_least() -> None:
    with fiber.Pool((2, 5)) as pool:
        wait_for_size(pool, 2)
        assert pool.map(tasks.square, range(4)) == [0, 1, 4, 9]
        stats = pool.stats()
        assert (stats.minimum, stats.maximum) == (2, 5)


def test_a_pool_grows_to_the_most_while_long_items_wait(tmp_path: Path) -> None:
    with fiber.Pool((1, 6)) as pool:
        result = meeting(tmp_path, pool.map_async, 6)
        assert result.get(20) == list(range(6))
        assert size(pool) == (6, 6)


def test_a_pool_has_no_more_workers_than_items_that_wait(tmp_path: Path) -> None:
    with fiber.Pool((1, 50)) as pool:
        result = meeting(tmp_path, pool.map_async, 4)
        assert result.get(20) == list(range(4))
        assert pool.stats().processes == 4


def test_a_pool_grows_for_many_calls_of_one_item_each(tmp_path: Path) -> None:
    def submit(func: Callable[[Any], Any], items: range) -> list[Any]:
        return [pool.apply_async(func, (item,)) for item in items]

    with fiber.Pool((1, 5)) as pool:
        results = meeting(tmp_path, submit, 5)
        assert [result.get(20) for result in results] == list(range(5))


@pytest.mark.parametrize("how", ["imap", "imap_unordered"])
@pytest.mark.parametrize("make", [list, iter])
def test_a_pool_grows_for_streams(tmp_path: Path, how: str, make: Callable[..., Any]) -> None:
    """Far more items are read than the few workers that there are at first could take."""
    fiber.config.imap_buffer = 2
    with fiber.Pool((1, 10)) as pool:
        results = meeting(tmp_path, lambda f, items: getattr(pool, how)(f, make(items)), 10)
        assert sorted(results) == list(range(10))
    fiber.reset()


@pytest.mark.parametrize("make", [list, iter])
def test_workers_that_come_up_late_take_part_in_a_stream(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    fiber.config.imap_buffer = 1
    with fiber.Pool(6) as pool:
        results = meeting(tmp_path, lambda f, items: pool.imap(f, make(items)), 6)
        assert list(results) == list(range(6))
    fiber.reset()


def test_workers_are_used_as_they_come_up(tmp_path: Path) -> None:
    """The others are held up by their initializer for as long as the results are not there."""
    flag, first = tmp_path / "flag", tmp_path / "first"
    with fiber.Pool(4, initializer=tasks.let_one_in, initargs=(str(first), str(flag))) as pool:
        assert pool.map(tasks.square, range(100)) == [x * x for x in range(100)]
        assert pool.stats().ready == 1
        flag.touch()
        wait_for_size(pool, 4)


def test_each_new_worker_is_initialized(tmp_path: Path) -> None:
    with fiber.Pool((1, 4), initializer=tasks.keep, initargs=("here",)) as pool:
        assert meeting(tmp_path, pool.map_async, 4).get(20) == [0, 1, 2, 3]
        kept = pool.map(tasks.kept, range(200), chunksize=1)
        assert set(kept) == {("here",)}


# Shrinking --------------------------------------------------------------------------------------


def test_idle_workers_end(tmp_path: Path, quick: None) -> None:
    with fiber.Pool((2, 6)) as pool:
        meeting(tmp_path, pool.map_async, 6).get(20)
        wait_for_size(pool, 2)
        until(lambda: len(pool.pids()) == 2, "2 processes")
        assert pool.stats().died == 0
        assert pool.map(tasks.square, range(50)) == [x * x for x in range(50)]


def test_a_pool_of_none_has_no_process_while_it_is_idle(quick: None) -> None:
    with fiber.Pool((0, 3)) as pool:
        for _ in range(3):
            wait_for_size(pool, 0)
            until(lambda: pool.pids() == [], "no process")
            assert pool.map(tasks.square, range(20)) == [x * x for x in range(20)]
            assert pool.apply(tasks.square, (7,)) == 49
            assert list(pool.imap(tasks.square, iter(range(5)))) == [0, 1, 4, 9, 16]


def test_who_has_a_long_item_stays(tmp_path: Path, quick: None) -> None:
    flag = tmp_path / "flag"
    with fiber.Pool((0, 3)) as pool:
        result = pool.map_async(functools.partial(tasks.wait_for, str(flag)), range(3))
        wait_for_size(pool, 3)
        time.sleep(1)  # several times as long as one may be idle
        assert size(pool) == (3, 3)
        flag.touch()
        assert result.get(20) == [0, 1, 2]
        wait_for_size(pool, 0)


def test_a_pool_that_breathes_loses_nothing(quick: None) -> None:
    fiber.config.pool_idle_timeout = 0.01
    with fiber.Pool((0, 6)) as pool:
        for turn in range(30):
            items = [turn * 1000 + item for item in range(turn * 3)]
            assert pool.map(tasks.square, items) == [x * x for x in items]
            time.sleep(random.Random(turn).random() * 0.06)
        assert pool.stats().died == 0


def test_work_that_comes_as_a_worker_ends_is_done(quick: None) -> None:
    """Each call comes about when the last worker is asked to end."""
    fiber.config.pool_idle_timeout = 0.05
    with fiber.Pool((0, 1)) as pool:
        for turn in range(40):
            assert pool.apply(tasks.square, (turn,)) == turn * turn
            time.sleep(0.04 + 0.001 * turn)


# Together with what else a pool does --------------------------------------------------------------


def test_killed_workers_cost_no_result(quick: None) -> None:
    with fiber.Pool((1, 8)) as pool:
        result = pool.map_async(functools.partial(tasks.nap_at, -1, 0, 0.01), range(600))
        until(lambda: pool.stats().ready >= 4, "4 workers")
        for pid in pool.pids()[:4]:
            os.kill(pid, signal.SIGKILL)
        assert result.get(60) == pool.map(functools.partial(tasks.nap_at, -1, 0, 0), range(600))
        wait_for_size(pool, 1)


def test_workers_that_have_done_their_tasks_are_replaced_while_they_are_wanted(
    quick: None,
) -> None:
    with fiber.Pool((1, 4), maxtasksperchild=3) as pool:
        stamps = pool.map(tasks.stamp, range(60), chunksize=1)
        assert [x for _, _, x in stamps] == list(range(60))
        assert max(before for _, before, _ in stamps) <= 2
        wait_for_size(pool, 1)


@pytest.mark.parametrize("wait", ["join", "results"])
def test_a_closed_pool_grows_and_ends(tmp_path: Path, wait: str) -> None:
    pool = fiber.Pool((0, 5))

    def submit(func: Callable[[Any], Any], items: range) -> Any:
        result = pool.map_async(func, items)
        pool.close()
        return result

    result = meeting(tmp_path, submit, 5)
    if wait == "join":
        pool.join()
    assert result.get(20) == list(range(5))
    pool.join()
    assert pool.pids() == []


def test_a_pool_ends_in_the_midst_of_its_growth(tmp_path: Path) -> None:
    pool = fiber.Pool((1, 30))
    result = pool.map_async(functools.partial(tasks.wait_for, str(tmp_path / "never")), range(30))
    until(lambda: pool.stats().processes > 1, "it grows")
    pool.terminate()
    pool.join()
    assert pool.pids() == []
    with pytest.raises(fiber.PoolTerminated):
        result.get(10)


def test_a_poison_item_fails_alone(quick: None) -> None:
    with fiber.Pool((0, 3), retries=1) as pool:
        die = functools.partial(tasks.die_at, "SIGKILL", (7,))
        outcomes = pool.map(die, range(20), return_exceptions=True)
        assert isinstance(outcomes[7], fiber.WorkerDied)
        assert [x for x in outcomes if not isinstance(x, Exception)] == [
            x for x in range(20) if x != 7
        ]


def test_an_initializer_that_fails_ends_the_pool() -> None:
    pool = fiber.Pool((0, 3), initializer=tasks.log_and_raise, initargs=(os.devnull,))
    with pytest.raises(LookupError, match="no luck here"):
        pool.map(tasks.square, range(10))
    pool.terminate()


# How it is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize("given", [(3, 3), [3, 3]])
def test_a_range_of_one_number_is_that_number(given: Any) -> None:
    with fiber.Pool(given) as pool:
        assert "processes=3" in repr(pool)
        wait_for_size(pool, 3)


def test_a_pool_says_its_range() -> None:
    with fiber.get_context("local").Pool(processes=(0, 3)) as pool:
        assert repr(pool) == "<fiber.Pool running processes=(0, 3)>"
        assert pool._processes == 3


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((1, 2, 3), ValueError, r"a pair of the least and the most, not \(1, 2, 3\)"),
        ((), ValueError, r"a pair of the least and the most, not \(\)"),
        ((5, 2), ValueError, r"the least and then the most, not \(5, 2\)"),
        ((0, 0), ValueError, "the most of processes must be at least 1, not 0"),
        ((-1, 2), ValueError, "the least of processes must be at least 0, not -1"),
        ((1, 2.5), TypeError, "the most of processes must be a whole number, not 2.5"),
        ((None, 2), TypeError, "the least of processes must be a whole number, not None"),
        ({1, 2}, TypeError, "processes must be a whole number"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(
    given: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fiber.Pool(given)
