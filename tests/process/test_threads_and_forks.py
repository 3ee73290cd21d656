"""Fiber used by several threads at once, and in a program that forks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.process import targets

import fiber

Run = Callable[..., Any]


def test_processes_are_started_by_several_threads_at_once() -> None:
    barrier = threading.Barrier(8)

    def start(number: int) -> int | None:
        barrier.wait(20)
        process = fiber.Process(target=targets.leave, args=(number,))
        process.start()
        process.join(30)
        return process.exitcode

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(start, range(1, 25))) == list(range(1, 25))


def test_pools_of_several_threads_work_at_once() -> None:
    def work(start: int) -> list[int]:
        with fiber.Pool(1) as pool:
            return pool.map(targets.square, range(start, start + 100))

    with ThreadPoolExecutor(3) as threads:
        for start, squares in enumerate(threads.map(work, range(3))):
            assert squares == [n * n for n in range(start, start + 100)]


def test_one_pool_is_used_by_several_threads() -> None:
    with fiber.Pool(2) as pool, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(pool.map, targets.square, range(n)) for n in range(40)]
        answers = [future.result(30) for future in asked]
        singles = list(threads.map(lambda n: pool.apply(targets.square, (n,)), range(200)))
    assert answers == [[i * i for i in range(n)] for n in range(40)]
    assert singles == [n * n for n in range(200)]


def test_a_thread_starts_and_another_joins() -> None:
    process = fiber.Process(target=targets.leave, args=(4,))
    thread = threading.Thread(target=process.start)
    thread.start()
    thread.join(30)
    process.join(30)
    assert process.exitcode == 4


def test_a_program_whose_threads_still_wait_ends(run_script: Run) -> None:
    done = run_script(
        """
import fiber, threading, time

if __name__ == "__main__":
    process = fiber.Process(target=time.sleep, args=(3600,), daemon=True)
    process.start()
    threading.Thread(target=process.join, daemon=True).start()
    print("end")
""",
        timeout=20,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("end\n", "", 0)


# os.fork ---------------------------------------------------------------------------------------

FORK = """
import fiber, os, sys, time

def square(number):
    return number * number

def leave(code):
    sys.exit(code)

def forever():
    time.sleep(3600)

def run(code):
    process = fiber.Process(target=leave, args=(code,))
    process.start()
    process.join()
    return process.exitcode

def in_a_fork(function):
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = function()
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def test_a_fork_of_the_program_may_use_fiber_itself(run_script: Run) -> None:
    done = run_script(
        FORK
        + """
def child():
    with fiber.Pool(2) as pool:
        assert pool.map(square, range(3)) == [0, 1, 4]
    return run(5)

if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        print(pool.map(square, range(3)), run(3), flush=True)
        print(in_a_fork(child), flush=True)
        print(pool.map(square, range(3)), run(4))
"""
    )
    assert (done.stdout, done.stderr) == ("[0, 1, 4] 3\n5\n[0, 1, 4] 4\n", "")


def test_a_fork_leaves_the_parent_s_running_processes_alone(run_script: Run) -> None:
    # As a fork that ends by sys.exit: multiprocessing's exit handling then runs in it.
    done = run_script(
        FORK
        + """
def child():
    fiber.active_children()
    return run(6)

if __name__ == "__main__":
    daemon = fiber.Process(target=forever, daemon=True)
    daemon.start()
    other = fiber.Process(target=forever)
    other.start()
    print(in_a_fork(child), flush=True)
    print(daemon.is_alive(), other.is_alive(), len(fiber.active_children()))
    other.kill()
    other.join()
    print(other.exitcode, run(7))
"""
    )
    assert (done.stdout, done.stderr) == ("6\nTrue True 2\n-9 7\n", "")


def test_a_fork_that_ends_by_sys_exit_ends_nothing_of_the_parent(run_script: Run) -> None:
    done = run_script(
        FORK
        + """
if __name__ == "__main__":
    daemon = fiber.Process(target=forever, daemon=True)
    daemon.start()
    pool = fiber.Pool(2)
    print(pool.map(square, range(3)), flush=True)
    pid = os.fork()
    if pid == 0:
        sys.exit(run(6))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(daemon.is_alive(), pool.map(square, range(3)), run(7))
    pool.close()
    pool.join()
""",
        timeout=20,
    )
    assert (done.stdout, done.stderr) == ("[0, 1, 4]\n6\nTrue [0, 1, 4] 7\n", "")


def test_a_fork_of_a_process_of_fiber_may_use_fiber(run_script: Run) -> None:
    done = run_script(
        FORK
        + """
def parent():
    first = run(1)
    return sys.exit(10 * in_a_fork(lambda: run(2)) + first + run(3))

if __name__ == "__main__":
    process = fiber.Process(target=parent)
    process.start()
    process.join()
    print(process.exitcode)
"""
    )
    assert (done.stdout, done.stderr) == ("24\n", "")


