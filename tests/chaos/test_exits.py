"""Every way in which a program can end by itself: its exit code, no noise, and nothing left.

Programs run with the equivalent of `-X dev -W error`, so that a forgotten socket or file is told.
"""

from __future__ import annotations

import signal
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest

PROLOGUE = """\
import os, signal, sys, threading, time
import fiber

def nap(seconds):
    time.sleep(seconds)
    return seconds

def square(x):
    return x * x

def leave(code):
    sys.exit(code)

def fail():
    raise ValueError('of the program')

def say(*words):
    print(*words, flush=True)

"""


def source(main: str) -> str:
    body = textwrap.indent(textwrap.dedent(main), "    ")
    return f'{PROLOGUE}def main():\n{body}\n\nif __name__ == "__main__":\n    main()\n'


USED = "pool = fiber.Pool(2)\npool.map(square, range(4))\n"

# name: (program, exit code, last line of its errors, most seconds that it may take)
ENDS = {
    "end with a closed pool": (USED + "pool.close()\npool.join()", 0, "", 5),
    "end with a terminated pool": (USED + "pool.terminate()\npool.join()", 0, "", 5),
    "end after with": ("with fiber.Pool(2) as pool: pool.map(square, range(4))", 0, "", 5),
    "end after an unused pool": ("with fiber.Pool(2): pass", 0, "", 5),
    "end with a closed pool that was not joined": (USED + "pool.close()", 0, "", 5),
    "sys.exit in with": (
        "with fiber.Pool(2) as pool:\n    pool.map(square, range(4))\n    sys.exit(3)",
        3,
        "",
        5,
    ),
    "sys.exit while tasks run": (
        "with fiber.Pool(2) as pool:\n    pool.map_async(nap, [60] * 4)\n    sys.exit(3)",
        3,
        "",
        5,
    ),
    "sys.exit with a text": (
        "with fiber.Pool(2) as pool:\n    pool.map(square, [1])\n    sys.exit('a reason')",
        1,
        "a reason",
        5,
    ),
    "exception in with": (
        "with fiber.Pool(2) as pool:\n    pool.map_async(nap, [60] * 4)\n    fail()",
        1,
        "ValueError: of the program",
        5,
    ),
    "exception of a task": (
        "with fiber.Pool(2) as pool:\n    pool.map(leave, 'a', 1)\n",
        1,
        None,
        5,
    ),
    "imap left in the middle": (
        (
            "with fiber.Pool(2) as pool:\n"
            "    for x in pool.imap(square, iter(int, 1)):\n        sys.exit(4)"
        ),
        4,
        "",
        5,
    ),
    "daemonic process": (
        "p = fiber.Process(target=nap, args=(60,), daemon=True)\np.start()",
        0,
        "",
        5,
    ),
    "process that is joined at exit": (
        "p = fiber.Process(target=nap, args=(0.5,))\np.start()",
        0,
        "",
        5,
    ),
    "process and exception": (
        "p = fiber.Process(target=nap, args=(0.5,))\np.start()\nfail()",
        1,
        "ValueError: of the program",
        5,
    ),
    "exit code of a process": (
        "p = fiber.Process(target=leave, args=(7,))\np.start()\np.join()\nsys.exit(p.exitcode)",
        7,
        "",
        5,
    ),
    "process that was killed": (
        (
            "p = fiber.Process(target=nap, args=(60,))\np.start()\np.kill()\np.join()\n"
            "sys.exit(-p.exitcode)"
        ),
        9,
        "",
        5,
    ),
    "many pools": (
        "for _ in range(5):\n    with fiber.Pool(2) as pool: pool.map(square, range(4))",
        0,
        "",
        8,
    ),
    "pool in a thread that goes on after the main thread": (
        (
            "def work():\n    with fiber.Pool(2) as pool:\n        pool.map(nap, [0.2] * 4)\n"
            "    say('thread done')\n"
            "threading.Thread(target=work).start()"
        ),
        0,
        "",
        5,
    ),
    "pool in a daemonic thread": (
        (
            "def work():\n    with fiber.Pool(2) as pool:\n        pool.map(nap, [60] * 4)\n"
            "threading.Thread(target=work, daemon=True).start()\ntime.sleep(0.5)"
        ),
        0,
        "",
        5,
    ),
    "callback that did not end": (
        USED + "pool.apply_async(square, (2,), callback=lambda _: time.sleep(0.3)).get()\n"
        "pool.close(); pool.join()",
        0,
        "",
        5,
    ),
    "only import": ("pass", 0, "", 5),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends(end: str, program: Callable[..., Any]) -> None:
    main, code, last, seconds = ENDS[end]
    # By the environment and not by flags, so that it reaches the agent and its processes too.
    strict = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
    running = program(source(main), env=strict)
    assert running.end(within=seconds) == code, running.err
    errors = running.err.strip().splitlines()
    assert "Exception ignored" not in running.err, running.err
    assert "Warning" not in running.err, running.err
    if last is not None:
        assert (errors[-1] if errors else "") == last, running.err
        assert running.err.count("Traceback") == (1 if "Error" in last else 0), running.err
    running.leaves_nothing(within=2)


OPEN = {
    "end": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "exception": ("fail()", 1),
    "end while tasks run": ("pool.map_async(nap, [60] * 4)", 0),
    "exception while tasks run": ("r = pool.map_async(nap, [60] * 4)\nfail()", 1),
}


@pytest.mark.parametrize("end", OPEN)
def test_a_program_ends_with_an_open_pool(end: str, program: Callable[..., Any]) -> None:
    rest, code = OPEN[end]
    running = program(source(USED + rest))
    assert running.end(within=5) == code, running.err
    assert "Exception ignored" not in running.err
    assert running.err.count("Traceback") == (code == 1)
    running.leaves_nothing(within=2)


@pytest.mark.parametrize("where", ["local", "global"])
def test_an_open_pool_is_told_like_any_open_resource(
    where: str, program: Callable[..., Any]
) -> None:
    """With warnings on, a dropped pool says so, in multiprocessing's words; and it ends."""
    drop = "del pool\nimport gc; gc.collect()\ntime.sleep(0.3)" if where == "local" else ""
    running = program(source(USED + drop), env={"PYTHONWARNINGS": "always::ResourceWarning"})
    assert running.end(within=5) == 0
    assert "Traceback" not in running.err
    if where == "local":
        words = "ResourceWarning: unclosed running multiprocessing pool <fiber.Pool running"
        assert words in running.err
    running.leaves_nothing(within=2)


@pytest.mark.parametrize("what", ["pool", "process", "daemonic process"])
def test_os_exit_of_the_master(what: str, program: Callable[..., Any]) -> None:
    main = {
        "pool": USED + "pool.map_async(nap, [60] * 4)",
        "process": "p = fiber.Process(target=nap, args=(60,))\np.start()",
        "daemonic process": "p = fiber.Process(target=nap, args=(60,), daemon=True)\np.start()",
    }[what]
    running = program(source(main + "\nos._exit(5)"))
    assert running.end(within=5) == 5
    running.leaves_nothing(within=5)
    assert running.err == ""


@pytest.mark.parametrize("number", ["SIGSEGV", "SIGABRT", "SIGHUP", "SIGQUIT"])
def test_a_master_that_crashes(number: str, program: Callable[..., Any]) -> None:
    running = program(
        source(
            USED + "pool.map_async(nap, [60] * 4)\n"
            f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
            f"os.kill(os.getpid(), signal.{number}); time.sleep(60)"
        )
    )
    assert running.end(within=5) == -getattr(signal, number)
    running.leaves_nothing(within=5)


def test_processes_that_are_left_to_themselves(program: Callable[..., Any]) -> None:
    """As with multiprocessing: the daemonic one is ended, the other one is waited for."""
    running = program(
        source("""\
            quick = fiber.Process(target=lambda: (time.sleep(1), say('waited for')))
            slow = fiber.Process(target=nap, args=(60,), daemon=True)
            quick.start()
            slow.start()
            """)
    )
    assert running.end(within=10) == 0, running.err
    assert "waited for" in running.out
    assert running.err == ""
    running.leaves_nothing(within=2)


def test_the_end_of_a_program_takes_a_moment_only(program: Callable[..., Any]) -> None:
    """From the last statement of a program that used a Pool(2) to the end of its process."""
    times = []
    for _ in range(5):
        running = program(
            source("""\
                with fiber.Pool(2) as pool:
                    pool.map(square, range(100))
                    last = time.time()
                say(last)
                """)
        )
        running.wait_for(".")
        assert running.end(within=5) == 0
        times.append(time.time() - float(running.out))
        running.leaves_nothing(within=2)
    print("seconds to the end:", [round(seconds, 4) for seconds in times])
    assert sorted(times)[2] < 0.5
