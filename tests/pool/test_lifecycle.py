"""A pool's life: made, closed, terminated, dropped; its workers' beginnings and replacements."""

from __future__ import annotations

import functools
import gc
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.pool import tasks
from tests.waiting import until

import fiber
from fiber.pool.crew import Crew

MakePool = Callable[..., Any]


def all_gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


def outcome(submitted: Any) -> Any:
    """Wait for what a method of a pool has returned."""
    return submitted.get(10) if hasattr(submitted, "get") else list(submitted)


SUBMISSIONS: dict[str, Callable[[Any], object]] = {
    "apply": lambda pool: pool.apply(abs, (1,)),
    "apply_async": lambda pool: pool.apply_async(abs, (1,)),
    "map": lambda pool: pool.map(abs, [1]),
    "map_async": lambda pool: pool.map_async(abs, [1]),
    "starmap": lambda pool: pool.starmap(pow, [(1, 2)]),
    "starmap_async": lambda pool: pool.starmap_async(pow, [(1, 2)]),
    "imap": lambda pool: pool.imap(abs, [1]),
    "imap_unordered": lambda pool: pool.imap_unordered(abs, [1]),
}

# close, terminate, join, with ------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "terminate"])
def test_a_pool_that_has_ended_takes_nothing(make_pool: MakePool, end: str) -> None:
    pool = make_pool(1)
    getattr(pool, end)()
    for submit in SUBMISSIONS.values():
        with pytest.raises(ValueError, match="not running"):
            submit(pool)
    with pytest.raises(ValueError, match="not running"):
        pool.__enter__()
    pool.join()
    for submit in SUBMISSIONS.values():
        with pytest.raises(ValueError, match="not running"):
            submit(pool)


def test_join_comes_after_close_or_terminate(make_pool: MakePool) -> None:
    pool = make_pool(1)
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    assert pool.apply(abs, (-1,)) == 1


def test_ends_may_be_asked_for_more_than_once(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.close()
    pool.close()
    pool.join()
    pool.join()
    pool.terminate()
    pool.terminate()
    pool.close()
    pool.join()


def test_close_lets_everything_finish(make_pool: MakePool) -> None:
    pool = make_pool(2)
    mapped = pool.map_async(tasks.nap, [0.05] * 8)
    applied = pool.apply_async(tasks.square, (4,))
    streamed = pool.imap(tasks.square, range(100))
    pool.close()
    pool.join()
    assert mapped.get(0) == [0.05] * 8
    assert applied.get(0) == 16
    assert list(streamed) == [x * x for x in range(100)]


def test_with_terminates(make_pool: MakePool) -> None:
    begin = time.monotonic()
    with make_pool(1) as pool:
        pool.apply_async(tasks.nap, (60,))
        assert type(pool) is type(pool.__enter__())
    assert time.monotonic() - begin < 10
    with pytest.raises(ValueError, match="not running"):
        pool.apply(abs, (1,))


def test_with_passes_exceptions_on(make_pool: MakePool) -> None:
    with pytest.raises(ZeroDivisionError), make_pool(1):
        1 / 0  # noqa: B018


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_pool_has_workers(make_pool: MakePool, wrong: int) -> None:
    with pytest.raises(ValueError, match=r"at least 1"):
        make_pool(wrong)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"processes": "2"}, TypeError),
        ({"initializer": 5}, TypeError),
        ({"maxtasksperchild": 0}, ValueError),
    ],
)
def test_wrong_arguments_are_refused(
    make_pool: MakePool, arguments: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        make_pool(**{"processes": 1, **arguments})


@pytest.mark.parametrize("arguments", [{"retries": -1}, {"timeout": 0}])
def test_limits_must_make_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        fiber.Pool(1, **arguments)


def test_there_is_a_worker_for_each_cpu_by_default() -> None:
    with fiber.Pool() as pool:
        assert len(pool.pids()) <= fiber.cpu_count()
        assert pool.stats().processes == fiber.cpu_count()


def test_the_workers_are_gone_after_with() -> None:
    with fiber.Pool(3) as pool:
        pids = set(pool.map(tasks.pid_of, range(100))) | set(pool.pids())
    assert all_gone(sorted(pids))


def test_what_is_awaited_when_the_pool_is_terminated_fails(pool: fiber.Pool) -> None:
    results = [
        pool.apply_async(tasks.nap, (60,)),
        pool.map_async(tasks.nap, [60] * 5),
        pool.starmap_async(tasks.nap, [(60,)] * 5),
    ]
    streams = [pool.imap(tasks.nap, [60] * 5), pool.imap_unordered(tasks.nap, [60] * 5)]
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            pool.map(tasks.nap, [60])
        except fiber.PoolTerminated as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: pool.stats().running == 2, "all are busy")
    begin = time.monotonic()
    pool.terminate()
    for result in results:
        with pytest.raises(fiber.PoolTerminated):
            result.get(10)
    for stream in streams:
        with pytest.raises(fiber.PoolTerminated):
            stream.next(10)
        with pytest.raises(StopIteration):
            next(stream)
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1
    pool.join()
    assert time.monotonic() - begin < 8


