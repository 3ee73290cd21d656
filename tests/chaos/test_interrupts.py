"""Ctrl-C, and other signals: one clean end, or none at all where the program catches it.

Signals go to the whole process group, as from a terminal.
"""

from __future__ import annotations

import os
import pty
import random
import signal
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest

PROLOGUE = """\
import os, random, signal, sys, threading, time
import fiber

def nap(seconds):
    time.sleep(seconds)
    return seconds

def busy(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds

def square(x):
    return x * x

def say(*words):
    print(*words, flush=True)

"""


def source(main: str, elsewhere: str = "pass") -> str:
    """The program whose master does `main`; where else it is loaded, it does `elsewhere`."""
    body = textwrap.indent(textwrap.dedent(main), "    ")
    end = f'if __name__ == "__main__":\n    main()\nelse:\n    {elsewhere}\n'
    return f"{PROLOGUE}def main():\n{body}\n\n{end}"


WAITING = {
    "map": "pool.map(nap, [60] * 5)",
    "map of busy tasks": "pool.map(busy, [60] * 5)",
    "map of many": "pool.map(nap, [0.001] * 1_000_000)",
    "imap": "list(pool.imap(nap, [60] * 5))",
    "imap of many": "for _ in pool.imap(square, iter(int, 1)): pass",
    "imap_unordered": "list(pool.imap_unordered(nap, [60] * 5))",
    "imap, next with a time-out": "pool.imap(nap, [60] * 5).next(60)",
    "apply": "pool.apply(nap, (60,))",
    "get": "pool.apply_async(nap, (60,)).get()",
    "get with a time-out": "pool.map_async(nap, [60] * 5).get(60)",
    "wait": "pool.apply_async(nap, (60,)).wait()",
    "join": "pool.map_async(nap, [60] * 5); pool.close(); pool.join()",
}
POOLS = {
    "with": "with fiber.Pool(2) as pool:",
    "open": "pool = fiber.Pool(2)\nif True:",
}


def is_one_clean_interrupt(err: str) -> bool:
    """Whether the program's errors are one traceback that ends in KeyboardInterrupt."""
    lines = err.strip().splitlines()
    return (
        err.count("Traceback") == 1
        and err.count("KeyboardInterrupt") == 1
        and lines[0].startswith("Traceback")
        and lines[-1] == "KeyboardInterrupt"
    )


@pytest.mark.parametrize("how", POOLS)
@pytest.mark.parametrize("call", WAITING)
def test_ctrl_c_ends_the_program_at_once(call: str, how: str, program: Callable[..., Any]) -> None:
    main = f"{POOLS[how]}\n    pool.map(abs, range(4))\n    say('ready')\n    {WAITING[call]}"
    running = program(source(main))
    running.wait_for("ready")
    time.sleep(0.1)  # so that it waits; any other moment is tried below
    running.interrupt()
    assert running.end(within=2) == -signal.SIGINT
    assert is_one_clean_interrupt(running.err), running.err
    running.leaves_nothing(within=1)


THREADS = {
    "joined": "worker.join()",
    "while the main thread computes": "busy(60)",
    "while the main thread sleeps": "time.sleep(60)",
    "while the main thread waits as well": "pool.apply(nap, (60,))",
}


@pytest.mark.parametrize("daemon", [True, False])
@pytest.mark.parametrize("main_does", THREADS)
def test_ctrl_c_ends_a_pool_in_another_thread(
    main_does: str, daemon: bool, program: Callable[..., Any]
) -> None:
    running = program(
        source(f"""\
            pool = fiber.Pool(2)
            pool.map(abs, range(4))
            worker = threading.Thread(target=pool.map, args=(nap, [60] * 5), daemon={daemon})
            worker.start()
            say('ready')
            {THREADS[main_does]}
            """)
    )
    running.wait_for("ready")
    time.sleep(0.1)
    running.interrupt()
    assert running.end(within=2) == -signal.SIGINT
    assert is_one_clean_interrupt(running.err), running.err
    running.leaves_nothing(within=1)


def test_ctrl_c_in_a_terminal(program: Callable[..., Any]) -> None:
    ours, theirs = pty.openpty()
    try:
        running = program(
            source("""\
                # Whoever leads a session and opens a terminal has it for its own.
                os.close(os.open(os.ttyname(0), os.O_RDWR))
                with fiber.Pool(2) as pool:
                    pool.map(abs, range(4))
                    say('ready')
                    pool.map(nap, [60] * 5)
                """),
            stdin=theirs,
        )
        running.wait_for("ready")
        os.write(ours, b"\x03")
        assert running.end(within=2) == -signal.SIGINT
        assert is_one_clean_interrupt(running.err), running.err
        running.leaves_nothing(within=1)
    finally:
        os.close(ours)
        os.close(theirs)


