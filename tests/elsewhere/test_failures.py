"""What goes wrong elsewhere: it is noticed, explained, and nothing is left of it."""

from __future__ import annotations

import random
import signal
import time

import pytest
from tests.elsewhere.sites import Site

MAP = """
import fiber, time

def work(x):
    time.sleep(0.001)
    return x * x

if __name__ == "__main__":
    with fiber.Pool(4) as pool:
        results = pool.imap(work, range(10_000))
        found = [next(results) for _ in range(50)]
        print("begun", flush=True)
        found += results
    assert found == [x * x for x in range(10_000)]
    print("all", flush=True)
"""


@pytest.mark.parametrize("how", ["kill", "remove"])
def test_workers_that_are_taken_away_cost_no_result(site: Site, how: str) -> None:
    program = site.start(MAP)
    program.wait_for("begun")
    chance = random.Random(how)
    killed = 0
    while program.exit_code is None and killed < 5:
        jobs = site.jobs()
        if jobs:
            getattr(site, how)(chance.choice(jobs))
            killed += 1
            time.sleep(0.3)  # or all would be gone at the same moment
    assert program.end(100) == 0, program.all()
    assert program.lines == ["begun", "all"]
    assert killed >= 2
    assert "Traceback" not in program.err, program.err


PARTIES = """
import os, signal, sys, time
import fiber

def make(queue):
    own = fiber.Queue()
    queue.put(own)
    time.sleep(600)

def hold(lock, held):
    lock.acquire()
    held.set()
    time.sleep(600)

def wait(barrier):
    barrier.wait()

def start(target, *args):
    process = fiber.Process(target=target, args=args, daemon=True)
    process.start()
    return process

if __name__ == "__main__":
    queue = fiber.Queue()
    home = start(make, queue)
    own = queue.get(timeout=60)
    home.kill()
    try:
        own.get()
    except fiber.PeerDied as error:
        print("queue:", error)

    lock, held = fiber.Lock(), fiber.Event()
    holder = start(hold, lock, held)
    assert held.wait(60)
    holder.kill()
    print("lock:", lock.acquire(timeout=60))
    holder.join()

    manager = fiber.Manager()
    numbers = manager.list([1])
    os_pid = numbers[0]
    manager._process.kill()
    try:
        while True:
            numbers.append(1)
    except (fiber.PeerDied, EOFError, ConnectionError) as error:
        print("manager:", type(error).__name__, error)
    manager._process.join()
    print(manager._process.exitcode)
"""


def test_the_death_of_who_has_something_is_told_to_who_wants_it(site: Site) -> None:
    program = site.run(PARTIES, quiet=False)
    queue, lock, manager, code = program.lines
    assert queue.startswith("queue: process "), queue
    assert lock == "lock: True"
    assert manager.startswith("manager: "), manager
    assert code == "-9"


TAKEN = """
import fiber, time

def make(queue):
    own = fiber.Queue()
    queue.put(own)
    time.sleep(600)

if __name__ == "__main__":
    queue = fiber.Queue()
    process = fiber.Process(target=make, args=(queue,))
    process.start()
    own = queue.get(timeout=60)
    print("begun", flush=True)
    try:
        own.get()
    except fiber.PeerDied as error:
        print(error)
    process.join()
    print(process.exitcode)
"""


@pytest.mark.parametrize("how", ["kill", "remove"])
def test_a_process_whose_job_is_taken_away_has_ended(site: Site, how: str) -> None:
    program = site.start(TAKEN)
    program.wait_for("begun")
    program.wait_until(lambda: len(site.jobs()) == 1, "one job")  # managers are slow to tell
    (job,) = site.jobs()
    getattr(site, how)(job)
    assert program.end() == 0, program.all()
    assert program.lines[1].startswith("process ")
    assert program.lines[2] != "0"
    assert job in program.err  # what became of it
    assert "Traceback" not in program.err, program.err