def test_terminate_ends_tasks_that_ignore_signals(pool: fiber.Pool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    pool.map_async(functools.partial(tasks.ignore_signals, str(log)), range(2), 1)
    until(lambda: log.exists() and len(log.read_text().split()) == 2, "both run")
    pids = pool.pids()
    begin = time.monotonic()
    pool.terminate()
    pool.join()
    assert time.monotonic() - begin < 8
    assert all_gone(pids)


def test_a_task_that_leaves_a_thread_does_not_keep_the_pool(pool: fiber.Pool) -> None:
    assert pool.map(tasks.leave_thread, range(2), 1) == [0, 1]
    begin = time.monotonic()
    pool.close()
    pool.join()
    assert time.monotonic() - begin < 9


def test_a_pool_after_a_pool() -> None:
    for n in range(3):
        with fiber.Pool(2) as pool:
            assert pool.map(tasks.square, range(n)) == [x * x for x in range(n)]


def test_several_pools_at_once() -> None:
    with fiber.Pool(1) as one, fiber.Pool(2) as two, fiber.Pool(1) as three:
        pools = (one, two, three)
        results = [pool.map_async(tasks.pid_of, range(50)) for pool in pools]
        for pool, result in zip(pools, results, strict=True):
            assert set(result.get(20)) <= set(pool.pids())
        one.terminate()
        assert two.map(tasks.square, [3]) == three.map(tasks.square, [3]) == [9]
        streams = [two.imap(tasks.square, range(200)), three.imap(tasks.square, range(200))]
        assert list(zip(*streams, strict=True)) == [(x * x, x * x) for x in range(200)]


def test_pools_in_threads() -> None:
    found: list[list[int]] = []

    def use() -> None:
        with fiber.Pool(1) as pool:
            found.append(pool.map(tasks.square, range(20)))

    threads = [threading.Thread(target=use) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [[x * x for x in range(20)]] * 5


def test_many_threads_share_a_pool(pool: fiber.Pool) -> None:
    found: dict[int, object] = {}

    def use(n: int) -> None:
        applied = [pool.apply(tasks.square, (n * 1000 + i,)) for i in range(40)]
        mapped = pool.map(tasks.square, range(n, n + 40))
        streamed = list(pool.imap(tasks.square, range(n, n + 40)))
        found[n] = (applied, mapped, streamed)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for n in range(12):
        squares = [x * x for x in range(n, n + 40)]
        assert found[n] == ([(n * 1000 + i) ** 2 for i in range(40)], squares, squares)


def test_a_task_may_have_a_pool_of_its_own(pool: fiber.Pool) -> None:
    assert pool.map(tasks.map_inside, [3, 4], 1) == [[0, 1, 4], [0, 1, 4, 9]]


# Dropped, sent, forked -------------------------------------------------------------------------


def test_a_dropped_pool_warns_and_its_workers_go() -> None:
    pool = fiber.Pool(2)
    assert pool.map(tasks.square, [2]) == [4]
    pids = pool.pids()
    with pytest.warns(ResourceWarning, match="unclosed running"):  # noqa: PT031
        del pool
        gc.collect()
    until(lambda: all_gone(pids), "the workers are gone")


@pytest.mark.filterwarnings("ignore:unclosed running:ResourceWarning")
def test_results_keep_a_dropped_pool_until_they_are_there() -> None:
    assert fiber.Pool(1).apply_async(tasks.nap, (0.1,)).get(20) == 0.1
    assert fiber.Pool(1).map_async(tasks.nap, [0.1] * 3).get(20) == [0.1] * 3
    assert list(fiber.Pool(1).imap(tasks.square, range(50))) == [x * x for x in range(50)]
    gc.collect()


def test_a_closed_pool_may_be_dropped() -> None:
    pool = fiber.Pool(1)
    result = pool.apply_async(tasks.nap, (0.2,))
    pids = pool.pids()
    pool.close()
    del pool
    gc.collect()
    assert result.get(20) == 0.2
    until(lambda: all_gone(pids), "the workers are gone")


def test_a_pool_cannot_be_sent(pool: fiber.Pool) -> None:
    with pytest.raises((TypeError, NotImplementedError), match="pool cannot be pickled"):
        pickle.dumps(pool)
    with pytest.raises(fiber.SerializationError, match="pool cannot be pickled"):
        pool.apply(tasks.same, (pool,))
    with pytest.raises(fiber.SerializationError, match="pool cannot be pickled"):
        pool.map(lambda x: pool.apply(abs, (x,)), [1])
    assert pool.apply(tasks.same, (1,)) == 1


def test_a_program_that_forgets_its_pool_ends(run_script: Any) -> None:
    done = run_script(
        """
import fiber

def square(x):
    return x * x

if __name__ == "__main__":
    pool = fiber.Pool(2)
    print(pool.map(square, range(4)))
    pool.map_async(__import__("time").sleep, [60] * 4)
""",
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0, 1, 4, 9]\n"
    assert done.stderr == ""


FORKED = """
import os, signal, sys
import fiber

def square(x):
    return x * x

if __name__ == "__main__":
    pool = fiber.Pool(2)
    assert pool.map(square, range(3)) == [0, 1, 4]
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(15)
        {child}
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print("child", os.waitstatus_to_exitcode(status))
    print("parent", pool.map(square, range(3)))
    pool.close()
    pool.join()
"""


@pytest.mark.parametrize(
    ("child", "says"),
    [
        (
            "with fiber.Pool(2) as own: print('own', own.map(square, range(4)))",
            "own [0, 1, 4, 9]\n",
        ),
        ("del pool; import gc; gc.collect(); print('dropped')", "dropped\n"),
        ("pool.terminate(); print('terminated')", "terminated\n"),
        (
            """
        try: print(pool.map(square, range(3)))
        except Exception as error: print(isinstance(error, fiber.FiberError))""",
            "True\n",
        ),
    ],
    ids=["a pool of its own", "drops it", "terminates it", "uses it"],
)
def test_a_forked_child_leaves_its_parents_pool_alone(
    run_script: Any, child: str, says: str
) -> None:
    done = run_script(FORKED.format(child=child), timeout=40)
    assert done.stdout == f"{says}child 0\nparent [0, 1, 4]\n", done.stderr
    assert done.returncode == 0


# Initializers ----------------------------------------------------------------------------------


def test_an_initializer_runs_once_in_each_worker(make_pool: MakePool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    pool = make_pool(3, tasks.log, (str(log), "here"))
    assert pool.map(tasks.square, range(100)) == [x * x for x in range(100)]
    until(lambda: log.exists() and len(log.read_text().split()) >= 3, "three began")
    pool.close()
    pool.join()
    assert log.read_text().split() == ["'here'"] * 3


def test_what_an_initializer_keeps_is_there_for_tasks(pool: fiber.Pool) -> None:
    with fiber.Pool(2, initializer=tasks.keep, initargs=[1, "two"]) as pool:
        assert pool.map(tasks.kept, range(20)) == [(1, "two")] * 20


def test_initargs_may_be_large() -> None:
    sizes = [10, 30_000_000, 5_000_000]
    with fiber.Pool(2, tasks.keep, [bytes(size) for size in sizes]) as pool:
        assert pool.map(tasks.kept_sizes, range(4), 1) == [sizes] * 4


def test_an_initializer_that_cannot_be_sent_is_told_at_once() -> None:
    with pytest.raises(fiber.SerializationError, match="lock"):
        fiber.Pool(1, tasks.keep, (threading.Lock(),))


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_an_initializer_that_raises_ends_the_pool(tmp_path: Path, name: str) -> None:
    log = tmp_path / "log"
    begin = time.monotonic()
    with fiber.Pool(2, tasks.log_and_raise, (str(log),)) as pool:
        with pytest.raises(LookupError, match="no luck here") as caught:
            outcome(SUBMISSIONS[name](pool))
        assert "log_and_raise" in str(caught.value.__cause__)
        with pytest.raises(LookupError, match="no luck here"):
            pool.map(abs, [1])
    pool.join()
    assert len(log.read_text().split()) <= 4
    assert time.monotonic() - begin < 8


def test_join_ends_when_the_initializer_raises(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pool = fiber.Pool(2, tasks.log_and_raise, (str(log),))
    result = pool.apply_async(tasks.square, (3,))
    pool.close()
    begin = time.monotonic()
    pool.join()
    assert time.monotonic() - begin < 8
    with pytest.raises(LookupError, match="no luck here"):
        result.get(0)
    assert len(log.read_text().split()) <= 4


def test_an_initializer_that_raises_what_cannot_be_pickled_ends_the_pool() -> None:
    def initialize() -> None:
        raise tasks.Unpicklable("it holds a lock")

    with fiber.Pool(1, initialize) as pool, pytest.raises(fiber.RemoteError, match="holds a lock"):
        pool.map(abs, [1])


@pytest.mark.parametrize("name", ["apply", "map", "imap", "imap_unordered"])
def test_an_initializer_that_ends_the_process_breaks_the_pool(tmp_path: Path, name: str) -> None:
    log = tmp_path / "log"
    begin = time.monotonic()
    with fiber.Pool(2, tasks.log_and_leave, (str(log), "os._exit")) as pool:
        with pytest.raises(fiber.PoolBroken) as caught:
            outcome(SUBMISSIONS[name](pool))
        assert "exit code 7" in str(caught.value)
        assert "the initializer says goodbye" in str(caught.value)
        with pytest.raises(fiber.PoolBroken):
            pool.map(abs, [1])
    assert time.monotonic() - begin < 8
    assert len(log.read_text().split()) <= 10


def test_a_pool_goes_on_with_the_workers_that_it_can_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where there is memory for one worker only: others are tried now and then, not at once."""
    begun = tmp_path / "begun"
    begun.mkdir()

    def leave_room_for_one() -> None:
        try:
            (begun / "first").mkdir()
        except FileExistsError:
            (begun / str(os.getpid())).mkdir()
            os.kill(os.getpid(), signal.SIGKILL)

    with fiber.Pool(2, leave_room_for_one) as pool:
        assert pool.map(tasks.nap, [0.1] * 10, 1) == [0.1] * 10
        assert pool.map(tasks.square, range(100)) == [x * x for x in range(100)]
        assert len(list(begun.iterdir())) <= 9
    assert "workers in a row ended before they were ready" in caplog.text
    assert "was ended by SIGKILL" in caplog.text


def test_a_pool_whose_constructor_was_interrupted_leaves_no_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fiber.Pool(1) as pool:  # there is an agent
        pool.map(abs, [1])
    recruit = Crew.recruit

    def interrupted(crew: Crew) -> None:
        recruit(crew)
        crew.recruit = lambda: recruit(crew)  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGINT)  # its handler runs when the loop is left

    monkeypatch.setattr(Crew, "recruit", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        fiber.Pool(2)
    until(lambda: not fiber.active_children(), "the workers are gone")
    assert caught.value is not None  # and that though the pool cannot have been collected


def test_an_initializer_that_calls_sys_exit_ends_the_pool(tmp_path: Path) -> None:
    log = tmp_path / "log"
    begin = time.monotonic()
    initializer, initargs = tasks.log_and_leave, (str(log), "sys.exit")
    ended = pytest.raises(fiber.FiberError, match=r"SystemExit: 7|exit code 7")
    with fiber.Pool(2, initializer, initargs) as pool, ended:
        pool.map(abs, [1])
    assert time.monotonic() - begin < 8
    assert len(log.read_text().split()) <= 10


# Workers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["map", "imap", "imap_unordered"])
def test_workers_are_replaced_after_maxtasksperchild(how: str) -> None:
    with fiber.Pool(2, maxtasksperchild=3) as pool:
        results = list(getattr(pool, how)(tasks.stamp, range(20), 1))
    assert sorted(x for _, _, x in results) == list(range(20))
    assert max(number for _, number, _ in results) <= 2
    assert len({pid for pid, _, _ in results}) >= 7
    if how != "imap_unordered":
        assert [x for _, _, x in results] == list(range(20))


def test_maxtasksperchild_counts_apply_too() -> None:
    with fiber.Pool(1, maxtasksperchild=2) as pool:
        pids = [pool.apply(tasks.pid_of) for _ in range(6)]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] == pids[5]


def test_replaced_workers_are_not_counted_as_dead() -> None:
    with fiber.Pool(2, tasks.keep, ("a",), maxtasksperchild=2) as pool:
        assert pool.map(tasks.kept, range(9), 1) == [("a",)] * 9
        assert pool.stats().died == 0


def test_workers_are_daemons_with_names(pool: fiber.Pool) -> None:
    def who() -> tuple[str, bool, int | None]:
        process = fiber.current_process()
        parent = fiber.parent_process()
        return process.name, process.daemon, parent and parent.pid

    name, daemon, parent = pool.apply(who)
    assert "PoolWorker-" in name
    assert daemon is True
    assert parent == os.getpid()


def test_stats_tell_what_there_is(pool: fiber.Pool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    pool.map(tasks.square, range(100))
    until(lambda: pool.stats().ready == 2, "both are ready")
    stats = pool.stats()
    assert (stats.processes, stats.ready, stats.done) == (2, 2, 100)
    assert (stats.waiting, stats.running, stats.failed, stats.died) == (0, 0, 0, 0)
    waiting = pool.map_async(functools.partial(tasks.wait_for, str(gate)), range(10))
    until(lambda: pool.stats().running >= 2, "two are running")
    stats = pool.stats()
    assert stats.waiting + stats.running == 10
    assert stats.done == 100
    gate.touch()
    assert waiting.get(20) == list(range(10))
    stats = pool.stats()
    assert (stats.done, stats.waiting, stats.running) == (110, 0, 0)
    assert stats.seconds > 0
    with pytest.raises(fiber.WorkerDied):
        pool.apply(tasks.die_at, ("exit code 3", (1,), 1), retries=1)
    stats = pool.stats()
    assert (stats.done, stats.failed, stats.died) == (110, 1, 2)
    pool.terminate()
    assert pool.stats().ready == 0


# Resources -------------------------------------------------------------------------------------


def test_meta_sizes_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with fiber.Pool(1) as pool:
        assert pool.map(tasks.threads_of_numerics, range(3)) == ["1"] * 3
    with fiber.Pool(1) as pool:
        assert pool.map(tasks.threads_of_two, range(3)) == ["2"] * 3
        assert pool.apply(tasks.threads_of_numerics) == "2"  # it asks for nothing
        assert list(pool.imap(tasks.threads_of_two, range(3))) == ["2"] * 3


def test_meta_leaves_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with fiber.Pool(1) as pool:
        assert pool.apply(tasks.threads_of_two) == "5"


def test_a_pool_in_use_does_not_change_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with fiber.Pool(1) as pool:
        assert pool.apply(tasks.threads_of_two) == "2"
        with pytest.raises(fiber.PoolError, match="another pool"):
            pool.apply(tasks.threads_of_three)
        assert pool.apply(tasks.threads_of_two) == "2"


def deaf() -> None:
    """An initializer that takes its time and does not hear SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.7)


def test_terminate_ends_workers_that_start_and_do_not_hear_it() -> None:
    pool = fiber.Pool(2, deaf)
    until(lambda: len(pool.pids()) == 2, "two workers have started")
    pool.terminate()
    begin = time.monotonic()
    pool.join()
    assert time.monotonic() - begin < 5
    assert pool.pids() == []


def test_files_of_the_current_folder_hide_no_modules(
    run_script: Callable[..., Any], tmp_path: Path
) -> None:
    """Where one happens to stand is not where modules come from; the program's folder is."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("select.py", "socket.py", "random.py"):
        (folder / name).write_text("raise ImportError('not this one')")
    program = """
import fiber

if __name__ == "__main__":
    with fiber.Pool(1) as pool:
        print(pool.apply(abs, (-3,)))
"""
    done = run_script(program, cwd=folder)
    assert done.stdout == "3\n", done.stderr
