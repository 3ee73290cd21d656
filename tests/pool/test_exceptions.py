"""What a task raises and what cannot travel fail their own item, say why, and cost no worker."""

from __future__ import annotations

import functools
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.pool import tasks

import fiber

HOW = ["map", "starmap", "imap", "imap_unordered", "apply"]
Collect = Callable[..., tuple[list[Any], list[BaseException]]]


def printed(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.fixture
def pool() -> Iterator[fiber.Pool]:
    """A pool that must be as good as new after the test."""
    with fiber.Pool(2) as pool:
        yield pool
        assert pool.map(tasks.square, range(20)) == [x * x for x in range(20)]
        assert pool.stats().died == 0


# Raised by a task ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_an_exception_arrives_as_itself(pool: fiber.Pool, how: str, collect: Collect) -> None:
    values, (error,) = collect(pool, how, functools.partial(tasks.fail_at, "custom", 3), range(10))
    assert values == [x for x in range(10) if x != 3]
    assert type(error) is tasks.Custom
    assert (error.args, error.code) == ((1, "x"), 1)


def test_the_remote_traceback_shows_where(pool: fiber.Pool) -> None:
    with pytest.raises(tasks.Custom) as caught:
        pool.map(tasks.raise_custom, [1])
    line = tasks.raise_custom.__code__.co_firstlineno + 1
    for text in (printed(caught.value), str(caught.value.__cause__)):
        assert f'tasks.py", line {line}, in raise_custom' in text
        assert 'raise Custom(42, f"about {x}")' in text
    assert "pool/worker.py" not in str(caught.value.__cause__)


@pytest.mark.parametrize("how", HOW)
def test_the_remote_traceback_is_the_users_alone(
    pool: fiber.Pool, how: str, collect: Collect
) -> None:
    _, (error,) = collect(pool, how, tasks.raise_custom, [1])
    assert "in raise_custom" in str(error.__cause__)
    assert "worker.py" not in str(error.__cause__)


def test_causes_notes_and_attributes_arrive(pool: fiber.Pool) -> None:
    with pytest.raises(ValueError) as caught:
        pool.apply(tasks.raise_with_cause, (1,))
    text = printed(caught.value)
    assert "KeyError: 'missing'" in text
    assert "direct cause of the following exception" in text
    with pytest.raises(ValueError) as caught:
        pool.apply(tasks.raise_with_notes, (1,))
    assert caught.value.__notes__ == ["first note", "second note"]
    with pytest.raises(ValueError) as caught:
        pool.apply(tasks.raise_with_attribute, (17,))
    assert caught.value.position == 17  # type: ignore[attr-defined]


def test_an_exception_that_arrived_can_be_pickled_on(pool: fiber.Pool) -> None:
    with pytest.raises(tasks.Custom) as caught:
        pool.apply(tasks.raise_custom, (1,))
    assert pickle.loads(pickle.dumps(caught.value)).code == 42


@pytest.mark.parametrize("kind", ["recursion", "memory", "os"])
def test_pythons_own_exceptions_arrive_as_themselves(pool: fiber.Pool, kind: str) -> None:
    expected = tasks.make_error(kind)
    with pytest.raises(type(expected)) as caught:
        pool.map(functools.partial(tasks.fail_at, kind, 3), range(10))
    assert caught.value.args == expected.args
    assert str(caught.value) == str(expected)


def test_endless_recursion_fails_its_item(pool: fiber.Pool) -> None:
    def descend(x: int) -> int:
        return descend(x) if x == 3 else x

    results = pool.map(descend, range(10), return_exceptions=True)
    assert type(results.pop(3)) is RecursionError
    assert results == [x for x in range(10) if x != 3]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("unpicklable", "Unpicklable", "holds a lock"),
        ("unloadable", "Unloadable", "one and other"),
        ("mute", "Mute", ""),
    ],
)
def test_an_exception_that_cannot_travel_has_a_stand_in(
    pool: fiber.Pool, how: str, kind: str, name: str, text: str, collect: Collect
) -> None:
    func = functools.partial(tasks.fail_at, kind, 3)
    values, (error,) = collect(pool, how, func, range(10))
    assert values == [x for x in range(10) if x != 3]
    if kind != "mute":
        assert type(error) is fiber.RemoteError
        assert error.type_name == f"{tasks.__name__}.{name}"
        assert "in fail_at" in error.traceback
        assert text in str(error)
    assert name in printed(error)
    assert text in printed(error)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("exit", "SystemExit"),
        ("interrupt", "KeyboardInterrupt"),
        ("generator exit", "GeneratorExit"),
        ("stop", "StopIteration"),
        ("plain", "Plain"),
    ],
)
def test_exceptions_that_mean_the_end_end_only_their_item(
    pool: fiber.Pool, how: str, kind: str, name: str, collect: Collect
) -> None:
    for place in (0, 3, 9):
        func = functools.partial(tasks.fail_at, kind, place)
        values, errors = collect(pool, how, func, range(10))
        assert values == [x for x in range(10) if x != place]
        (error,) = errors
        assert isinstance(error, Exception)
        assert name in printed(error)
        assert "in fail_at" in printed(error)


