"""Forks, and programs that end or are killed: whose memory stays, and that nothing else does."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.shared import targets
from tests.waiting import until

import fiber
from fiber.runtime import folders, session
from fiber.sharedctypes import RawArray, RawValue

MEMORY = Path("/dev/shm")

PROGRAM = """\
import os, signal, sys, time
import numpy
import fiber
from fiber.shared_memory import SharedMemory

def hold(array, name):
    mine, block = fiber.RawArray("b", 1 << 21), SharedMemory(name + "c", create=True, size=100)
    array[0] = len(mine)
    time.sleep(60)

if __name__ == "__main__":
    name = sys.argv[1]
    value, array = fiber.Value("i"), fiber.RawArray("d", 1 << 18)
    block = SharedMemory(name, create=True, size=100)
    process = fiber.Process(target=hold, args=(array, name), daemon=True)
    process.start()
    while not array[0]:
        time.sleep(0.01)
    print("ready", process.pid, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def start(start_script: Callable[..., Any]) -> Callable[[], subprocess.Popen[str]]:
    """Start a program with values, arrays and blocks of memory, in itself and in a child."""

    def run() -> subprocess.Popen[str]:
        name = f"tests-{os.getpid()}"
        process: subprocess.Popen[str] = start_script(PROGRAM, name, stdin=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        return process

    return run


def left_of(pid: int) -> list[Path]:
    """Return what there is of the session of the process, and of the blocks of the program."""
    session_files = f"fiber-{os.getuid()}-{pid}-*"
    folders = [*Path(tempfile.gettempdir()).glob(session_files), *MEMORY.glob(session_files)]
    return [*folders, *MEMORY.glob(f"tests-{os.getpid()}*")]


def helpers_of(pid: int) -> list[psutil.Process]:
    """Return the processes that would clean up after the program: its agent and its janitor."""
    helpers = psutil.Process(pid).children()
    assert len(helpers) == 2
    return helpers


def test_nothing_is_left_of_a_program_that_ends(start: Callable[[], subprocess.Popen[str]]) -> None:
    program = start()
    assert len(left_of(program.pid)) == (4 if MEMORY.is_dir() else 1)
    _, errors = program.communicate("\n", timeout=20)
    assert errors == ""
    assert program.returncode == 0
    assert left_of(program.pid) == []


def test_nothing_is_left_of_a_killed_program(start: Callable[[], subprocess.Popen[str]]) -> None:
    program = start()
    program.kill()
    until(lambda: left_of(program.pid) == [], "the end of its files")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize(
    "make",
    [
        "fiber.shared_memory.SharedMemory(sys.argv[1], create=True, size=100)",
        "fiber.RawArray('b', 1 << 21)",
    ],
)
def test_nothing_is_left_of_a_killed_program_that_has_started_no_process(
    make: str,
    number: int,
    start_script: Callable[..., Any],
) -> None:
    code = f"import sys, fiber\nmemory = {make}\nprint('ready', flush=True)\nsys.stdin.readline()"
    program = start_script(code, f"tests-{os.getpid()}", stdin=subprocess.PIPE)
    assert program.stdout.readline() == "ready\n"
    assert len(left_of(program.pid)) > MEMORY.is_dir()
    os.killpg(program.pid, number)  # as schedulers and time limits do
    until(lambda: left_of(program.pid) == [], "the end of its files")


def test_the_next_session_sweeps_what_a_killed_one_left(
    start: Callable[[], subprocess.Popen[str]],
) -> None:
    program = start()
    children = psutil.Process(program.pid).children(recursive=True)
    for helper in helpers_of(program.pid):
        helper.kill()
    program.kill()
    program.wait(20)
    psutil.wait_procs(children, timeout=20)
    assert left_of(program.pid)
    with fiber.Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1
    until(lambda: left_of(program.pid) == [], "the end of its files")


def test_memory_that_is_in_use_is_not_swept() -> None:
    if not MEMORY.is_dir():
        pytest.skip("this system has no /dev/shm")
    value = RawValue("i", 1)
    folder = Path(folders.memory_folder(session.folder()))
    folders.sweep()
    assert folder.is_dir()
    # As if another program, which shares our memory and not our files, looked at it.
    link = folder / folders.SESSION_LINK
    link.unlink()
    link.symlink_to("/nowhere")
    folders.sweep()
    assert folder.is_dir()
    process = fiber.Process(target=targets.double, args=(value,))
    process.start()
    process.join()
    assert value.value == 2
    del value
    folders.sweep()
    assert not folder.exists()


# Forks


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], object]], int]]:
    """`fork(work)` runs `work()` in a child of `os.fork` and returns its exit code."""

    def run(work: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    yield run
    folders.sweep()  # forks that end by `os._exit` leave theirs to others


def test_a_fork_shares_values(fork: Callable[[Callable[[], object]], int]) -> None:
    value, array = RawValue("i", 1), RawArray("b", [1] * targets.LARGE)

    def work() -> None:
        nonlocal array
        value.value += 1
        array[5] = 3
        del array

    assert fork(work) == 0
    assert value.value == 2
    assert array[5] == 3
    process = fiber.Process(target=targets.double, args=(value, array))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert value.value == 4
    assert array[5] == 6


def test_a_fork_has_its_own_heap(fork: Callable[[Callable[[], object]], int]) -> None:
    value = RawValue("i", 1)

    def work() -> None:
        values = [RawValue("i", 9) for _ in range(100)]
        assert len(values) == 100
        session.shutdown()

    assert fork(work) == 0
    values = [RawValue("i", 2) for _ in range(100)]
    assert value.value == 1
    assert all(v.value == 2 for v in values)


def test_a_fork_passes_on_what_it_inherited(fork: Callable[[Callable[[], object]], int]) -> None:
    value = RawValue("i", 1)

    def work() -> None:
        process = fiber.Process(target=targets.double, args=(value,))
        process.start()
        process.join()
        session.shutdown()

    assert fork(work) == 0
    assert value.value == 2


def test_a_fork_that_exits_as_usual_keeps_its_parents_memory(
    run_script: Callable[..., Any],
) -> None:
    done = run_script(
        """\
import os, sys
import fiber

def double(value, block):
    value.value *= 2
    print(bytes(block.buf[:2]), flush=True)

if __name__ == "__main__":
    from fiber.shared_memory import SharedMemory
    value, block = fiber.Value("i", 4), SharedMemory(create=True, size=10)
    block.buf[:2] = b"ab"
    if os.fork() == 0:
        sys.exit()
    os.wait()
    process = fiber.Process(target=double, args=(value, block))
    process.start()
    process.join()
    print(value.value)
""",
        env={"PYTHONWARNINGS": "ignore"},  # of forks while there are threads
    )
    assert (done.stdout, done.stderr) == ("b'ab'\n8\n", "")