BUSY = """
import fiber, sys, time

def nap(x):
    time.sleep(600)

def family(event):
    child = fiber.Process(target=nap, args=(0,))
    child.start()
    event.set()
    child.join()

if __name__ == "__main__":
    event = fiber.Event()
    process = fiber.Process(target=family, args=(event,))
    process.start()
    event.wait()
    with fiber.Pool(1) as pool:
        result = pool.map_async(nap, range(4))
        pool.apply_async(print)
        manager = fiber.Manager()
        assert len(manager.list([1])) == 1
        print("begun", flush=True)
        result.get()
"""


def test_a_master_that_is_killed_leaves_nothing(site: Site) -> None:
    program = site.start(BUSY)
    program.wait_for("begun")
    program.wait_until(lambda: len(site.jobs()) == 4, "four jobs")
    program.kill()
    site.leaves_nothing(30)


def test_a_master_that_is_killed_while_it_starts_leaves_nothing(site: Site) -> None:
    for seconds in (0.0, 0.4, 0.8):
        program = site.start(BUSY)
        program.wait_until(site.left, "the first job")
        time.sleep(seconds)
        program.kill()
        site.leaves_nothing(30)


def test_an_interrupt_ends_all(site: Site) -> None:
    program = site.start(BUSY)
    program.wait_for("begun")
    program.interrupt()
    assert program.end() == -signal.SIGINT
    site.leaves_nothing(30)
    # The program's own, and those of its process and of that one's, as on one machine.
    assert program.err.count("Traceback") == program.err.count("\nKeyboardInterrupt\n") == 3


POOL = """
import fiber, time

if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        result = pool.map_async(time.sleep, [600] * 4)
        print("begun", flush=True)
        try:
            result.get()
        finally:
            print("cleared up", flush=True)
"""


def test_an_interrupt_is_one_exception(site: Site) -> None:
    program = site.start(POOL)
    program.wait_for("begun")
    program.interrupt()
    assert program.end() == -signal.SIGINT
    site.leaves_nothing(30)
    assert program.lines == ["begun", "cleared up"]
    assert program.err.count("Traceback") == 1, program.err
    assert program.err.splitlines()[-1] == "KeyboardInterrupt"


def test_a_terminated_master_leaves_nothing(site: Site) -> None:
    program = site.start(BUSY)
    program.wait_for("begun")
    program.signal(signal.SIGTERM)
    assert program.end() == -signal.SIGTERM
    site.leaves_nothing(30)


CATCHES = """
import fiber
if __name__ == "__main__":
    for start in (lambda: fiber.Process(target=print).start(), lambda: fiber.Pool(2)):
        try:
            start()
        except fiber.StartError as error:
            print(error)
"""


def test_an_image_that_is_not_there_is_named(site: Site) -> None:
    program = site.run(CATCHES, env=site.wrong(), quiet=False)
    assert len(program.lines) == 2, program.all()
    for line in program.lines:
        assert "nobody/nothing:1" in line
        assert "image" in line or "no such file" in line.lower() or "not found" in line
    assert "Traceback" not in program.err, program.err


def test_an_engine_that_is_not_there_is_named(site: Site) -> None:
    program = site.run(CATCHES, env=site.nowhere(), quiet=False)
    assert len(program.lines) == 2, program.all()
    for line in program.lines:
        assert site.backend in line.lower()
        assert "does not answer" in line or "cannot be reached" in line, line
    assert "Traceback" not in program.err, program.err


MAIN_FAILS = """
import fiber
import socket
here = socket.gethostname()
if __name__ == "__main__":
    import os
    with open("here", "w") as file:
        file.write(here)
    fiber.Process(target=print).start()
else:
    raise RuntimeError("only at home")
"""


def test_a_main_module_that_cannot_be_loaded_is_explained(site: Site) -> None:
    program = site.run(MAIN_FAILS, exit_code=1, quiet=False)
    assert "StartError" in program.err.splitlines()[-1] or "StartError" in program.err
    assert "RuntimeError: only at home" in program.err
    assert 'raise RuntimeError("only at home")' in program.err