@pytest.mark.parametrize("chunksize", [None, 1, 5])
@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
def test_a_task_cannot_end_the_iteration(
    pool: fiber.Pool, method: str, chunksize: int | None
) -> None:
    """A StopIteration out of `next` would look as if there were no more results."""
    func = functools.partial(tasks.fail_at, "stop", 2)
    with pytest.raises(Exception, match="a value"):
        list(getattr(pool, method)(func, range(10), chunksize))


def test_every_item_may_fail(pool: fiber.Pool) -> None:
    def fail(x: int) -> None:
        raise ValueError(x)

    results = pool.map(fail, range(3000), return_exceptions=True)
    assert [error.args for error in results] == [(x,) for x in range(3000)]


@pytest.mark.parametrize("kind", ["value", "interrupt"])
@pytest.mark.parametrize("how", HOW)
def test_an_exception_that_cannot_be_loaded_at_home(
    pool: fiber.Pool, how: str, kind: str, collect: Collect
) -> None:
    func = functools.partial(tasks.evil_at, os.getpid(), kind, 3)
    values, (error,) = collect(pool, how, func, range(10))
    assert values == [x for x in range(10) if x != 3]
    assert type(error) is fiber.RemoteError
    assert "Evil" in str(error)
    assert "in evil_at" in printed(error)


# What cannot be pickled or unpickled -----------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["lock", "generator", "deep"])
def test_a_result_that_cannot_be_pickled_fails_its_item(
    pool: fiber.Pool, how: str, kind: str, collect: Collect
) -> None:
    func = functools.partial(tasks.return_at, kind, os.getpid(), 3)
    values, (error,) = collect(pool, how, func, range(10))
    assert values == [x for x in range(10) if x != 3]
    assert isinstance(error, fiber.pool.MaybeEncodingError)
    assert {"lock": "lock", "generator": "generator", "deep": "ecursion"}[kind] in str(error)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["value", "exit", "interrupt", "stop", "unpicklable"])
def test_a_result_that_cannot_be_unpickled_fails_its_item(
    pool: fiber.Pool, how: str, kind: str, collect: Collect
) -> None:
    func = functools.partial(tasks.return_at, kind, os.getpid(), 3)
    values, (error,) = collect(pool, how, func, range(10))
    assert values == [x for x in range(10) if x != 3]
    assert type(error) is fiber.SerializationError
    assert type(tasks.make_error(kind)).__name__ in str(error)
    if how != "apply":
        assert "item 3" in str(error)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("chunksize", [None, 4])
def test_an_argument_that_cannot_be_pickled_fails_its_item(
    pool: fiber.Pool, how: str, chunksize: int | None, collect: Collect
) -> None:
    items: list[Any] = list(range(10))
    items[3] = threading.Lock()
    values, (error,) = collect(pool, how, tasks.same, items, chunksize)
    assert values == [x for x in range(10) if x != 3]
    assert type(error) is fiber.SerializationError
    assert "lock" in str(error)
    assert ("same" if how == "apply" else "item 3 of same") in str(error)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["value", "exit", "interrupt", "unpicklable", "stop"])
