"""`kill -9` of the master, whatever it does: nothing of it is left five seconds later."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import textwrap
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

PROLOGUE = """\
import os, signal, sys, threading, time
import fiber

def nap(seconds):
    time.sleep(seconds)
    return seconds

def busy(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass

def hold_the_interpreter(seconds):
    sum(range(10**13))  # one call in C, during which no other thread of the process runs

def chatter(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        print('x' * 200, flush=True)
        print('y' * 200, file=sys.stderr, flush=True)

def deaf(seconds):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(seconds)

def parent(depth):
    children = [fiber.Process(target=parent, args=(depth - 1,)) for _ in range(2 * (depth > 0))]
    for child in children:
        child.start()
    time.sleep(60)

def nested_pool(seconds):
    with fiber.Pool(2) as pool:
        pool.map(nap, [seconds] * 4)

def say(*words):
    print(*words, flush=True)

"""


def source(main: str) -> str:
    body = textwrap.indent(textwrap.dedent(main), "    ")
    return f'{PROLOGUE}def main():\n{body}\n\nif __name__ == "__main__":\n    main()\n'


PHASES = {
    "tasks that sleep": ("with fiber.Pool(2) as pool: pool.map(nap, [60] * 4)", 4),
    "tasks that compute": ("with fiber.Pool(2) as pool: pool.map(busy, [60] * 4)", 4),
    "tasks that hold the interpreter": (
        "with fiber.Pool(2) as pool: pool.map(hold_the_interpreter, [60] * 4)",
        4,
    ),
    "tasks that print": ("with fiber.Pool(2) as pool: pool.map(chatter, [60] * 4)", 4),
    "tasks that ignore signals": ("with fiber.Pool(2) as pool: pool.map(deaf, [60] * 4)", 4),
    "nested pools": ("with fiber.Pool(2) as pool: pool.map(nested_pool, [60] * 4)", 8),
    "a process": ("p = fiber.Process(target=nap, args=(60,)); p.start(); p.join()", 3),
    "a process that ignores signals": (
        "p = fiber.Process(target=deaf, args=(60,)); p.start(); p.join()",
        3,
    ),
    "nested processes": ("p = fiber.Process(target=parent, args=(3,)); p.start(); p.join()", 17),
    "an idle pool": ("pool = fiber.Pool(3); time.sleep(60)", 5),
    "a pool that streams": (
        "with fiber.Pool(2) as pool:\n    for _ in pool.imap(abs, iter(int, 1)): pass",
        4,
    ),
}


def when_settled(running: Any, count: int) -> None:
    """Wait until the program has `count` processes."""
    deadline = time.monotonic() + 20
    while len(running.processes()) < count:
        assert time.monotonic() < deadline, f"{running.left()}\n{running.err}"
        time.sleep(0.02)
    time.sleep(0.2)  # its tasks begin


@pytest.mark.parametrize("phase", PHASES)
def test_nothing_is_left(phase: str, program: Callable[..., Any]) -> None:
    main, count = PHASES[phase]
    running = program(source(main))
    when_settled(running, count)
    os.kill(running.pid, signal.SIGKILL)
    assert running.end(within=5) == -signal.SIGKILL
    running.leaves_nothing(within=5)


def test_nothing_is_left_of_stopped_workers(program: Callable[..., Any]) -> None:
    running = program(source("with fiber.Pool(3) as pool: pool.map(nap, [60] * 4)"))
    when_settled(running, 5)
    for process in running.processes():
        if process.pid not in (running.pid, *running.agents()):
            process.suspend()
    os.kill(running.pid, signal.SIGKILL)
    running.end(within=5)
    running.leaves_nothing(within=5)


@pytest.mark.parametrize("seed", range(16))
def test_nothing_is_left_of_a_program_that_starts(seed: int, program: Callable[..., Any]) -> None:
    running = program(source("say('ready')\nwith fiber.Pool(4) as pool: pool.map(nap, [60] * 4)"))
    running.wait_for("ready")
    time.sleep(0.012 * seed)
    os.kill(running.pid, signal.SIGKILL)
    running.end(within=5)
    running.leaves_nothing(within=5, folder=False)
    next_session_sweeps(program, running)


def next_session_sweeps(program: Callable[..., Any], dead: Any) -> None:
    """At the next session's start, if not before, the folder of a dead one goes."""
    after = program(source("with fiber.Pool(1) as pool: assert pool.apply(abs, (-1,)) == 1"))
    assert after.end(within=10) == 0, after.err
    assert after.err == ""
    dead.leaves_nothing(within=1)
    after.leaves_nothing()


@pytest.mark.parametrize("phase", ["tasks that sleep", "tasks that ignore signals"])
@pytest.mark.parametrize("agent_first", [True, False])
def test_master_and_agent_killed_together(
    phase: str, agent_first: bool, program: Callable[..., Any]
) -> None:
    main, count = PHASES[phase]
    running = program(source(main))
    when_settled(running, count)
    victims = [*running.agents(), running.pid]
    assert len(victims) == 2
    for pid in victims if agent_first else victims[::-1]:
        os.kill(pid, signal.SIGKILL)
    running.end(within=5)
    running.leaves_nothing(within=5, folder=False)
    next_session_sweeps(program, running)


@pytest.mark.parametrize("phase", ["nested pools", "nested processes"])
def test_the_whole_tree_dies_with_master_and_agent(phase: str, program: Callable[..., Any]) -> None:
    main, count = PHASES[phase]
    running = program(source(main))
    when_settled(running, count)
    for pid in (running.pid, *running.agents()):
        os.kill(pid, signal.SIGKILL)
    running.end(within=5)
    running.leaves_nothing(within=5, folder=False)
    next_session_sweeps(program, running)


def test_a_living_session_is_not_swept(program: Callable[..., Any]) -> None:
    living = program(
        source("""\
            with fiber.Pool(1) as pool:
                assert pool.apply(abs, (-1,)) == 1
                say('ready')
                sys.stdin.readline()
                os.kill(pool.pids()[0], signal.SIGKILL)
                assert pool.apply(abs, (-2,)) == 2
            """),
        stdin=-1,
    )
    living.wait_for("ready")
    folder = sorted(living.folders())
    assert folder
    other = program(source("with fiber.Pool(1) as pool: assert pool.apply(abs, (-1,)) == 1"))
    assert other.end(within=10) == 0, other.err
    assert set(living.folders()) >= set(folder)
    living.process.stdin.write("\n")
    living.process.stdin.flush()
    assert living.end(within=10) == 0, living.err


def test_processes_of_a_killed_child_die_with_it(program: Callable[..., Any]) -> None:
    running = program(
        source("""\
            p = fiber.Process(target=parent, args=(2,))
            p.start()
            say('child', p.pid, '.')
            p.join()
            say('code', p.exitcode)
            """)
    )
    when_settled(running, 2 + 7)
    child = int(running.out.split()[1])
    os.kill(child, signal.SIGKILL)
    assert running.end(within=10) == 0
    assert "code -9" in running.out
    running.leaves_nothing()


@pytest.mark.slow
def test_killed_at_any_moment(program: Callable[..., Any]) -> None:
    """Forty programs that start, work and end, each killed somewhere in between."""
    moments = random.Random(3)
    for _ in range(40):
        running = program(
            source("""\
                say('ready')
                for round in range(3):
                    with fiber.Pool(2) as pool:
                        pool.map(nap, [0.01] * 10)
                    p = fiber.Process(target=nap, args=(0.05,))
                    p.start()
                    p.join()
                """)
        )
        running.wait_for("ready")
        time.sleep(moments.random() * 0.9)
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            running.process.kill()
        running.end(within=5)
        running.leaves_nothing(within=5, folder=False)
