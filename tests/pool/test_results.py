"""What the caller of an `_async` method and of `imap` holds: waiting, time-outs, callbacks."""

from __future__ import annotations

import builtins
import functools
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pool import tasks

import fiber

MakePool = Callable[..., Any]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def test_a_result_that_is_not_there_yet(make_pool: MakePool, gate: Path) -> None:
    result = make_pool(1).apply_async(tasks.wait_for, (str(gate), "late"))
    assert result.ready() is False
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    assert result.wait(0.01) is None
    assert result.wait(timeout=0) is None
    for timeout in (0, 0.01):
        with pytest.raises(multiprocessing.TimeoutError):
            result.get(timeout)
    gate.touch()
    assert result.get(timeout=20) == "late"
    assert result.wait() is None
    assert result.ready() is True
    assert result.successful() is True
    assert result.get() == "late"  # as often as one likes
    assert result.get(0) == "late"


def test_a_result_that_is_an_exception(make_pool: MakePool) -> None:
    result = make_pool(1).apply_async(tasks.fail_at, ("value", 1, 1))
    result.wait(20)
    assert result.ready() is True
    assert result.successful() is False
    for _ in range(2):
        with pytest.raises(ValueError, match="bad value"):
            result.get()


@pytest.mark.parametrize("method", ["map_async", "starmap_async"])
def test_a_map_result_is_ready_when_all_items_are(
    make_pool: MakePool, gate: Path, method: str
) -> None:
    items = [(str(gate), x) for x in range(5)]
    func = tasks.wait_for if method == "starmap_async" else _wait_for_pair
    result = getattr(make_pool(2), method)(func, items)
    assert not result.ready()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(0.01)
    gate.touch()
    assert result.get(20) == list(range(5))
    assert result.ready()
    assert result.successful()


def _wait_for_pair(pair: tuple[str, int]) -> int:
    return tasks.wait_for(*pair)  # type: ignore[no-any-return]


def test_a_timeout_is_multiprocessings_and_pythons(pool: fiber.Pool, gate: Path) -> None:
    result = pool.apply_async(tasks.wait_for, (str(gate),))
    for kind in (fiber.TimeoutError, multiprocessing.TimeoutError, builtins.TimeoutError):
        with pytest.raises(kind, match=r"0\.01 seconds"):
            result.get(0.01)
    for results in (pool.imap(abs, _blocked(gate)), pool.imap_unordered(abs, _blocked(gate))):
        for kind in (fiber.TimeoutError, multiprocessing.TimeoutError, builtins.TimeoutError):
            with pytest.raises(kind):
                results.next(0.01)
    gate.touch()
    assert result.get(20) is None


def _blocked(gate: Path) -> Any:
    yield tasks.wait_for(str(gate), -1)


@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
def test_next_with_a_timeout_loses_nothing(make_pool: MakePool, gate: Path, method: str) -> None:
    results = getattr(make_pool(2), method)(functools.partial(tasks.wait_for, str(gate)), range(5))
    assert iter(results) is results
    for _ in range(3):
        with pytest.raises(multiprocessing.TimeoutError):
            results.next(timeout=0.01)
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(0)
    gate.touch()
    assert sorted(results.next(20) for _ in range(5)) == list(range(5))
    for _ in range(3):
        with pytest.raises(StopIteration):
            results.next(timeout=1)
    assert list(results) == []


def test_several_threads_may_share_an_iterator(pool: fiber.Pool) -> None:
    results = pool.imap_unordered(tasks.square, range(5000))
    seen: list[list[int]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=taken.extend, args=(results,)) for taken in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(x for taken in seen for x in taken) == [x * x for x in range(5000)]


# Callbacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "func", "args", "value"),
    [
        ("apply_async", tasks.square, ((3,),), 9),
        ("map_async", tasks.square, ([1, 2, 3],), [1, 4, 9]),
        ("starmap_async", pow, ([(2, 3)],), [8]),
        ("map_async", tasks.square, ([],), []),
    ],
)
def test_a_callback_has_run_when_get_returns(
    make_pool: MakePool, method: str, func: Any, args: Any, value: Any
) -> None:
    got: list[Any] = []
    errors: list[Any] = []
    pool = make_pool(1)
    for _ in range(20):
        result = getattr(pool, method)(
            func, *args, callback=got.append, error_callback=errors.append
        )
        assert result.get(20) == value
        if args != ([],):  # multiprocessing forgets the callback of nothing
            assert got.pop() == value
    assert errors == []


@pytest.mark.parametrize(
    ("method", "args"),
    [("apply_async", (("value", 1, 1),)), ("starmap_async", ([("value", 1, 0), ("value", 1, 1)],))],
)
def test_an_error_callback_has_run_when_get_raises(
    make_pool: MakePool, method: str, args: Any
) -> None:
    got: list[Any] = []
    errors: list[Any] = []
    pool = make_pool(1)
    for _ in range(20):
        result = getattr(pool, method)(
            tasks.fail_at, *args, callback=got.append, error_callback=errors.append
        )
        with pytest.raises(ValueError, match="bad value") as caught:
            result.get(20)
        assert errors.pop() is caught.value
    assert got == []


def test_callbacks_of_many_calls_run_once_each(pool: fiber.Pool) -> None:
    got: list[int] = []
    results = [pool.apply_async(tasks.same, (x,), callback=got.append) for x in range(500)]
    for result in results:
        result.wait(20)
    assert sorted(got) == list(range(500))


