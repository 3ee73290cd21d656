"""Parents, children and grandchildren: who knows whom, and who outlives nobody."""

from __future__ import annotations

import os
import signal
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.process import targets
from tests.waiting import until

import fiber


def run(target: Callable[..., object], *args: object, **options: Any) -> fiber.Process:
    process = fiber.Process(target=target, args=args, **options)
    process.start()
    process.join(30)
    return process


# Who one is ------------------------------------------------------------------------------------


def test_current_process_is_the_process_object_itself(tmp_path: Path) -> None:
    assert fiber.current_process().name == "MainProcess"
    assert fiber.current_process().pid == os.getpid()
    path = tmp_path / "me"
    process = run(targets.report, path, "me.name", "me.pid", "me.is_alive()", "me.exitcode")
    assert path.read_text().split() == [process.name, str(process.pid), "True", "None"]


def test_parent_process_is_known_by_name_and_pid(tmp_path: Path) -> None:
    assert fiber.parent_process() is None
    path = tmp_path / "parent"
    asked = [f"fiber.parent_process().{what}" for what in ("name", "pid", "ident", "is_alive()")]
    run(targets.report, path, *asked)
    assert path.read_text().split() == ["MainProcess", *[str(os.getpid())] * 2, "True"]


def test_parent_process_cannot_be_ended_by_its_child(tmp_path: Path, capfd: Any) -> None:
    process = run(targets.report, tmp_path / "no", "fiber.parent_process().terminate()")
    assert process.exitcode == 1
    assert "AttributeError" in capfd.readouterr().err


def test_parent_process_can_be_joined_by_its_child(tmp_path: Path) -> None:
    path = tmp_path / "joined"
    run(targets.report, path, "fiber.parent_process().join(0.01)", "fiber.parent_process()")
    assert path.read_text().startswith("None\n<_ParentProcess name='MainProcess'")


def test_active_children_are_those_that_run() -> None:
    assert fiber.active_children() == []
    children = [fiber.Process(target=targets.sleep) for _ in range(2)]
    for child in children:
        child.start()
    assert set(fiber.active_children()) == set(children)
    children[0].kill()
    children[0].join()
    assert fiber.active_children() == [children[1]]
    children[1].kill()
    children[1].join()
    assert fiber.active_children() == []


def test_active_children_collects_those_that_ended() -> None:
    child = fiber.Process(target=targets.nothing)
    child.start()
    until(lambda: fiber.active_children() == [], "the child's end")
    assert child.exitcode == 0


def test_active_children_of_a_child_are_its_own(tmp_path: Path) -> None:
    other = fiber.Process(target=targets.sleep)
    other.start()
    path = tmp_path / "counts"
    run(targets.count_children, path)
    other.kill()
    other.join()
    assert literal_eval(path.read_text()) == (0, True, 0)


def test_only_its_creator_may_start_join_or_ask(tmp_path: Path, capfd: Any) -> None:
    child = fiber.Process(target=targets.nothing)
    for use in (child.start, child.join, child.is_alive):
        assert run(use).exitcode == 1
        assert "AssertionError: can only" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="there is no affinity here")
def test_cpu_count_is_what_this_process_may_use(tmp_path: Path) -> None:
    available = len(os.sched_getaffinity(0))
    assert 1 <= fiber.cpu_count() <= available
    path = tmp_path / "count"
    run(
        targets.report,
        path,
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])",
        "fiber.cpu_count()",
    )
    assert path.read_text() == "None\n1\n"


# Generations -----------------------------------------------------------------------------------


def test_a_process_may_have_children_and_grandchildren(tmp_path: Path) -> None:
    path = tmp_path / "line"
    assert run(targets.descend, path, 3).exitcode == 0
    line = [tuple(map(int, words.split())) for words in path.read_text().splitlines()]
    assert len({pid for pid, _ in line}) == 4
    assert [parent for _, parent in line] == [os.getpid(), *[pid for pid, _ in line[:-1]]]


def test_a_grandchild_s_exit_code_reaches_its_parent() -> None:
    def parent() -> None:
        child = fiber.Process(target=targets.die, args=(signal.SIGKILL,))
        child.start()
        child.join()
        os._exit(-(child.exitcode or 0))

    assert run(parent).exitcode == signal.SIGKILL


def test_a_daemon_may_have_children(tmp_path: Path) -> None:
    path = tmp_path / "word"
    assert run(targets.daemon_with_child, path, daemon=True).exitcode == 0
    assert path.read_text() == "a daemon's child"


def test_daemon_is_inherited(tmp_path: Path) -> None:
    path = tmp_path / "flag"

    def parent() -> None:
        run(targets.report, path, "me.daemon")

    run(parent, daemon=True)
    assert path.read_text() == "True\n"


def test_a_process_may_have_a_pool(tmp_path: Path) -> None:
    path = tmp_path / "squares"
    assert run(targets.pool_within, path, [1, 2, 3]).exitcode == 0
    assert literal_eval(path.read_text()) == [1, 4, 9]


def test_a_worker_of_a_pool_may_start_processes(tmp_path: Path) -> None:
    items = [(tmp_path / str(number), number) for number in range(4)]
    with fiber.Pool(2) as pool:
        assert pool.map(targets.square_in_a_process, items) == ["0\n", "1\n", "4\n", "9\n"]


def test_a_worker_of_a_pool_may_have_a_pool() -> None:
    with fiber.Pool(2) as pool:
        assert pool.map(targets.square_in_a_pool, [1, 2, 3]) == [[1, 4], [4, 9], [9, 16]]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_does_not_outlive_its_killed_parent(
    signum: int, tmp_path: Path, gone: Callable[[int], None]
) -> None:
    path = tmp_path / "pid"
    parent = fiber.Process(target=targets.start_and_wait, args=(path,))
    parent.start()
    until(path.exists)
    grandchild = int(path.read_text())
    assert psutil.pid_exists(grandchild)
    assert parent.pid is not None
    os.kill(parent.pid, signum)
    parent.join(30)
    gone(grandchild)


def test_the_killed_parent_of_others_disturbs_nobody_else(tmp_path: Path) -> None:
    other = fiber.Process(target=targets.sleep)
    other.start()
    path = tmp_path / "pid"
    parent = fiber.Process(target=targets.start_and_wait, args=(path,))
    parent.start()
    until(path.exists)
    parent.kill()
    parent.join()
    assert run(targets.nothing).exitcode == 0
    assert other.is_alive()
    other.kill()
    other.join()


def test_a_process_ends_its_daemons_and_waits_for_the_others(tmp_path: Path) -> None:
    path = tmp_path / "late"

    def slow() -> None:
        import time

        time.sleep(0.3)
        path.write_text("written")

    def parent() -> None:
        fiber.Process(target=targets.sleep, daemon=True).start()
        fiber.Process(target=slow, daemon=False).start()

    assert run(parent).exitcode == 0
    assert path.read_text() == "written"