def test_ctrl_c_while_a_process_is_joined(program: Callable[..., Any]) -> None:
    # The child gets the signal as well and says so, as with multiprocessing.
    running = program(
        source("""\
            process = fiber.Process(target=lambda: (say('ready'), nap(60)))
            process.start()
            process.join()
            """)
    )
    running.wait_for("ready")
    running.interrupt()
    assert running.end(within=2) == -signal.SIGINT
    assert "Exception ignored" not in running.err
    running.leaves_nothing(within=1)


def test_ctrl_c_that_is_caught_leaves_the_pool_as_it_was(program: Callable[..., Any]) -> None:
    running = program(
        source("""\
            with fiber.Pool(2) as pool:
                pool.map(nap, [0.1] * 4)  # both workers are up
                for call in (
                    lambda: pool.map(nap, [0.2] * 10),
                    lambda: list(pool.imap(nap, [0.2] * 10)),
                    lambda: pool.apply(nap, (1.5,)),
                    lambda: pool.apply_async(nap, (1.5,)).get(30),
                ):
                    pids = sorted(pool.pids())
                    say('ready')
                    try:
                        call()
                    except KeyboardInterrupt:
                        say('caught')
                    else:
                        say('missed')
                    sys.stdin.readline()
                    assert pool.map(square, range(1000)) == [x * x for x in range(1000)]
                    assert list(pool.imap(square, range(100))) == [x * x for x in range(100)]
                    assert pool.apply(square, (7,)) == 49
                    assert sorted(pool.pids()) == pids, (pids, pool.pids())
                say('done')
            """),
        stdin=-1,
    )
    for round in range(1, 5):
        deadline = time.monotonic() + 20
        while running.out.count("ready") < round:
            assert time.monotonic() < deadline, running.err
            assert running.process.poll() is None, running.err
            time.sleep(0.005)
        time.sleep(0.1)
        running.interrupt()
        while running.out.count("caught") < round:
            assert time.monotonic() < deadline, running.out + running.err
            time.sleep(0.005)
        running.process.stdin.write("\n")
        running.process.stdin.flush()
    assert running.end(within=10) == 0, running.err
    assert "done" in running.out
    assert running.err == ""
    running.leaves_nothing()


@pytest.mark.parametrize("gap", [0.0, 0.005, 0.02, 0.1])
def test_ctrl_c_twice(gap: float, program: Callable[..., Any]) -> None:
    running = program(
        source("""\
            with fiber.Pool(2) as pool:
                pool.map(abs, range(4))
                say('ready')
                pool.map(nap, [60] * 5)
            """)
    )
    running.wait_for("ready")
    time.sleep(0.1)
    running.interrupt()
    time.sleep(gap)
    running.interrupt()
    assert running.end(within=2) != 0
    assert "Fatal" not in running.err
    running.leaves_nothing()


@pytest.mark.parametrize("seed", range(12))
def test_ctrl_c_while_it_starts(seed: int, program: Callable[..., Any]) -> None:
    running = program(
        source("""\
            say('ready')
            if sys.argv[1] == 'pool':
                with fiber.Pool(2) as pool:
                    pool.map(nap, [60] * 5)
            else:
                process = fiber.Process(target=nap, args=(60,), daemon=True)
                process.start()
                process.join()
            """),
        "pool" if seed % 3 else "process",
    )
    running.wait_for("ready")
    time.sleep(0.03 * seed)
    running.interrupt()
    assert running.end(within=2) == -signal.SIGINT, running.err
    assert "Exception ignored" not in running.err
    if seed % 3:
        assert is_one_clean_interrupt(running.err), running.err
    running.leaves_nothing()


@pytest.mark.parametrize("what", ["process", "pool"])
def test_ctrl_c_while_the_main_module_loads(what: str, program: Callable[..., Any]) -> None:
    start = {
        "process": "fiber.Process(target=nap, args=(60,)).start()",
        "pool": "fiber.Pool(2).map(nap, [60] * 5)",
    }
    running = program(source(start[what], elsewhere="say('loads'); time.sleep(60)"))
    running.wait_for("loads")
    running.interrupt()
    assert running.end(within=2) == -signal.SIGINT, running.err
    assert is_one_clean_interrupt(running.err), running.err
    running.leaves_nothing(within=1)


