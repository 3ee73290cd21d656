"""Tasks of one batch do not see each other's arguments, and a result is what it was when it came.

Batches follow durations, so that what shared would differ from run to run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

import fiber

REUSED = [0]


def reuse(x: int) -> list[int]:
    """Return the same list each time, as environments and buffers do."""
    REUSED[0] = x
    return REUSED


@pytest.mark.parametrize("how", ["map", "imap", "imap_unordered"])
def test_a_result_is_what_it_was_when_it_was_returned(pool: fiber.Pool, how: str) -> None:
    results = [list(value) for value in getattr(pool, how)(reuse, range(3000))]
    assert sorted(results) == [[x] for x in range(3000)]


def test_an_array_that_is_reused_arrives_as_it_was(pool: fiber.Pool) -> None:
    numpy = pytest.importorskip("numpy")
    buffer = numpy.zeros(2000)

    def fill(x: int) -> Any:
        buffer[:] = x
        return buffer

    assert [float(array[-1]) for array in pool.map(fill, range(500))] == [*map(float, range(500))]


@pytest.mark.parametrize("chunksize", [None, 1])
def test_tasks_do_not_share_an_argument(pool: fiber.Pool, chunksize: int | None) -> None:
    def grow(items: list[int]) -> int:
        items.append(1)
        return len(items)

    shared: list[int] = []
    assert set(pool.map(grow, [shared] * 2000, chunksize)) == {1}
    assert set(pool.starmap(grow, [(shared,)] * 2000, chunksize)) == {1}
    assert shared == []


class Counted:
    """Knows how many of its kind a process has."""

    there = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __setstate__(self, state: dict[str, int]) -> None:
        vars(self).update(state)
        Counted.there += 1

    def __del__(self) -> None:
        Counted.there -= 1


def test_an_argument_is_gone_when_the_next_one_is_made(pool: fiber.Pool) -> None:
    def count(one: Counted) -> int:
        return type(one).there

    pool.map(count, [Counted(0)] * 1000)  # so that batches are large
    assert set(pool.map(count, [Counted(number) for number in range(1000)])) == {1}
    assert max(pool.map(count, [Counted(number) for number in range(100)], 5)) <= 5


def test_the_items_of_a_chunk_share_as_they_do_in_multiprocessing(pool: fiber.Pool) -> None:
    def grow(items: list[int]) -> int:
        items.append(1)
        return len(items)

    assert pool.map(grow, [[]] * 10, chunksize=5) == [1, 2, 3, 4, 5] * 2


def test_numbers_of_numpy_are_not_the_same_in_every_worker(
    run_script: Callable[..., Any],
) -> None:
    pytest.importorskip("numpy")
    program = """
import time
import fiber
import numpy as np

np.random.rand()

def draw(x):
    time.sleep(0.05)
    return np.random.rand()

if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        print(len(set(pool.map(draw, range(8)))))
"""
    assert run_script(program).stdout == "8\n"


def test_an_argument_whose_pickling_ends_the_program_costs_its_item(pool: fiber.Pool) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            raise SystemExit("from pickling")

    results = pool.map(type, [*range(200), Evil()], return_exceptions=True)
    assert results[:200] == [int] * 200
    assert isinstance(results[200], fiber.SerializationError)
    evil = Evil()
    results = pool.map(type, [evil] * 2, return_exceptions=True)
    assert [type(result) for result in results] == [fiber.SerializationError] * 2
    assert pool.apply(abs, (-1,)) == 1


def test_more_buffers_than_a_short_can_count(pool: fiber.Pool) -> None:
    sent = [bytearray(8) for _ in range(70_000)]
    assert pool.apply(len, (sent,)) == 70_000
    assert len(pool.apply(lambda n: [bytearray(8) for _ in range(n)], (70_000,))) == 70_000


def test_a_huge_chunksize_is_one_chunk(pool: fiber.Pool) -> None:
    assert pool.map(abs, range(-5, 0), chunksize=1 << 40) == [5, 4, 3, 2, 1]
    assert pool.apply_async(abs, (-1,)).get(20) == 1


def test_a_dictionary_that_changes_under_imap_fails_there_alone(pool: fiber.Pool) -> None:
    items = dict.fromkeys(range(100_000))
    results = pool.imap(abs, items)
    assert next(results) == 0
    items[-1] = None
    with pytest.raises(RuntimeError, match="changed size"):
        list(results)
    assert pool.apply(abs, (-1,)) == 1


def test_a_wait_of_half_a_year_is_a_wait(pool: fiber.Pool) -> None:
    assert pool.apply_async(abs, (-1,)).get(1e8) == 1
    assert pool.apply_async(abs, (-1,), timeout=1e8).get(9999999) == 1
    slow = pool.apply_async(time.sleep, (0.3,), timeout=float("inf"))
    assert slow.get(float("inf")) is None


def test_a_folder_that_is_gone_costs_no_worker(run_script: Callable[..., Any]) -> None:
    program = """
import os, tempfile
import fiber

if __name__ == "__main__":
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    with fiber.Pool(2, maxtasksperchild=3) as pool:
        pool.map(abs, range(3))
        os.rmdir(folder)
        print(sum(pool.map(abs, range(100))))
"""
    assert run_script(program).stdout == "4950\n"


def test_a_finalizer_may_end_a_pool_at_any_time(run_script: Callable[..., Any]) -> None:
    program = """
import gc
import fiber

class Owner:
    def __init__(self):
        self.pool = fiber.Pool(1)
        self.me = self

    def __del__(self):
        self.pool.terminate()

class Collects:
    def __reduce__(self):
        gc.collect()
        return int, (3,)

if __name__ == "__main__":
    with fiber.Pool(1) as pool:
        for _ in range(5):
            Owner()
            print(pool.apply(abs, (Collects(),)))
"""
    done = run_script(program)
    assert done.stdout == "3\n" * 5
    assert done.stderr == ""


def test_a_fork_that_a_task_leaves_does_not_work_on(pool: fiber.Pool) -> None:
    def fork(x: int) -> int:
        if os.fork() == 0:
            raise RuntimeError("the child's own")
        return x

    assert pool.map(fork, range(4)) == [0, 1, 2, 3]