def test_a_fork_while_other_threads_use_fiber(run_script: Run) -> None:
    done = run_script(
        FORK
        + """
import threading

def work():
    while not stop.is_set():
        assert pool.map(square, range(50)) == [n * n for n in range(50)]

if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        # What is imported at first use is there before, for a fork in the midst of an import
        # leaves the module locked for good.
        print(pool.map(lambda n: n, [0]), run(0), flush=True)
        stop = threading.Event()
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        print([in_a_fork(lambda: run(number)) for number in range(5)])
        stop.set()
        for thread in threads:
            thread.join()
        print(pool.map(square, range(3)))
""",
        timeout=40,
    )
    assert done.stdout == "[0] 0\n[0, 1, 2, 3, 4]\n[0, 1, 4]\n", done.stderr


def test_a_fork_that_lives_on_does_not_keep_the_session(
    start_script: Run, tmp_path: Path, gone: Callable[[int], None]
) -> None:
    program = start_script(
        FORK
        + """
if __name__ == "__main__":
    process = fiber.Process(target=forever)
    process.start()
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        time.sleep(3600)
        os._exit(0)
    print(process.pid, pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    )
    out, _ = program.communicate(timeout=20)
    pid, fork = map(int, out.split())
    try:
        gone(pid)
    finally:
        os.kill(fork, 9)


def test_a_program_with_a_living_fork_ends_promptly(run_script: Run) -> None:
    done = run_script(
        FORK
        + """
if __name__ == "__main__":
    run(0)
    pid = os.fork()
    if pid == 0:
        time.sleep(3600)
        os._exit(0)
    began = time.monotonic()
    from fiber.runtime import session
    session.shutdown()
    print(time.monotonic() - began < 2)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_command_that_inherits_descriptors_does_not_keep_the_session(
    start_script: Run, gone: Callable[[int], None]
) -> None:
    # Sockets of the session are not for commands, whatever close_fds says.
    program = start_script(
        FORK
        + """
import subprocess
if __name__ == "__main__":
    process = fiber.Process(target=forever)
    process.start()
    process.sentinel
    command = subprocess.Popen(
        ["sleep", "3600"], close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    print(process.pid, command.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    )
    out, _ = program.communicate(timeout=20)
    pid, command = map(int, out.split())
    try:
        gone(pid)
    finally:
        os.kill(command, 9)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not fork safely with threads")
def test_processes_of_multiprocessing_beside_those_of_fiber(run_script: Run) -> None:
    done = run_script(
        FORK
        + """
import multiprocessing

if __name__ == "__main__":
    print(run(1))
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        process = context.Process(target=leave, args=(2,))
        process.start()
        process.join()
        print(method, process.exitcode, run(3), flush=True)
        inside = context.Process(target=run_and_leave)
        inside.start()
        inside.join()
        print(inside.exitcode, flush=True)
""".replace("if __name__", "def run_and_leave():\n    sys.exit(run(4))\n\nif __name__", 1)
    )
    expected = ["1"]
    for method in ("fork", "spawn", "forkserver"):
        expected += [f"{method} 2 3", "4"]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


def test_fiber_within_a_worker_of_concurrent_futures(run_script: Run) -> None:
    done = run_script(
        FORK
        + """
from concurrent.futures import ProcessPoolExecutor

if __name__ == "__main__":
    print(run(1), flush=True)
    with ProcessPoolExecutor(2) as executor:
        print(list(executor.map(run, range(4))))
"""
    )
    assert (done.stdout, done.stderr) == ("1\n[0, 1, 2, 3]\n", "")


def test_a_sentinel_is_ready_although_a_fork_holds_a_copy(run_script: Run) -> None:
    done = run_script(
        FORK
        + """
from multiprocessing.connection import wait

if __name__ == "__main__":
    process = fiber.Process(target=forever)
    process.start()
    sentinel = process.sentinel
    pid = os.fork()
    if pid == 0:
        time.sleep(3600)
        os._exit(0)
    process.kill()
    print(wait([sentinel], 10) == [sentinel])
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_pool_of_the_parent_says_that_it_cannot_be_used_in_a_fork(run_script: Run) -> None:
    done = run_script(
        FORK
        + """
def child():
    for use in (lambda: pool.map(square, range(3)), lambda: pool.apply(square, (1,))):
        try:
            use()
        except Exception as error:
            print(isinstance(error, (RuntimeError, ValueError, fiber.FiberError)), flush=True)
    return 5

if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        print(pool.map(square, range(3)), flush=True)
        print(in_a_fork(child), flush=True)
        print(pool.map(square, range(3)))
""",
        timeout=20,
    )
    assert (done.stdout, done.stderr) == ("[0, 1, 4]\nTrue\nTrue\n5\n[0, 1, 4]\n", "")