def test_an_argument_that_cannot_be_unpickled_fails_its_item(
    pool: fiber.Pool, how: str, kind: str, collect: Collect
) -> None:
    items: list[Any] = list(range(10))
    items[3] = tasks.LoadsOnlyHere(os.getpid(), here=True, kind=kind)
    values, (error,) = collect(pool, how, tasks.same, items)
    assert values == [x for x in range(10) if x != 3]
    assert type(error) is fiber.SerializationError
    assert type(tasks.make_error(kind)).__name__ in printed(error)
    if how != "apply":
        assert "item 3" in str(error)


def test_what_ran_before_such_an_argument_does_not_run_again(
    pool: fiber.Pool, tmp_path: Path
) -> None:
    def note(item: Any) -> None:
        with open(tmp_path / "ran", "a") as file:  # a line at the end is written whole
            file.write(f"{item}\n")

    pool.map(note, [["warm"]] * 200)  # so that batches are large
    items: list[Any] = [[number] for number in range(200)]
    items[90] = tasks.LoadsOnlyHere(os.getpid(), here=True)
    results = pool.map(note, items, return_exceptions=True)
    assert [place for place, error in enumerate(results) if error is not None] == [90]
    assert "item 90 of" in str(results[90])
    ran = (tmp_path / "ran").read_text().split("\n")[200:-1]
    assert sorted(ran) == sorted(str([number]) for number in range(200) if number != 90)


def test_bad_arguments_among_many(pool: fiber.Pool) -> None:
    items: list[Any] = list(range(2000))
    pool.map(tasks.same, items)  # large batches from the beginning
    for place in (0, 500, 501, 1999):
        items[place] = threading.Lock()
    results = pool.map(tasks.same, items, return_exceptions=True)
    failed = [place for place, r in enumerate(results) if isinstance(r, BaseException)]
    assert failed == [0, 500, 501, 1999]
    assert [f"item {place} of same" in str(results[place]) for place in failed] == [True] * 4
    assert [r for r in results if isinstance(r, int)] == [x for x in items if isinstance(x, int)]


def test_an_argument_that_ends_who_unpickles_it_fails_alone() -> None:
    with fiber.Pool(2, retries=1) as pool:
        items: list[Any] = list(range(50))
        items[20] = tasks.LoadKills(os.getpid())
        results = pool.map(tasks.same, items, return_exceptions=True)
        error = results.pop(20)
        assert type(error) is fiber.WorkerDied
        assert (error.item, error.exitcode) == (20, 9)
        assert results == [x for x in range(50) if x != 20]


@pytest.mark.parametrize("how", HOW)
def test_a_function_that_cannot_be_pickled_is_refused(pool: fiber.Pool, how: str) -> None:
    lock = threading.Lock()

    def locked(x: int) -> int:
        with lock:
            return x

    with pytest.raises(fiber.SerializationError, match=r"locked.*cannot be sent.*lock"):
        getattr(pool, how)(locked, [1])
    with pytest.raises(fiber.SerializationError, match="lock"):
        getattr(pool, how)(functools.partial(tasks.same, lock), [1])


@pytest.mark.parametrize("how", HOW)
def test_a_function_that_cannot_be_unpickled_fails_every_item(
    pool: fiber.Pool, how: str, collect: Collect
) -> None:
    func = functools.partial(tasks.same, tasks.LoadsOnlyHere(os.getpid(), here=True))
    values, errors = collect(pool, how, func, range(5))
    assert values == []
    assert [type(error) for error in errors] == [fiber.SerializationError] * 5
    assert "bad value" in str(errors[0])


def test_a_generator_that_yields_what_cannot_be_pickled(pool: fiber.Pool) -> None:
    results = pool.imap(tasks.same, (x if x != 2 else threading.Lock() for x in range(5)))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(fiber.SerializationError, match="item 2"):
        next(results)
    assert list(results) == [3, 4]
