"""Processes elsewhere, and the objects that they share with the master and each other."""

from __future__ import annotations

import pytest
from tests.elsewhere.sites import PROGRAMS, Site


def test_processes(site: Site) -> None:
    program = site.run(PROGRAMS / "processes.py", quiet=False)
    assert program.lines == ["done"]
    assert program.err.count("Traceback") == 1
    assert program.err.splitlines()[-1] == "ValueError: as it should"


@pytest.mark.parametrize("kind", ["queues", "locks", "values"])
def test_served_objects(site: Site, kind: str) -> None:
    assert site.run(PROGRAMS / "objects.py", kind).lines == ["done"]


def test_pipes(site: Site) -> None:
    assert site.run(PROGRAMS / "pipes.py").lines == ["done"]


def test_managers(site: Site) -> None:
    assert site.run(PROGRAMS / "managers.py").lines == ["done"]


def test_what_is_put_or_shared_by_tasks_comes_once(site: Site) -> None:
    assert site.run(PROGRAMS / "constants.py").lines == ["done"]


MEMORY = """
import fiber
from fiber import shared_memory

def use(name):
    shared_memory.SharedMemory(name)

def change(raw):
    raw.value = 1

if __name__ == "__main__":
    block = shared_memory.SharedMemory(create=True, size=100)
    for target, what in ((use, block.name), (change, fiber.RawValue("i"))):
        process = fiber.Process(target=target, args=(what,))
        process.start()
        process.join()
        print(process.exitcode)
    block.close()
    block.unlink()
"""


def test_what_needs_common_memory_says_that_there_is_none(site: Site) -> None:
    program = site.run(MEMORY, quiet=False)
    assert program.lines == ["1", "1"]
    named, raw = (line for line in program.err.splitlines() if line.startswith("FileNotFound"))
    assert "there is no shared memory 'psm_" in named
    assert "made in another container or on another machine" in named
    assert "a RawValue of c_int cannot be used here" in raw


RING = """
import socket
import fiber

def meet(ring):
    global me
    me = ring
    ring.barrier(60)

def run(rank, size):
    # As a library does: rank 0 listens at the ring's address, the others connect to it.
    if rank == 0:
        with socket.create_server(("", me.address[1])) as server:
            server.settimeout(60)
            me.barrier(60)
            for _ in range(size - 1):
                line, _ = server.accept()
                with line:
                    print("member", line.recv(100).decode(), "came", flush=True)
    else:
        me.barrier(60)
        with socket.create_connection(me.address, 60) as line:
            line.sendall(str(rank).encode())
    places.append(me.members[rank].ip)

places = []
if __name__ == "__main__":
    fiber.Ring(3, run, meet).run()
    print("done")
"""


def test_members_of_a_ring_meet_at_its_address(site: Site) -> None:
    lines = site.run(RING).lines
    assert sorted(lines[:2]) == ["member 1 came", "member 2 came"]
    assert lines[2:] == ["done"]


RING_FAILS = """
import fiber, os

def fail(rank, size):
    if rank == 1:
        raise ValueError("member one")
    fiber.Event().wait()

def die(rank, size):
    if rank == 1:
        os._exit(5)
    fiber.Event().wait()

if __name__ == "__main__":
    for func in (fail, die):
        try:
            fiber.Ring(2, func).run()
        except fiber.RingBroken as error:
            print(error)
"""


def test_a_ring_that_breaks_says_who_broke_it(site: Site) -> None:
    first, second = site.run(RING_FAILS, quiet=False).lines
    assert "member 1 of the ring failed: ValueError: member one" in first
    assert "exit code 5" in second


BESIDE = """
import os, socket
import fiber

def where(queue):
    queue.put((socket.gethostname(), os.getppid()))

def tell(_):
    return socket.gethostname()

if __name__ == "__main__":
    here = socket.gethostname()
    queue = fiber.Queue()
    contexts = [fiber.get_context(name) for name in ("local", BACKEND)]
    processes = [context.Process(target=where, args=(queue,)) for context in contexts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(sorted(queue.get()[0] == here for _ in processes))
    with contexts[0].Pool(1) as local, contexts[1].Pool(1) as other:
        print(local.apply(tell, (0,)) == here, other.apply(tell, (0,)) == here)
"""


def test_two_backends_side_by_side(site: Site) -> None:
    program = site.run(BESIDE.replace("BACKEND", repr(site.backend)), env={"FIBER_BACKEND": ""})
    assert program.lines == ["[False, True]", "True False"]


DEEP = """
import fiber
import helpers

class Thing:
    def __init__(self, value):
        self.value = value

def inner(things, results):
    thing = things.get(timeout=60)
    results.put((type(thing) is Thing, helpers.half(thing.value)))

def outer(things, results):
    process = fiber.Process(target=inner, args=(things, results))
    process.start()
    process.join()
    with fiber.Pool(1) as pool:
        results.put(pool.map(late, [Thing(2), Thing(4)]))

def late(thing):
    import later
    return later.double(thing.value)

if __name__ == "__main__":
    things, results = fiber.Queue(), fiber.Queue()
    process = fiber.Process(target=outer, args=(things, results))
    process.start()
    things.put(Thing(6))
    print(results.get(timeout=60), results.get(timeout=60))
    process.join()
"""


def test_processes_of_processes_know_the_program(site: Site) -> None:
    files = {
        "helpers.py": "def half(x): return x / 2",
        "later.py": "def double(x): return 2 * x",
    }
    assert site.run(DEEP, files=files).lines == ["(True, 3.0) [4, 8]"]


EXECUTOR = """
import concurrent.futures
import fiber

def square(x):
    return x * x

if __name__ == "__main__":
    for workers in (1, 2):
        executor = concurrent.futures.ProcessPoolExecutor(workers, mp_context=fiber.get_context())
        try:
            with executor:
                # No more than start them: when one has failed, the executor itself may not end
                # another that it starts just then.
                futures = [executor.submit(square, number) for number in range(workers)]
                print(sum(future.result() for future in futures))
        except concurrent.futures.BrokenExecutor as error:
            print(type(error).__name__)
"""


def test_a_pipe_that_several_read_is_refused(site: Site) -> None:
    """The executor's workers read one pipe in turn, which cannot be where no memory is shared."""
    program = site.run(EXECUTOR, quiet=False)
    assert program.lines[0] == "0"
    # It may be done before it hears that its second worker could not begin.
    assert program.lines[1] in ("1", "BrokenProcessPool")
    assert "this end of a pipe is or was read in another container" in program.err
    assert "use fiber.Pool" in program.err


MULTIPROCESSING = """
import fiber as multiprocessing
from fiber.pool import Pool, ThreadPool
from fiber.queues import Empty, Queue
from fiber.managers import SyncManager

def square(x):
    return x * x

def fill(queue, barrier):
    queue.put(square(3))
    barrier.wait()

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    context = multiprocessing.get_context()
    with SyncManager() as manager:
        queue, barrier = context.Queue(), manager.Barrier(2)
        process = context.Process(target=fill, args=(queue, barrier))
        process.start()
        barrier.wait()
        print(queue.get())
        process.join()
        try:
            queue.get(timeout=0.05)
        except Empty:
            print("empty")
    with Pool(2) as pool, ThreadPool(2) as threads:
        print(pool.map(square, range(4)), threads.map(square, range(4)))
"""


def test_programs_that_know_multiprocessing_alone(site: Site) -> None:
    assert site.run(MULTIPROCESSING).lines == ["9", "empty", "[0, 1, 4, 9] [0, 1, 4, 9]"]