def test_callbacks_run_though_nobody_waits(pool: fiber.Pool) -> None:
    called = threading.Event()
    pool.apply_async(tasks.same, (1,), callback=lambda _: called.set())
    assert called.wait(20)


def test_callbacks_have_run_when_join_returns(pool: fiber.Pool) -> None:
    got: list[int] = []
    for x in range(50):
        pool.apply_async(tasks.same, (x,), callback=got.append)
    pool.close()
    pool.join()
    assert sorted(got) == list(range(50))


def test_a_callback_may_use_the_pool(pool: fiber.Pool) -> None:
    got: list[Any] = []

    def use(value: int) -> None:
        got.append(pool.map(tasks.square, range(value)))
        got.append(pool.apply(tasks.square, (value,)))
        got.append(list(pool.imap(tasks.square, range(value))))

    pool.apply_async(tasks.same, (3,), callback=use).get(20)
    assert got == [[0, 1, 4], 9, [0, 1, 4]]


def test_a_callback_may_wait_for_a_call_that_has_a_callback(pool: fiber.Pool) -> None:
    got: list[int] = []

    def use(value: int) -> None:
        got.append(pool.apply_async(tasks.square, (value,), callback=got.append).get(10))

    pool.apply_async(tasks.same, (3,), callback=use).get(20)
    assert got == [9, 9]


def test_a_callback_may_begin_calls_without_waiting(pool: fiber.Pool) -> None:
    done = threading.Event()

    def count_down(value: int) -> None:
        if value == 0:
            done.set()
        else:
            pool.apply_async(tasks.same, (value - 1,), callback=count_down)

    count_down(30)
    assert done.wait(20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_raises_costs_nothing(pool: fiber.Pool) -> None:
    def fail(value: object) -> None:
        raise SystemError("the callback is broken")

    assert pool.apply_async(tasks.square, (3,), callback=fail).get(20) == 9
    result = pool.apply_async(tasks.fail_at, ("value", 1, 1), error_callback=fail)
    with pytest.raises(ValueError, match="bad value"):
        result.get(20)
    got: list[int] = []
    assert pool.apply_async(tasks.square, (4,), callback=got.append).get(20) == 16
    assert got == [16]


def test_a_slow_callback_holds_up_no_other_result(pool: fiber.Pool) -> None:
    release = threading.Event()
    slow = pool.apply_async(tasks.same, (1,), callback=lambda _: release.wait(20))
    try:
        assert pool.map(tasks.square, range(100)) == [x * x for x in range(100)]
        assert pool.apply_async(tasks.same, (2,)).get(20) == 2
        assert not slow.ready()
    finally:
        release.set()
    assert slow.get(20) == 1


# Retries and time-outs -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["map", "starmap", "imap", "imap_unordered", "apply"])
def test_a_task_that_takes_too_long_fails_alone(pool: fiber.Pool, how: str, collect: Any) -> None:
    begin = time.monotonic()
    func = functools.partial(tasks.hang_at, 7)
    values, errors = collect(pool, how, func, range(30), timeout=0.5)
    assert time.monotonic() - begin < 10
    assert values == [x for x in range(30) if x != 7]
    (error,) = errors
    assert type(error) is fiber.TaskTimeout
    assert isinstance(error, builtins.TimeoutError)
    assert isinstance(error, multiprocessing.TimeoutError)
    assert error.timeout == 0.5
    assert error.item == (0 if how == "apply" else 7)
    assert "0.5 seconds" in str(error)
    assert ("hang_at" if how == "apply" else "item 7") in str(error)
    assert pool.map(tasks.square, range(5)) == [0, 1, 4, 9, 16]


def test_the_timeout_of_the_pool_and_that_of_a_call() -> None:
    with fiber.Pool(1, timeout=0.3) as pool:
        with pytest.raises(fiber.TaskTimeout) as caught:
            pool.apply(tasks.nap, (60,))
        assert caught.value.timeout == 0.3
        assert pool.apply(tasks.nap, (0.6,), timeout=20) == 0.6
        assert pool.map(tasks.nap, [0.2] * 4) == [0.2] * 4  # each has its own time


def test_a_timeout_needs_no_cooperation(pool: fiber.Pool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    begin = time.monotonic()
    with pytest.raises(fiber.TaskTimeout):
        pool.apply(tasks.ignore_signals, (str(log), 1), timeout=0.5)
    with pytest.raises(fiber.TaskTimeout):  # the interpreter lock is held all along
        pool.apply(eval, ("len(str(9 ** 9 ** 8))",), timeout=0.5)
    assert time.monotonic() - begin < 10
    assert log.read_text().split() == ["1"]  # what took too long is not tried again


def test_the_time_spent_waiting_for_a_worker_does_not_count(pool: fiber.Pool) -> None:
    assert pool.map(tasks.nap, [0.3] * 8, timeout=1.0) == [0.3] * 8


def test_many_timeouts_in_a_row(pool: fiber.Pool) -> None:
    results = pool.map(tasks.nap, [60, 0, 60, 0, 60, 0], timeout=0.2, return_exceptions=True)
    assert [r if r == 0 else type(r) for r in results] == [fiber.TaskTimeout, 0] * 3


def test_the_timeout_can_be_pickled(pool: fiber.Pool) -> None:
    with pytest.raises(fiber.TaskTimeout) as caught:
        pool.map(functools.partial(tasks.hang_at, 1), range(3), timeout=0.2)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.item, again.timeout, str(again)) == (1, 0.2, str(caught.value))
