"""How long objects live, that nothing of them stays, and what a program's end finds."""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.objects import actors
from tests.waiting import until

import fiber
from fiber.runtime import home, session

DEADLINE = 20.0


def test_a_pickle_keeps_its_object(start: Callable[..., Any]) -> None:
    """For a while, though nobody has a reference when it is used."""
    objects = actors.make_all()
    back = fiber.Queue()
    objects["Queue"].put("item")
    objects["Event"].set()
    objects["Lock"].acquire()
    data = pickle.dumps(objects)
    objects.clear()
    gc.collect()

    def use() -> None:
        found = pickle.loads(data)
        back.put((found["Queue"].get(), found["Event"].is_set(), found["Lock"].acquire(False)))

    start(use)
    assert back.get(timeout=DEADLINE) == ("item", True, False)


def test_an_object_on_its_way_through_a_queue_is_kept(start: Callable[..., Any]) -> None:
    way, back = fiber.Queue(), fiber.Queue()
    for number in range(50):
        inner = fiber.Queue()
        inner.put(number)
        way.put(inner)
        del inner
    gc.collect()

    def use() -> None:
        for _ in range(50):
            back.put(way.get().get())

    start(use)
    assert [back.get(timeout=DEADLINE) for _ in range(50)] == list(range(50))


