"""Signals: whose handlers run where, and what a signal to the whole program leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest

import fiber

Start = Callable[..., "subprocess.Popen[str]"]

SLEEPER = """
import os, signal, sys, time
import fiber

{setup}

def work():
    print("works", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    process = fiber.Process(target=work)
    process.start()
    process.join()
    print("exit code", process.exitcode, flush=True)
"""

HANDLER = """
def leave(signum, frame):
    print("handled", flush=True)
    sys.exit(3)

if __name__ == "__mp_main__":
    signal.signal(signal.SIGTERM, leave)
"""


def finish(program: subprocess.Popen[str]) -> str:
    output, errors = program.communicate(timeout=20)
    assert errors == ""
    return output


def test_a_handler_that_the_main_module_installs_is_the_childs(start_script: Start) -> None:
    program = start_script(SLEEPER.format(setup=HANDLER + "print(os.getpid(), flush=True)"))
    assert program.stdout is not None
    lines = iter(program.stdout.readline, "")
    assert [line.strip() for _, line in zip(range(3), lines, strict=False)][2] == "works"
    (child,) = [pid for pid in descendants(program.pid) if pid != program.pid and sleeps(pid)]
    os.kill(child, signal.SIGTERM)
    assert finish(program).splitlines() == ["handled", "exit code 3"]


def sleeps(pid: int) -> bool:
    """Whether it is the child and not the agent, which has children."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return not file.read().split()


def descendants(pid: int) -> list[int]:
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


@pytest.mark.parametrize("setup", ["", HANDLER])
def test_sigterm_to_all_of_a_program_leaves_nothing(start_script: Start, setup: str) -> None:
    """The folder is gone as well, says the leak check, though master and agent were both told."""
    program = start_script(SLEEPER.format(setup=setup))
    assert program.stdout is not None
    assert program.stdout.readline().strip() == "works"
    os.killpg(program.pid, signal.SIGTERM)
    assert finish(program) == ("handled\n" if setup else "")
    assert program.returncode == -signal.SIGTERM


def test_children_of_a_program_that_ignores_ctrl_c_ignore_it_as_well(start_script: Start) -> None:
    setup = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    program = start_script(SLEEPER.replace("60", "1").format(setup=setup))
    assert program.stdout is not None
    assert program.stdout.readline().strip() == "works"
    os.killpg(program.pid, signal.SIGINT)
    assert finish(program) == "exit code 0\n"


def test_a_signal_that_comes_with_the_start_is_not_lost() -> None:
    """It reaches the child in the moment of its fork, when it is not itself yet."""
    for number in range(60):
        process = fiber.Process(target=time.sleep, args=(60,))
        process.start()
        (process.terminate, process.kill)[number % 2]()
        process.join(20)
        assert process.exitcode == -(signal.SIGTERM, signal.SIGKILL)[number % 2]
