"""Every way to have a pool work, compared with what multiprocessing's pool does."""

from __future__ import annotations

import functools
import math
import multiprocessing
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tests.pool import tasks

import fiber


@pytest.fixture(scope="module")
def oracle() -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield pool


def outcome(call: Callable[[Any], Any], pool: Any) -> Any:
    try:
        return "returned", call(pool)
    except Exception as error:
        return "raised", type(error), error.args


def steps(results: Any) -> list[Any]:
    """What an iterator gives, exceptions included, until it ends."""
    seen: list[Any] = []
    while True:
        try:
            seen.append(next(results))
        except StopIteration:
            return seen
        except Exception as error:
            seen.append((type(error), error.args))


fail_at_3 = functools.partial(tasks.fail_at, "value", 3)

SAME: dict[str, Callable[[Any], Any]] = {
    "apply": lambda p: p.apply(tasks.square, (7,)),
    "apply without arguments": lambda p: p.apply(tasks.show),
    "apply with keywords": lambda p: p.apply(tasks.show, (1, 2), {"b": 3, "a": 4}),
    "apply with a list": lambda p: p.apply(tasks.show, [1, 2]),
    "apply that raises": lambda p: p.apply(fail_at_3, (3,)),
    "apply of None": lambda p: p.apply(tasks.same, (None,)),
    "apply with too many arguments": lambda p: p.apply(tasks.square, (1, 2)),
    "apply_async": lambda p: p.apply_async(tasks.show, (1,), {"a": 2}).get(),
    "apply_async by keyword": lambda p: p.apply_async(func=tasks.show, kwds={"a": 2}).get(10),
    "map": lambda p: p.map(tasks.square, [1, 2, 3]),
    "map by keyword": lambda p: p.map(func=tasks.square, iterable=[1, 2], chunksize=1),
    "map of nothing": lambda p: p.map(tasks.square, []),
    "map of an empty generator": lambda p: p.map(tasks.square, (x for x in ())),
    "map of a generator": lambda p: p.map(tasks.square, (x for x in range(50))),
    "map of a range": lambda p: p.map(tasks.square, range(1000)),
    "map of a string": lambda p: p.map(ord, "häßlich"),
    "map of bytes": lambda p: p.map(tasks.square, b"bytes"),
    "map of a dict": lambda p: p.map(str.upper, {"a": 1, "b": 2}),
    "map of a set": lambda p: p.map(tasks.square, {5, 3, 1}),
    "map of tuples": lambda p: p.map(sum, [(1, 2), (3, 4)]),
    "map of an iterator": lambda p: p.map(tasks.square, iter([1, 2, 3])),
    "map with chunksize 1": lambda p: p.map(tasks.square, range(100), 1),
    "map with chunksize 7": lambda p: p.map(tasks.square, range(100), chunksize=7),
    "map with a large chunksize": lambda p: p.map(tasks.square, range(100), 10_000),
    "map that raises": lambda p: p.map(fail_at_3, range(10)),
    "map of what is not iterable": lambda p: p.map(tasks.square, 5),
    "map with the generator raising": lambda p: p.map(tasks.square, (1 // x for x in (1, 0))),
    "map_async": lambda p: p.map_async(tasks.square, range(10)).get(10),
    "map_async of nothing": lambda p: p.map_async(tasks.square, []).get(10),
    "starmap": lambda p: p.starmap(pow, [(2, 3), (3, 2)]),
    "starmap of nothing": lambda p: p.starmap(pow, []),
    "starmap of strings": lambda p: p.starmap(tasks.show, ["ab", "cde"]),
    "starmap of a generator": lambda p: p.starmap(pow, ((x, 2) for x in range(20))),
    "starmap with a chunksize": lambda p: p.starmap(pow, ((x, x) for x in range(20)), 6),
    "starmap that raises": lambda p: p.starmap(fail_at_3, [(1,), (3,)]),
    "starmap of what cannot be unpacked": lambda p: p.starmap(pow, [1, 2]),
    "starmap_async": lambda p: p.starmap_async(pow, [(2, 3)]).get(10),
    "imap": lambda p: list(p.imap(tasks.square, range(300))),
    "imap of nothing": lambda p: list(p.imap(tasks.square, [])),
    "imap of a generator": lambda p: list(p.imap(tasks.square, (x for x in range(300)))),
    "imap with chunksize 7": lambda p: list(p.imap(tasks.square, range(300), chunksize=7)),
    "imap of a string": lambda p: list(p.imap(ord, "text")),
    "imap that raises": lambda p: steps(p.imap(fail_at_3, range(6))),
    "imap of what is not iterable": lambda p: list(p.imap(tasks.square, 5)),
    "imap with chunksize 0": lambda p: p.imap(tasks.square, [1], 0),
    "imap_unordered": lambda p: sorted(p.imap_unordered(tasks.square, range(300))),
    "imap_unordered of nothing": lambda p: list(p.imap_unordered(tasks.square, ())),
    "imap_unordered with a chunksize": lambda p: sorted(
        p.imap_unordered(tasks.square, range(300), chunksize=11)
    ),
    "imap_unordered with chunksize -1": lambda p: p.imap_unordered(tasks.square, [1], -1),
    "a builtin": lambda p: p.map(abs, [-1, 2]),
    "a function of C": lambda p: p.map(math.sqrt, [4.0, 9.0]),
    "a partial": lambda p: p.map(functools.partial(pow, 2), [3, 4]),
    "an operator": lambda p: p.map(operator.itemgetter(1), [(1, 2), (3, 4)]),
    "a bound method": lambda p: p.map(tasks.Scaler(2).scale, [1, 2]),
    "a class method": lambda p: p.map(tasks.Scaler.thrice, [1, 2]),
    "an instance": lambda p: p.map(tasks.Scaler(4), [1, 2]),
    "a class": lambda p: p.map(tasks.Scaler, [1, 2]),
    "a method of str": lambda p: p.map("-".join, [["a", "b"], "cd"]),
}


@pytest.mark.parametrize("call", SAME.values(), ids=SAME.keys())
def test_it_does_what_multiprocessing_does(
    call: Callable[[Any], Any], pool: fiber.Pool, oracle: Any
) -> None:
    expected, found = outcome(call, oracle), outcome(call, pool)
    if expected[0] == "raised" and expected[1] in (TypeError, ValueError):
        # Python's own errors; the words of those that the pool finds are its own.
        assert found[:2] == expected[:2]
        assert not expected[2] or not str(expected[2]).startswith("bad") or found == expected
    else:
        assert found == expected


def test_numpy_arrays_are_iterables_as_any_other(pool: fiber.Pool) -> None:
    rows = np.arange(12.0).reshape(4, 3)
    assert np.array_equal(pool.map(np.sum, rows), rows.sum(axis=1))
    assert np.array_equal(list(pool.imap(np.sum, rows)), rows.sum(axis=1))
    assert pool.starmap(tasks.show, np.array([[1, 2]])) == [tasks.show(*np.array([1, 2]))]
    assert pool.map(tasks.square, np.array([], dtype=int)) == []
    assert pool.map(tasks.square, np.arange(1000)) == [x * x for x in range(1000)]


@pytest.mark.parametrize("size", [0, 1, 100_000, 8_000_000])
def test_arrays_travel_both_ways_and_can_be_changed(pool: fiber.Pool, size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = pool.map(tasks.square, [np.arange(size, dtype=np.uint8)] * 3)
    for result in results:
        assert np.array_equal(result, np.square(np.arange(size, dtype=np.uint8)))
        result += 1  # it is the caller's own


@pytest.mark.parametrize("size", [0, 1, 1 << 16, 1 << 20, (1 << 24) + 1])
def test_bytes_of_any_size_travel_both_ways(pool: fiber.Pool, size: int) -> None:
    data = bytes(i % 251 for i in range(min(size, 1000))) * (size // 1000 + 1)
    assert pool.map(tasks.same, [data, bytearray(data)]) == [data, data]


def test_lambdas_and_closures_are_functions_too(pool: fiber.Pool) -> None:
    offset = 10

    def shifted(x: int) -> int:
        return x + offset

    class Local:
        def __init__(self, x: int) -> None:
            self.x = x

    assert pool.map(lambda x: x + 1, [1, 2]) == [2, 3]
    assert pool.map(shifted, [1, 2]) == [11, 12]
    assert [local.x for local in pool.imap(Local, range(3))] == [0, 1, 2]
    assert pool.apply(lambda f, x: f(x), (shifted, 5)) == 15


@pytest.mark.parametrize("how", ["map", "imap", "imap_unordered"])
@pytest.mark.parametrize("chunksize", [3, 10, 64])
def test_items_of_a_chunk_run_in_one_worker_in_order(
    pool: fiber.Pool, how: str, chunksize: int
) -> None:
    results = sorted(getattr(pool, how)(tasks.stamp, range(500), chunksize), key=lambda r: r[2])
    assert [x for _, _, x in results] == list(range(500))
    for start in range(0, 500, chunksize):
        chunk = results[start : start + chunksize]
        pid, first, _ = chunk[0]
        assert [r[:2] for r in chunk] == [(pid, first + i) for i in range(len(chunk))]


def test_a_chunk_with_slow_items_stays_together(pool: fiber.Pool) -> None:
    def slow_stamp(x: int) -> tuple[int, int, int]:
        tasks.nap(0.03)
        return tasks.stamp(x)

    results = pool.map(slow_stamp, range(20), chunksize=5)
    for start in range(0, 20, 5):
        assert len({pid for pid, _, _ in results[start : start + 5]}) == 1


def test_imap_keeps_the_order_and_imap_unordered_does_not_wait(pool: fiber.Pool) -> None:
    naps = [0.3, 0.0, 0.0, 0.0]
    assert list(pool.imap(tasks.nap, naps)) == naps
    assert list(pool.imap_unordered(tasks.nap, naps)) == [0.0, 0.0, 0.0, 0.3]


def test_all_workers_take_part(pool: fiber.Pool) -> None:
    pids = {pid for pid, _, _ in pool.map(tasks.stamp, range(5000))}
    for _ in range(100):
        pids |= set(pool.map(lambda x: tasks.nap(0.005) and tasks.pid_of(), range(4)))
    assert pids == set(pool.pids())


@pytest.mark.parametrize("how", ["map", "starmap", "imap", "imap_unordered"])
def test_exceptions_can_be_results(pool: fiber.Pool, how: str) -> None:
    items = [(x,) for x in range(100)] if how == "starmap" else range(100)
    results = list(getattr(pool, how)(fail_at_3, items, return_exceptions=True))
    assert len(results) == 100
    (error,) = (r for r in results if isinstance(r, BaseException))
    assert type(error) is ValueError
    assert sorted(r for r in results if r is not error) == [x for x in range(100) if x != 3]
    if how != "imap_unordered":
        assert results[3] is error


def test_exceptions_that_are_returned_are_results(pool: fiber.Pool) -> None:
    (result,) = pool.map(ValueError, [1])
    assert type(result) is ValueError
    assert result.args == (1,)


def test_map_raises_the_first_error_in_order(pool: fiber.Pool) -> None:
    def fail(x: int) -> None:
        tasks.nap(0.1 if x == 2 else 0)
        if x >= 2:
            raise ValueError(x)

    with pytest.raises(ValueError) as caught:
        pool.map(fail, range(50))
    assert caught.value.args == (2,)


WRONG: dict[str, tuple[Callable[[fiber.Pool], object], type[Exception], str]] = {
    "a function that is none": (lambda p: p.map(5, [1]), TypeError, "5 is not callable"),
    "no function": (lambda p: p.apply(None), TypeError, "None is not callable"),
    "chunksize 0": (lambda p: p.map(abs, [1], 0), ValueError, "chunksize must be at least 1"),
    "chunksize 1.5": (lambda p: p.map(abs, [1], 1.5), TypeError, "chunksize must be a whole"),
    "retries below 0": (lambda p: p.map(abs, [1], retries=-1), ValueError, "retries must be"),
    "retries of text": (lambda p: p.imap(abs, [1], retries="2"), TypeError, "retries must be"),
    "timeout 0": (lambda p: p.apply(abs, (1,), timeout=0), ValueError, "timeout must be above"),
    "timeout of text": (lambda p: p.imap(abs, [1], timeout="1"), TypeError, "timeout must be"),
}


@pytest.mark.parametrize(("call", "kind", "text"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_told_at_once(
    pool: fiber.Pool, call: Callable[[fiber.Pool], object], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        call(pool)
    assert pool.map(abs, [-1]) == [1]
    pool.close()
    pool.join()  # nothing of the wrong call is waited for


def test_a_wrong_iterable_leaves_nothing_to_wait_for(pool: fiber.Pool) -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("no items today")

    kept = []
    for iterable in (5, Broken()):
        try:
            list(pool.imap(tasks.square, iterable))  # type: ignore[arg-type]
        except (TypeError, OSError) as error:
            kept.append(error)  # and with it the frames that it came through
    assert [type(error) for error in kept] == [TypeError, OSError]
    pool.close()
    pool.join()
