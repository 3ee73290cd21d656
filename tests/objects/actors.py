"""What the processes of these tests run: in a module of its own, and a light one."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import threading
from typing import Any

import fiber

DEADLINE = 20.0


def echo(q: Any, back: Any) -> None:
    back.put(q.get(timeout=DEADLINE))


def hold(lock: Any, held: Any, enough: Any) -> None:
    """Hold a lock from the moment that `held` is set until `enough` is."""
    with lock:
        held.set()
        assert enough.wait(DEADLINE)


def call(obj: Any, method: str, *args: Any) -> None:
    getattr(obj, method)(*args)


def answer(back: Any, obj: Any, method: str, *args: Any) -> None:
    """Put into `back` what a method returns, or the exception that it raises."""
    try:
        back.put(getattr(obj, method)(*args))
    except Exception as error:
        back.put(error)


def tell_repr(back: Any, obj: Any) -> None:
    back.put(repr(obj))


def count_up(lock: Any, path: Any, times: int) -> None:
    """Add to the number in a file, which is right only if the lock keeps others out."""
    for _ in range(times):
        with lock:
            number = int(path.read_text())
            path.write_text(str(number + 1))


def take_a_place(semaphore: Any, folder: Any, places: int, times: int) -> None:
    """Be in one of so many places at a time; fail if there is none while we have a permit."""
    for _ in range(times):
        with semaphore:
            for number in range(places):
                path = folder / str(number)
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                path.rmdir()
                break
            else:
                raise AssertionError(f"more than {places} had a permit")


def wait_in(condition: Any, ready: Any, woken: Any, timeout: float | None = None) -> None:
    with condition:
        ready.release()
        woken.put(condition.wait(timeout))


def take_turns(condition: Any, turns: Any, me: int, others: int, rounds: int) -> None:
    """Append our number when it is our turn: when the last one was that of who comes before us."""
    for _ in range(rounds):
        with condition:
            assert condition.wait_for(lambda: turns.qsize() % others == me, DEADLINE)
            turns.put(me)
            condition.notify_all()


def pass_barrier(barrier: Any, back: Any, rounds: int, *args: Any) -> None:
    for number in range(rounds):
        try:
            back.put((number, barrier.wait(*args)))
        except fiber.synchronize.BrokenBarrierError as error:
            back.put((number, str(error)))


# Traffic ---------------------------------------------------------------------------------------


def produce(q: Any, me: int, count: int, pad: int = 0) -> None:
    """Put `count` items, (me, number) or, if they are padded, [me, number, bytes]."""
    for number in range(count):
        q.put([me, number, bytes(pad)] if pad else (me, number))


def consume(q: Any, back: Any) -> None:
    """Take items until None comes, and put the list of them."""
    taken = []
    while (item := q.get()) is not None:
        taken.append(tuple(item[:2]))
        if hasattr(q, "task_done"):
            q.task_done()
    back.put(taken)


def put_until_full(q: Any, me: int, back: Any) -> None:
    """Put until there is no room; tell how many were accepted."""
    accepted = 0
    try:
        while True:
            q.put((me, accepted), timeout=0.3)
            accepted += 1
    except queue.Full:
        back.put(accepted)


def take_and_sit(q: Any, count: int, told: Any, go_on: Any, back: Any) -> None:
    """Take `count` items as fast as can be, wait to be told to go on, then take the rest."""
    taken = [q.get(timeout=DEADLINE) for _ in range(count)]
    told.set()
    assert go_on.wait(DEADLINE)
    while (item := q.get(timeout=DEADLINE)) is not None:
        taken.append(item)
    back.put(taken)


def take_in_threads(q: Any, threads: int, back: Any) -> None:
    """Each thread takes items until None comes."""
    taken: list[list[Any]] = [[] for _ in range(threads)]

    def take(mine: list[Any]) -> None:
        while (item := q.get(timeout=DEADLINE)) is not None:
            mine.append(item)
        mine.append(None)

    running = [threading.Thread(target=take, args=(mine,), daemon=True) for mine in taken]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(DEADLINE)
    back.put(taken)


def put_in_threads(q: Any, threads: int, count: int) -> None:
    running = [threading.Thread(target=produce, args=(q, me, count)) for me in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def take_by_new_names(data: bytes, count: int, each: int, back: Any) -> None:
    """Take items through names of the queue that come and go, a few through each."""
    taken: list[Any] = []
    while len(taken) < count:
        q = pickle.loads(data)
        taken += [q.get(timeout=DEADLINE) for _ in range(each)]
        del q
    back.put(taken)


# Objects that travel ---------------------------------------------------------------------------

KINDS = {
    "Queue": fiber.Queue,
    "Queue of 3": lambda: fiber.Queue(3),
    "JoinableQueue": fiber.JoinableQueue,
    "SimpleQueue": fiber.SimpleQueue,
    "Lock": fiber.Lock,
    "RLock": fiber.RLock,
    "Semaphore": fiber.Semaphore,
    "BoundedSemaphore": fiber.BoundedSemaphore,
    "Condition": fiber.Condition,
    "Condition of Lock": lambda: fiber.Condition(fiber.Lock()),
    "Event": fiber.Event,
    "Barrier": lambda: fiber.Barrier(2, timeout=DEADLINE),
}


def make_all() -> dict[str, Any]:
    return {kind: make() for kind, make in KINDS.items()}


def leave_mark(objects: dict[str, Any], sign: object = "mark") -> None:
    """Do to each object what another process can see."""
    for kind, obj in objects.items():
        if "Queue" in kind:
            obj.put(sign)
        elif kind == "Event":
            obj.set()
        elif kind == "Barrier":
            obj.abort()
        else:
            assert obj.acquire(timeout=DEADLINE), kind


def see_mark(objects: dict[str, Any], sign: object = "mark") -> None:
    """Fail unless another process did `leave_mark` to these objects."""
    for kind, obj in objects.items():
        if kind == "SimpleQueue":
            seen = obj.get() == sign
        elif "Queue" in kind:
            seen = obj.get(timeout=DEADLINE) == sign
        elif kind == "Event":
            seen = obj.is_set()
        elif kind == "Barrier":
            seen = obj.broken and obj.parties == 2
        else:
            seen = not obj.acquire(False)
            if kind in ("Lock", "Semaphore", "BoundedSemaphore"):
                obj.release()
                seen = seen and obj.acquire(False)
        assert seen, kind


class Marker(fiber.Process):
    """Has the objects as its attribute."""

    def __init__(self, objects: dict[str, Any]) -> None:
        super().__init__()
        self.objects = objects

    def run(self) -> None:
        leave_mark(self.objects)


def mark_what_comes(way: Any) -> None:
    leave_mark(way.get())


def mark_pickled(data: bytes) -> None:
    leave_mark(pickle.loads(data))


def pass_on(way: Any, on: Any) -> None:
    on.put(way.get())


def mark_and_tell(way: Any, done: Any) -> None:
    leave_mark(way.get())
    done.set()


def descend(depth: int, objects: dict[str, Any]) -> None:
    if depth == 0:
        leave_mark(objects)
        return
    child = fiber.Process(target=descend, args=(depth - 1, objects))
    child.start()
    child.join()
    assert child.exitcode == 0


def make_and_look(out: Any, marked: Any) -> None:
    """Make objects for others to mark, and such that we have marked."""
    theirs, ours = make_all(), make_all()
    leave_mark(ours)
    out.put(theirs)
    out.put(ours)
    assert marked.wait(DEADLINE)
    see_mark(theirs)


def make_anew(_: object) -> dict[str, Any]:
    return make_all()


def get_one(q: Any) -> Any:
    return q.get(timeout=DEADLINE)


# Items -----------------------------------------------------------------------------------------


def send_back(q: Any, back: Any, count: int) -> None:
    for _ in range(count):
        back.put(q.get())


def call_and_send_back(q: Any, back: Any, count: int) -> None:
    for _ in range(count):
        back.put(q.get()())


def write_into(q: Any, back: Any, count: int) -> None:
    """Send arrays back, once it was possible to write into them."""
    for _ in range(count):
        array = q.get()
        kept = array.copy()
        array[...] = array.ravel()[0] if array.size else 0
        array[...] = kept
        back.put(array)


def try_to_get(q: Any, back: Any, count: int) -> None:
    for _ in range(count):
        try:
            back.put(q.get())
        except Exception as error:
            back.put(repr(error))


def fail(message: str) -> None:
    raise ArithmeticError(message)


class Unloadable:
    """Can be pickled, cannot be unpickled."""

    def __reduce__(self) -> Any:
        return fail, ("not here",)


class PutsFirst:
    """Puts something into the queue while it is being pickled."""

    def __init__(self, q: Any) -> None:
        self.q = q

    def __reduce__(self) -> Any:
        self.q.put("first")
        return str, ("made",)


# Interrupts ------------------------------------------------------------------------------------

WAITS: dict[str, Any] = {
    "get": lambda q: q.get(),
    "get(timeout)": lambda q: q.get(timeout=DEADLINE),
    "put": lambda q: q.put("theirs"),
    "join": lambda q: q.join(),
    "acquire": lambda lock: lock.acquire(),
    "acquire(timeout)": lambda lock: lock.acquire(timeout=DEADLINE),
    "wait": lambda obj: obj.wait(),
    "wait(timeout)": lambda obj: obj.wait(DEADLINE),
}


def wait_and_tell(obj: Any, how: str, ready: Any, told: Any, stay: Any) -> None:
    """Wait for an object; tell what came, or that it was interrupted; do not end before `stay`."""
    locked = hasattr(obj, "notify")
    try:
        if locked:
            with obj:
                ready.set()
                told.put(("came", WAITS[how](obj)))
        else:
            ready.set()
            told.put(("came", WAITS[how](obj)))
    except KeyboardInterrupt:
        told.put(("interrupted", None))
    assert stay.wait(DEADLINE)


def serve_and_wait(kind: str, how: str, out: Any, ready: Any, told: Any, stay: Any) -> None:
    """As `wait_and_tell`, for an object that lives here; it is sent out first."""
    obj = KINDS[kind]()
    out.put(obj)
    assert stay.wait(DEADLINE)  # it may be prepared
    stay.clear()
    wait_and_tell(obj, how, ready, told, stay)


# Lifetimes -------------------------------------------------------------------------------------


def count_objects() -> tuple[int, int]:
    """Return how many objects the collector knows, and how many descriptors are open."""
    for _ in range(3):
        gc.collect()
    return len(gc.get_objects()), len(os.listdir("/proc/self/fd"))


def use_queues_that_come(way: Any, back: Any, rounds: int, each: int) -> None:
    """Take queues out of `way`, use and drop them; tell, after each round, what there is."""
    for _ in range(rounds):
        for _ in range(each):
            q = way.get()
            assert q.get() == "in"
            q.put("out")
            del q
        back.put(count_objects())


def get_from_each(queues: Any, back: Any) -> None:
    back.put([q.get() for q in queues])
    back.put([q.get() for q in reversed(queues)])
