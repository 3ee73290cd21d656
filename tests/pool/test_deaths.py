"""Tasks that end their worker: the item fails with a diagnosis, all others have their results."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pool import tasks
from tests.waiting import until

import fiber

HOW = ["map", "starmap", "imap", "imap_unordered", "apply"]
Collect = Callable[..., tuple[list[Any], list[BaseException]]]


def without(count: int, *places: int) -> list[int]:
    return [x for x in range(count) if x not in places]


@pytest.mark.parametrize("kind", tasks.DEATHS)
def test_a_death_is_diagnosed(pool: fiber.Pool, kind: str) -> None:
    if kind == "stack" and sys.version_info >= (3, 12):
        pytest.skip("this Python guards the C stack itself")
    results = pool.map(
        functools.partial(tasks.die_at, kind, (7,)), range(20), return_exceptions=True
    )
    error = results.pop(7)
    assert results == without(20, 7)
    assert type(error) is fiber.WorkerDied
    exitcode = tasks.DEATHS[kind][1]
    assert (error.item, error.attempts, error.exitcode) == (7, 3, exitcode)
    said = f"exit code {exitcode}" if exitcode >= 0 else signal.Signals(-exitcode).name
    assert said in str(error)
    assert "item 7 of" in str(error)
    assert "die_at" in str(error)
    assert "3 times" in str(error)
    assert str(error.pid) in str(error)
    assert "last words of 7" in error.stderr
    assert "last words of 7" in str(error)
    if exitcode in (-signal.SIGSEGV, -signal.SIGABRT):
        assert "Fatal Python error" in error.stderr
        # faulthandler shows the innermost 100 frames, which is the recursion alone.
        assert ("__repr__" if kind == "stack" else "die_at") in error.stderr


@pytest.mark.parametrize("chunksize", [None, 1, 10])
@pytest.mark.parametrize("how", HOW)
def test_all_others_succeed(
    pool: fiber.Pool, how: str, chunksize: int | None, collect: Collect
) -> None:
    func = functools.partial(tasks.die_at, "exit code 3", (25,))
    values, errors = collect(pool, how, func, range(60), chunksize, retries=1)
    assert values == without(60, 25)
    (error,) = errors
    assert type(error) is fiber.WorkerDied
    assert (error.item, error.attempts) == ((0 if how == "apply" else 25), 2)
    if how == "apply":
        assert str(error).startswith("die_at") or "item" not in str(error)
    assert pool.map(tasks.square, range(10)) == [x * x for x in range(10)]


@pytest.mark.parametrize("retries", [0, 1, 5])
@pytest.mark.parametrize("how", ["map", "imap", "apply"])
@pytest.mark.parametrize("chunksize", [None, 1, 10])
def test_an_item_runs_as_often_as_retries_say(
    pool: fiber.Pool,
    tmp_path: Path,
    how: str,
    retries: int,
    chunksize: int | None,
    collect: Collect,
) -> None:
    log = tmp_path / "log"
    func = functools.partial(
        tasks.log_and, str(log), functools.partial(tasks.die_at, "SIGKILL", (5,))
    )
    values, (error,) = collect(pool, how, func, range(20), chunksize, retries=retries)
    assert values == without(20, 5)
    assert type(error) is fiber.WorkerDied
    assert error.attempts == retries + 1
    runs = log.read_text().split()
    # Of a batch that ended its worker nobody knows yet which item did it: that death is not counted
    # and the items go out again alone. Without retries nothing may run twice, and nothing does.
    uncounted = 1 if retries and how != "apply" else 0
    assert retries + 1 <= runs.count("5") <= retries + 1 + uncounted
    if not retries:
        assert len(runs) == 20
    assert set(runs) == {str(x) for x in range(20)}


@pytest.mark.parametrize("how", ["map", "imap", "imap_unordered"])
def test_a_poison_item_among_many(pool: fiber.Pool, how: str, collect: Collect) -> None:
    pool.map(tasks.square, range(10_000))
    func = functools.partial(tasks.die_at, "SIGKILL", (4321,))
    values, (error,) = collect(pool, how, func, range(10_000))
    assert values == without(10_000, 4321)
    assert type(error) is fiber.WorkerDied
    assert (error.item, error.attempts) == (4321, 3)
    assert pool.stats().failed == 1
    assert pool.stats().died <= 4


@pytest.mark.parametrize("places", [(10, 11), (0, 499), (3, 400)])
def test_two_poison_items(pool: fiber.Pool, places: tuple[int, int]) -> None:
    func = functools.partial(tasks.die_at, "exit code 3", places)
    results = pool.map(func, range(500), return_exceptions=True)
    errors = [r for r in results if isinstance(r, BaseException)]
    assert [type(error) for error in errors] == [fiber.WorkerDied] * 2
    assert [error.item for error in errors] == list(places)
    assert [error.attempts for error in errors] == [3, 3]
    assert [r for r in results if isinstance(r, int)] == without(500, *places)


def test_nothing_but_poison_ends_too(pool: fiber.Pool) -> None:
    func = functools.partial(tasks.die_at, "exit code 3", tuple(range(10)))
    results = pool.map(func, range(10), retries=0, return_exceptions=True)
    assert [type(r) for r in results] == [fiber.WorkerDied] * 10
    assert [r.item for r in results] == list(range(10))
    assert pool.map(tasks.square, [3]) == [9]


def test_map_raises_the_death(pool: fiber.Pool) -> None:
    with pytest.raises(fiber.WorkerDied, match="item 2 of"):
        pool.map(functools.partial(tasks.die_at, "abort", (2,)), range(5), retries=0)
    with pytest.raises(fiber.WorkerDied, match="once") as caught:
        pool.apply(tasks.die_at, ("abort", (2,), 2), retries=0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.exitcode, again.stderr) == (-signal.SIGABRT, caught.value.stderr)


def test_an_attempt_that_succeeds_settles_the_item(pool: fiber.Pool, tmp_path: Path) -> None:
    def second_time_lucky(x: int) -> int:
        if x % 10 == 0:
            marker = tmp_path / str(x)
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return x

    assert pool.map(second_time_lucky, range(50)) == list(range(50))
    assert list(pool.imap(second_time_lucky, range(100))) == list(range(100))


def test_error_callbacks_hear_of_deaths(pool: fiber.Pool) -> None:
    errors: list[BaseException] = []
    result = pool.apply_async(
        tasks.die_at, ("exit code 3", (1,), 1), error_callback=errors.append, retries=0
    )
    with pytest.raises(fiber.WorkerDied):
        result.get(20)
    assert [type(error) for error in errors] == [fiber.WorkerDied]


def test_a_pool_with_one_worker_and_an_initializer_recovers() -> None:
    with fiber.Pool(1, tasks.keep, ("kept",), retries=1) as pool:
        with pytest.raises(fiber.WorkerDied):
            pool.apply(tasks.die_at, ("exit code 3", (1,), 1))
        assert pool.apply(tasks.kept) == ("kept",)


def test_deaths_and_maxtasksperchild_together() -> None:
    with fiber.Pool(2, maxtasksperchild=5) as pool:
        func = functools.partial(tasks.die_at, "exit code 3", (13, 40))
        results = pool.map(func, range(60), 1, return_exceptions=True)
        assert [r for r in results if isinstance(r, int)] == without(60, 13, 40)
        assert [type(results[place]) for place in (13, 40)] == [fiber.WorkerDied] * 2


# Memory ----------------------------------------------------------------------------------------


def test_a_memory_error_arrives_as_itself(pool: fiber.Pool) -> None:
    results = pool.map(tasks.ask_for_too_much, range(3), return_exceptions=True)
    assert [type(r) for r in results] == [MemoryError] * 3
    assert pool.stats().died == 0


# What a worker leaves behind, closes, or writes ------------------------------------------------


@pytest.mark.parametrize("dies", [True, False], ids=["the worker dies", "the worker goes on"])
def test_a_grandchild_that_holds_all_descriptors(tmp_path: Path, dies: bool) -> None:
    log = tmp_path / "pids"
    begin = time.monotonic()
    try:
        with fiber.Pool(2, retries=0) as pool:
            func = functools.partial(tasks.leave_grandchild, str(log), dies)
            results = pool.map(func, range(10), 1, return_exceptions=True)
            outcome = results.pop(5)
            assert results == without(10, 5)
            assert outcome == 5 if not dies else type(outcome) is fiber.WorkerDied
            assert pool.map(tasks.square, range(5)) == [0, 1, 4, 9, 16]
            pool.close()
            pool.join()
    finally:
        for pid in log.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    assert time.monotonic() - begin < 10


def test_a_task_that_closes_all_descriptors(pool: fiber.Pool) -> None:
    begin = time.monotonic()
    results = pool.map(tasks.close_descriptors, range(10), return_exceptions=True)
    outcome = results.pop(5)
    assert results == without(10, 5)
    assert type(outcome) is fiber.WorkerDied
    assert pool.map(tasks.square, range(5)) == [0, 1, 4, 9, 16]
    assert time.monotonic() - begin < 20


def test_tasks_that_write_a_lot(capfd: pytest.CaptureFixture[str]) -> None:
    with fiber.Pool(2) as pool:  # begun here, for pytest gives the test a stream of its own
        assert pool.map(tasks.chatter, range(4), 1) == [0, 1, 2, 3]
        pool.close()
        pool.join()
    out, err = capfd.readouterr()
    for x in range(4):
        assert sum(line.startswith(f"{x} {x}") for line in out.splitlines()) == 1 << 13
        assert sum(line.startswith(f"{x} {x}") for line in err.splitlines()) == 1 << 13


def test_the_last_lines_of_many_are_told(pool: fiber.Pool) -> None:
    with pytest.raises(fiber.WorkerDied) as caught:
        pool.apply(tasks.chatter_and_die, (1,), retries=0)
    assert caught.value.stderr.rstrip().endswith("and so it ends")
    assert str(caught.value).rstrip().endswith("and so it ends")
    assert len(caught.value.stderr) < 100_000
    assert len(str(caught.value)) < 10_000


def test_a_worker_killed_from_outside_costs_no_result(pool: fiber.Pool) -> None:
    results = pool.imap(functools.partial(tasks.nap_at, -1, 0, 0.002), range(1000))
    seen = [next(results) for _ in range(100)]
    for pid in pool.pids():
        os.kill(pid, signal.SIGKILL)
    assert seen + list(results) == list(range(1000))


def test_an_item_that_had_its_result_is_not_to_blame(tmp_path: Path) -> None:
    """It was killed by somebody else, again and again, while the result was on its way."""
    log = tmp_path / "log"
    log.touch()

    def make() -> str:
        with log.open("a") as file:
            file.write("begun\n")
        time.sleep(0.1)
        return "x" * 30_000_000  # which is sent: memory that is lent keeps nobody waiting

    with fiber.Pool(1, retries=1) as pool:
        assert pool.apply(abs, (-1,)) == 1
        os.kill(pool.pids()[0], signal.SIGKILL)  # from the first death on it is looked at
        assert pool.apply(abs, (-1,)) == 1
        result = pool.apply_async(make)
        for round in range(4):
            deadline = time.monotonic() + 10
            while len(log.read_text().split()) <= round:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            (pid,) = pool.pids()
            with pool._loop:  # nobody reads: the worker is stuck in sending
                time.sleep(0.4)
                os.kill(pid, signal.SIGKILL)
        assert result.get(20) == "x" * 30_000_000
        assert pool.stats().died == 5


def test_a_worker_that_cannot_mark_what_it_is_at_is_to_blame(tmp_path: Path) -> None:
    """It would seem to be at nothing, and its item ran again for ever."""
    log, late, go = tmp_path / "log", tmp_path / "late", tmp_path / "go"

    def begin() -> None:
        while late.exists() and not go.exists():
            time.sleep(0.01)
        os.environ["LOG"] = str(os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        with contextlib.suppress(OSError):
            while True:
                os.open(os.devnull, os.O_RDONLY)

    def die() -> None:
        os.write(int(os.environ["LOG"]), b"begun\n")
        os._exit(3)

    with fiber.Pool(2, begin, retries=1) as pool:
        until(lambda: pool.stats().ready == 2)
        late.touch()
        os.kill(pool.pids()[0], signal.SIGKILL)  # from the first death on they are to mark
        until(lambda: pool.stats().died == 1)
        result = pool.apply_async(die)
        until(lambda: log.read_text() != "")  # by the other, for all else waits
        go.touch()
        with pytest.raises(fiber.WorkerDied, match="2 times"):
            result.get(20)
    assert log.read_text() == "begun\n" * 2


def test_idle_workers_that_die_are_replaced(pool: fiber.Pool) -> None:
    assert pool.map(tasks.square, [2]) == [4]
    for _ in range(4):
        for pid in pool.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert pool.map(tasks.square, range(50)) == [x * x for x in range(50)]
