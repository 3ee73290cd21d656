"""What becomes of processes when the program that started them ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import until

Run = Callable[..., Any]

HEAD = """
import fiber, os, sys, time
from pathlib import Path

def slow(path):
    time.sleep(0.5)
    Path(path).write_text("written")

def forever(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(3600)

def wait_for(path):
    while not Path(path).exists() or not Path(path).read_text():
        time.sleep(0.01)
"""


def test_processes_are_joined_at_exit(run_script: Run, tmp_path: Path) -> None:
    done = run_script(
        HEAD
        + """
if __name__ == "__main__":
    fiber.Process(target=slow, args=("late",)).start()
    print("end of main")
"""
    )
    assert (done.stdout, done.stderr, done.returncode) == ("end of main\n", "", 0)
    assert (tmp_path / "late").read_text() == "written"


def test_daemons_are_ended_at_exit(
    run_script: Run, tmp_path: Path, gone: Callable[[int], None]
) -> None:
    done = run_script(
        HEAD
        + """
if __name__ == "__main__":
    fiber.Process(target=forever, args=("pid",), daemon=True).start()
    wait_for("pid")
""",
        timeout=20,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("statement", "code"),
    [("sys.exit(3)", 3), ("raise ValueError('the end')", 1), ("pass", 0)],
)
def test_the_exit_code_of_the_program_is_its_own(
    statement: str, code: int, run_script: Run, tmp_path: Path
) -> None:
    done = run_script(
        HEAD
        + f"""
if __name__ == "__main__":
    fiber.Process(target=forever, args=("pid",), daemon=True).start()
    fiber.Process(target=slow, args=("late",)).start()
    {statement}
"""
    )
    assert done.returncode == code
    assert (tmp_path / "late").read_text() == "written"
    assert ("ValueError: the end" in done.stderr) == (code == 1)


@pytest.mark.parametrize("how", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_nothing_outlives_a_program_that_ends_at_once(
    how: str, run_script: Run, tmp_path: Path, gone: Callable[[int], None]
) -> None:
    run_script(
        HEAD
        + f"""
if __name__ == "__main__":
    fiber.Process(target=forever, args=("pid",)).start()
    wait_for("pid")
    {how}
""",
        timeout=20,
    )
    gone(int((tmp_path / "pid").read_text()))


def test_processes_may_be_started_at_exit(run_script: Run) -> None:
    done = run_script(
        """
import atexit, fiber

def say(what):
    print(what, flush=True)

def last():
    process = fiber.Process(target=say, args=("from a process",))
    process.start()
    process.join()
    say(process.exitcode)

if __name__ == "__main__":
    atexit.register(last)
    fiber.Process(target=say, args=("first",)).start()
"""
    )
    assert (done.stdout, done.stderr) == ("first\nfrom a process\n0\n", "")


def test_atexit_of_the_program_does_not_run_in_its_processes(run_script: Run) -> None:
    done = run_script(
        """
import atexit, fiber

def nothing(): pass

if __name__ == "__main__":
    atexit.register(print, "at exit")
    fiber.Process(target=nothing).start()
"""
    )
    assert (done.stdout, done.stderr) == ("at exit\n", "")


def test_a_process_runs_multiprocessing_s_finalizers_at_its_end(run_script: Run) -> None:
    done = run_script(
        """
import fiber
from multiprocessing.util import Finalize

def child():
    Finalize(None, print, args=("finalized",), exitpriority=1)

if __name__ == "__main__":
    fiber.Process(target=child).start()
"""
    )
    assert (done.stdout, done.stderr) == ("finalized\n", "")


def test_a_process_waits_for_its_threads(run_script: Run) -> None:
    done = run_script(
        """
import fiber, threading, time

def late():
    time.sleep(0.2)
    print("from a thread")

def child():
    threading.Thread(target=late).start()

if __name__ == "__main__":
    fiber.Process(target=child).start()
"""
    )
    assert (done.stdout, done.stderr) == ("from a thread\n", "")


def test_ctrl_c_reaches_the_program_and_its_processes_once(
    start_script: Run, tmp_path: Path
) -> None:
    program = start_script(
        HEAD
        + """
def interrupted(path):
    try:
        forever(path)
    except KeyboardInterrupt:
        print("child", flush=True)

if __name__ == "__main__":
    process = fiber.Process(target=interrupted, args=("pid",))
    process.start()
    try:
        open("waits", "w").close()
        process.join()
    except KeyboardInterrupt:
        process.join()
        print("parent", process.exitcode, flush=True)
"""
    )
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    until((tmp_path / "waits").exists)  # a process may run before its `start` returns
    os.killpg(program.pid, signal.SIGINT)
    out, err = program.communicate(timeout=20)
    assert (out, err, program.returncode) == ("child\nparent 0\n", "", 0)