def test_after_that_the_object_is_gone(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever uses the pickle too late is told."""
    monkeypatch.setattr(home, "_LEASE", 0.05)
    back = fiber.Queue()
    data = {kind: pickle.dumps(obj) for kind, obj in actors.make_all().items()}
    gc.collect()
    time.sleep(0.2)
    for kind, how in (
        ("Queue", "get"),
        ("Lock", "acquire"),
        ("Event", "wait"),
        ("Barrier", "wait"),
    ):
        start(actors.answer, back, pickle.loads(data[kind]), how)
        error = back.get(timeout=DEADLINE)
        assert isinstance(error, fiber.PeerDied)
        assert "this object is gone" in str(error)


def test_a_pickle_can_be_used_many_times(start: Callable[..., Any]) -> None:
    q = fiber.Queue()
    data = pickle.dumps(q)
    names = [pickle.loads(data) for _ in range(5)]
    for number, name in enumerate(names):
        name.put(number)
    del names, name
    gc.collect()
    processes = [start(actors.mark_pickled, pickle.dumps({"Queue": q})) for _ in range(3)]
    for process in processes:
        process.join()
    assert [q.get_nowait() for _ in range(8)] == [0, 1, 2, 3, 4, "mark", "mark", "mark"]


def test_thousands_of_objects_leave_nothing() -> None:
    def use(rounds: int) -> None:
        for _ in range(rounds):
            objects = actors.make_all()
            objects["Queue"].put("item")
            objects["Queue of 3"].put("item")
            assert objects["Queue"].get() == "item"
            assert objects["Lock"].acquire()
            assert not objects["Event"].wait(0)

    use(20)
    fiber.Queue().qsize()
    objects, descriptors = actors.count_objects()
    use(200)  # of twelve objects each
    # What the collector finds is dropped by the home soon after.
    until(lambda: actors.count_objects()[0] < objects + 100, "the end of the objects")
    assert actors.count_objects()[1] == descriptors


def test_thousands_of_queues_in_another_process_leave_nothing(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, where they live, from when their pickles need no more be waited for."""
    monkeypatch.setattr(home, "_LEASE", 0.5)
    way, back = fiber.Queue(), fiber.Queue()
    served = session.current().home.objects
    rounds, each = 4, 500
    start(actors.use_queues_that_come, way, back, rounds, each)
    counts = []
    for _ in range(rounds):
        queues = [fiber.Queue() for _ in range(each)]
        for q in queues:
            q.put("in")
            way.put(q)
        counts.append(back.get(timeout=DEADLINE))
        assert [q.get(timeout=DEADLINE) for q in queues] == ["out"] * each
        del q, queues
        until(lambda: len(served) == 2, "the end of the queues")
        counts[-1] += actors.count_objects()
    for number in range(4):
        first, last = counts[1][number], counts[-1][number]
        assert last - first < 200, counts


def test_a_lock_that_is_held_is_kept_for_nobody() -> None:
    """Nor is a queue of which not all is done: when nobody has it, nobody can ask for it."""
    served = session.current().home.objects
    lock, semaphore, q = fiber.Lock(), fiber.Semaphore(3), fiber.JoinableQueue()
    lock.acquire()
    semaphore.acquire()
    q.put("item")
    q.get()
    assert len(served) == 3
    del lock, semaphore, q
    until(lambda: not served, "their end")


def test_more_queues_than_there_are_counts_in_shared_memory(start: Callable[..., Any]) -> None:
    queues, back = [fiber.Queue() for _ in range(700)], fiber.Queue()
    for number, q in enumerate(queues):
        q.put(number)
        q.put(-number)
        q.put("rest")
    start(actors.get_from_each, queues, back)
    assert back.get(timeout=DEADLINE) == list(range(700))
    assert back.get(timeout=DEADLINE) == [-number for number in reversed(range(700))]
    assert [q.qsize() for q in queues] == [1] * 700


# The end of the program ------------------------------------------------------------------------

ENDS = {
    "items that nobody took": """
q = fiber.Queue()
for number in range(100_000):
    q.put(number)
for _ in range(20):
    q.put(bytes(1_000_000))
""",
    "items of a child that nobody took": """
q = fiber.Queue()
process = fiber.Process(target=put_many, args=(q, 30, 1_000_000))
process.start()
process.join()
assert process.exitcode == 0 and q.qsize() == 30
q.get()
""",
    "a child that still puts when the program ends": """
q, begun = fiber.Queue(), fiber.Event()
process = fiber.Process(target=put_many, args=(q, 200, 1_000_000, begun))
process.start()
begun.wait()
""",
    "a daemon that waits for an item": """
q, begun = fiber.Queue(), fiber.Event()
fiber.Process(target=get_for_ever, args=(q, begun), daemon=True).start()
begun.wait()
""",
    "a daemon that waits for room": """
q, begun = fiber.Queue(1), fiber.Event()
fiber.Process(target=put_many, args=(q, 5, 1_000_000, begun), daemon=True).start()
begun.wait()
""",
    "a daemon that has a lock": """
lock, begun = fiber.Lock(), fiber.Event()
fiber.Process(target=hold, args=(lock, begun), daemon=True).start()
begun.wait()
assert not lock.acquire(timeout=0.05)
""",
    "a thread that waits": """
q = fiber.Queue()
threading.Thread(target=q.get, daemon=True).start()
threading.Thread(target=fiber.Event().wait, daemon=True).start()
time.sleep(0.05)
""",
    "items for a child that has ended": """
q = fiber.Queue()
process = fiber.Process(target=make, args=(q,))
process.start()
theirs = q.get()
process.join()
try:
    for number in range(1000):
        theirs.put(number)
except fiber.PeerDied:
    pass
""",
    "a child that goes with a lock, and one that waits for it": """
lock, begun = fiber.Lock(), fiber.Event()
lock.acquire()
process = fiber.Process(target=hold, args=(lock, begun))
process.start()
lock.release()
begun.wait()
process.terminate()
assert lock.acquire(timeout=10)
""",
}

PROGRAM = """
import fiber, threading, time

def put_many(q, count, size, begun=None):
    for number in range(count):
        q.put(bytes(size))
        if begun:
            begun.set()

def get_for_ever(q, begun):
    begun.set()
    while True:
        q.get()

def hold(lock, begun):
    with lock:
        begun.set()
        time.sleep(100)

def make(q):
    theirs = fiber.Queue()
    q.put(theirs)

def main():
    {body}

if __name__ == "__main__":
    main()
    print("main is done", flush=True)
"""


@pytest.mark.parametrize("name", ENDS)
def test_the_program_ends(name: str, run_script: Callable[..., Any]) -> None:
    body = "\n    ".join(ENDS[name].strip().splitlines())
    began = time.monotonic()
    done = run_script(PROGRAM.format(body=body), timeout=30)
    assert (done.stdout, done.returncode) == ("main is done\n", 0), done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 15