@pytest.mark.slow
def test_hundreds_of_interrupts_at_random_moments(program: Callable[..., Any]) -> None:
    many = 200
    running = program(
        source(f"""\
            pool = fiber.Pool(2)
            # What another thread waits for has nothing to do with the interrupts.
            others, over = [0], threading.Event()
            def other():
                while not over.is_set():
                    assert pool.map(square, range(20)) == [x * x for x in range(20)]
                    others[0] += 1
            thread = threading.Thread(target=other)
            thread.start()
            caught = i = 0
            while caught < {many}:
                try:
                    say(f'caught {{caught}}.')  # the next comes as soon as this is out
                    while True:
                        i += 1
                        assert pool.apply(square, (i,)) == i * i
                        assert pool.map(square, range(i % 50)) == [x * x for x in range(i % 50)]
                        assert list(pool.imap(square, range(5))) == [0, 1, 4, 9, 16]
                        result = pool.apply_async(square, (3,))
                        assert result.get(20) == 9
                        with fiber.Pool(1) as short:
                            assert short.map(square, [1, 2]) == [1, 4]
                except KeyboardInterrupt:
                    caught += 1
            assert pool.map(square, range(1000)) == [x * x for x in range(1000)]
            over.set()
            thread.join()
            assert others[0] > 10
            pool.close()
            pool.join()
            say('done')
            """)
    )
    moments = random.Random(11)
    for number in range(many):
        running.wait_for(f"caught {number}.", within=5)
        time.sleep(moments.random() * 0.06)
        running.interrupt()
    assert running.end(within=10) == 0, running.err
    assert "done" in running.out
    assert running.err == ""
    running.leaves_nothing()


def test_an_alarm_that_raises_ends_a_wait_and_nothing_else(program: Callable[..., Any]) -> None:
    running = program(
        source("""\
            class Late(Exception): pass
            def late(signum, frame): raise Late
            signal.signal(signal.SIGALRM, late)
            moments = random.Random(5)
            ended = 0
            with fiber.Pool(2) as pool:
                pool.map(nap, [0.05] * 4)
                pids = sorted(pool.pids())
                for i in range(300):
                    try:
                        # It repeats, for Python itself swallows what is raised in a finalizer.
                        signal.setitimer(signal.ITIMER_REAL, moments.random() * 0.02, 0.1)
                        while True:
                            assert pool.map(square, range(10)) == [x * x for x in range(10)]
                            assert pool.apply(square, (i,)) == i * i
                            assert list(pool.imap(square, [1, 2])) == [1, 4]
                    except Late:
                        ended += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
                began = time.monotonic()
                try:
                    signal.alarm(1)
                    pool.map(nap, [30, 30])
                except Late:
                    ended += 1
                assert time.monotonic() - began < 2
                assert sorted(pool.pids()) == pids
                assert signal.getsignal(signal.SIGALRM) is late
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            say('done', ended)
            """)
    )
    assert running.end(within=30) == 0, running.err
    assert "done 301" in running.out
    assert running.err == ""
    running.leaves_nothing()


def test_an_alarm_at_any_instruction_disables_no_handler(program: Callable[..., Any]) -> None:
    """One that raises while handlers are being put off, or back, must not cost another's signal."""
    running = program(
        source("""\
            class Late(Exception): pass
            def late(signum, frame): raise Late
            def arrives(number, expected):
                try:
                    os.kill(os.getpid(), number)
                    time.sleep(5)
                except expected:
                    return
                raise AssertionError(f'{number!r} is lost after {alarms} alarms')
            signal.signal(signal.SIGALRM, late)
            alarms = 0
            with fiber.Pool(1) as pool:
                end = time.monotonic() + 5
                while time.monotonic() < end:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 0.0001 + 0.0008 * random.random())
                        while True:
                            pool.stats()
                    except Late:
                        alarms += 1
                    arrives(signal.SIGINT, KeyboardInterrupt)
                    arrives(signal.SIGALRM, Late)
                assert alarms > 300, alarms
                assert pool.map(square, range(10)) == [x * x for x in range(10)]
                assert signal.getsignal(signal.SIGALRM) is late
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            say('done')
            """)
    )
    assert running.end(within=30) == 0, running.err
    assert "done" in running.out
    running.leaves_nothing()


@pytest.mark.parametrize("call", ["map", "map of busy tasks", "imap of many", "join"])
def test_sigterm_ends_the_master_as_it_ends_any_program(
    call: str, program: Callable[..., Any]
) -> None:
    running = program(
        source(
            f"with fiber.Pool(2) as pool:\n    pool.map(abs, range(4))\n    say('ready')\n"
            f"    {WAITING[call]}"
        )
    )
    running.wait_for("ready")
    running.process.terminate()
    assert running.end(within=2) == -signal.SIGTERM
    running.leaves_nothing()
    assert running.err == ""


def test_sigterm_that_a_program_turns_into_an_exit(program: Callable[..., Any]) -> None:
    running = program(
        source("""\
            signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(7))
            with fiber.Pool(2) as pool:
                pool.map(abs, range(4))
                say('ready')
                pool.map(nap, [60] * 5)
            """)
    )
    running.wait_for("ready")
    time.sleep(0.1)
    running.process.terminate()
    assert running.end(within=2) == 7
    assert running.err == ""
    running.leaves_nothing(within=1)
