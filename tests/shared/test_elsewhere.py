"""Values and arrays in processes that cannot map their memory: a copy that is right while locked.

Such a process has an empty /dev/shm of its own, as if it were in another container.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.shared import targets
from tests.waiting import until

import fiber
from fiber import copies, heap
from fiber.runtime import session
from fiber.sharedctypes import Array, RawArray, RawValue, Value

DEADLINE = 20.0
LARGE = targets.LARGE


@pytest.fixture(scope="module", autouse=True)
def permitted() -> None:
    """Skip all where a process cannot hide /dev/shm from itself."""
    code = "from tests.shared import targets; targets.hide_memory()"
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode:
        pytest.skip(f"/dev/shm cannot be hidden: {done.stderr.splitlines()[-1]}")


class Elsewhere:
    """A process that cannot see this host's memory."""

    def __init__(self) -> None:
        self.way, self.back = fiber.Queue(), fiber.Queue()
        self.process = fiber.Process(target=targets.work_elsewhere, args=(self.way, self.back))
        self.process.start()

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        """Have it call a function of `targets`."""
        self.way.put(pickle.dumps((function, args)))

    def result(self) -> Any:
        """Return what the function returned, or raise what it raised."""
        answer = self.back.get(timeout=DEADLINE)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        self.begin(function, *args)
        return self.result()


@pytest.fixture
def start() -> Iterator[Callable[[], Elsewhere]]:
    """`start()`: a process elsewhere, ended after the test."""
    started: list[Elsewhere] = []

    def begin() -> Elsewhere:
        started.append(Elsewhere())
        return started[-1]

    yield begin
    codes = []
    for elsewhere in started:
        elsewhere.way.put(None)
        elsewhere.process.join(DEADLINE)
        codes.append(elsewhere.process.exitcode)
        elsewhere.process.kill()
        elsewhere.process.join()
    started.clear()
    assert codes in ([0] * len(codes), [-9] * len(codes))


@pytest.fixture
def elsewhere(start: Callable[[], Elsewhere]) -> Elsewhere:
    """A process elsewhere."""
    return start()


# To and fro


def test_each_side_reads_what_the_other_wrote(elsewhere: Elsewhere) -> None:
    number, real = Value("i", 21), Value(ctypes.c_double, 0.25)
    array, text = Array("d", range(5)), Array("c", b"ab\0\0")
    for factor in (1, 2, 4):
        assert elsewhere.call(targets.read, number) == 21 * factor
        assert elsewhere.call(targets.read, array) == [float(i * factor) for i in range(5)]
        elsewhere.call(targets.double, number, real, array)
    elsewhere.call(targets.double, text)
    assert number.value == 168
    assert real.value == 2.0
    assert array[:] == [0.0, 8.0, 16.0, 24.0, 32.0]
    assert text.value == text.raw == b"abab"
    number.value, array[2:4], text.raw = 1, [-1.0, -2.0], b"xyz\0"
    assert elsewhere.call(targets.read, number) == 1
    assert elsewhere.call(targets.read, array) == [0.0, 8.0, -1.0, -2.0, 32.0]
    assert elsewhere.call(targets.read, text) == b"xyz"


def test_it_is_a_copy_there(elsewhere: Elsewhere) -> None:
    """Otherwise these tests would show nothing."""
    value = Value("i", 3)
    elsewhere.call(targets.keep, value)
    assert elsewhere.call(targets.read, value) == 3
    value.value = 4
    assert elsewhere.call(targets.read_without_lock, value) == 3
    assert elsewhere.call(targets.read, value) == 4
    assert elsewhere.call(targets.read_without_lock, value) == 4


def test_items_of_a_queue(elsewhere: Elsewhere) -> None:
    way, value = fiber.Queue(), Value("i", 3)
    way.put(value)
    elsewhere.call(targets.take_and_double, way)
    assert value.value == 6


def test_structures(elsewhere: Elsewhere) -> None:
    grids, cell = Array(targets.Grid, 3), Value(targets.Cell)
    elsewhere.call(targets.fill_locked, grids)
    assert grids[1].name == grids[0].name == b"second"
    assert grids[0].cells[3].weights[1][2] == 2.5
    assert [c.count for c in grids[1].cells] == [0, 0, 0, 1]
    elsewhere.call(targets.set_count, cell, 3)
    assert cell.count == 3


def test_nothing_is_an_array_too(elsewhere: Elsewhere) -> None:
    assert elsewhere.call(targets.read, Array("i", 0)) == []


def test_numpy_sees_what_was_written_elsewhere(start: Callable[[], Elsewhere]) -> None:
    array = Array("d", 1 << 20)
    view = np.frombuffer(array.get_obj())
    first, second = start(), start()
    first.begin(targets.add_to_part, array, 10, 500_000)
    second.begin(targets.add_to_part, array, 500_000, 1 << 20)
    assert {first.result(), second.result()} <= {499_990, (1 << 20) - 500_000, (1 << 20) - 10}
    assert not view[:10].any()
    assert (view[10:] == 1.0).all()
    view[:] = 7.0
    assert first.call(targets.add_to_part, array, 0, 3) == (1 << 20) - 3
    assert (view[:4] == [8.0, 8.0, 8.0, 7.0]).all()


@pytest.mark.parametrize("lock", ["RLock", "Lock", "BoundedSemaphore"])
def test_counting_together(lock: str, start: Callable[[], Elsewhere]) -> None:
    counter = Value("i", 0, lock=getattr(fiber, lock)())
    target = targets.add if lock == "RLock" else targets.add_within
    others = [start(), start()]
    processes = [fiber.Process(target=target, args=(counter, 100)) for _ in range(2)]
    for other in others:
        other.begin(target, counter, 100)
    for process in processes:
        process.start()
    target(counter, 100)
    for other in others:
        other.result()
    for process in processes:
        process.join()
    assert counter.value == 500


def test_a_pool_elsewhere() -> None:
    counter, squares = Value("i", 0), Array("i", 100)

    def square(i: int) -> None:
        squares[i] = i * i
        with counter.get_lock():
            counter.value += 1

    with fiber.Pool(2, initializer=targets.hide_memory) as pool:
        pool.map(square, range(100))
        values = [Value("i", i) for i in range(20)]
        pool.map(targets.double, values)
    assert counter.value == 100
    assert squares[:] == [i * i for i in range(100)]
    assert [value.value for value in values] == list(range(0, 40, 2))


# While the lock is held


def test_only_what_was_changed_is_sent(elsewhere: Elsewhere) -> None:
    array, within, enough = Array("h", 200_000), fiber.Event(), fiber.Event()
    elsewhere.begin(targets.set_slowly, array, 100_001, within, enough)
    within.wait()
    view = np.frombuffer(array.get_obj(), dtype=np.int16)
    assert not view.any()
    view[:] = 1
    enough.set()
    elsewhere.result()
    assert view[100_001] == -1
    assert view.sum() == 199_999 - 1


def test_a_value_that_came_twice_is_one(elsewhere: Elsewhere) -> None:
    value = Value("i", 0)
    again = pickle.loads(pickle.dumps(value))
    assert elsewhere.call(targets.nest, value, again) == [2, 3, 3]
    assert value.value == 3
    assert targets.nest(value, again) == [5, 6, 6]


def test_values_with_the_same_lock(start: Callable[[], Elsewhere]) -> None:
    lock = fiber.RLock()
    first, second = Value("i", 100, lock=lock), Value("q", 0, lock=lock)
    others = [start(), start()]
    for other in others:
        other.begin(targets.transfer, first, second, 50)
    targets.transfer(second, first, 30)
    for other in others:
        other.result()
    assert (first.value, second.value) == (30, 70)


def test_a_lock_that_is_not_to_be_had(elsewhere: Elsewhere) -> None:
    value = Value("i", 0)
    with value:
        assert elsewhere.call(targets.try_lock, value) == [False, False, True]
    assert elsewhere.call(targets.read, value) == 0


def test_conditions(start: Callable[[], Elsewhere]) -> None:
    lock = fiber.RLock()
    value, condition = Value("i", 0, lock=lock), fiber.Condition(lock)
    theirs = Value("i", 0, lock=fiber.Condition())
    first, second = start(), start()
    first.begin(targets.wait_for_value, condition, value, 3)
    second.begin(targets.wait_within, theirs, 3)
    for number in (1, 2, 3):
        with condition:
            value.value = number
            condition.notify_all()
        with theirs:
            theirs.value = number
            theirs.get_lock().notify_all()
    assert first.result() == 3
    assert second.result() == 3


def test_a_fork_elsewhere(elsewhere: Elsewhere) -> None:
    value = Value("i", 0)
    assert elsewhere.call(targets.fork_and_add, value) == 111
    assert value.value == 111


def test_threads_elsewhere(elsewhere: Elsewhere) -> None:
    value = Value("i", 0)
    elsewhere.begin(targets.add_in_threads, value, 100)
    targets.add(value, 100)
    elsewhere.result()
    assert value.value == 300


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_changes(size: int) -> None:
    """Whatever has changed is within the ranges that are sent, and no other item."""
    numbers = random.Random(size)
    kind = {1: "b", 2: "h", 4: "i", 8: "q"}[size]
    for length in (1, 7, 50_000):
        array = Array(kind, length)
        wrapper = array.get_obj()._wrapper
        copy = copies.Copy(wrapper.arena.ref(), wrapper, size)
        for changed in (0, 1, 5, length):
            copy.fetch()
            for index in numbers.sample(range(length), min(changed, length)):
                copy.bytes[index * size + numbers.randrange(size)] ^= numbers.randrange(1, 256)
            pairs = list(zip(copy.bytes, copy._fetched, strict=True))
            items = {i // size for i, (new, old) in enumerate(pairs) if new != old}
            ranges = list(copy._changes())
            assert {
                i for start, stop in ranges for i in range(start // size, stop // size)
            } == items
            assert all(start % size == stop % size == 0 for start, stop in ranges)
            copy.send()
            assert bytes(array.get_obj()) == bytes(copy.bytes)


# To others


def test_it_is_passed_on_and_comes_back(start: Callable[[], Elsewhere]) -> None:
    first, second = start(), start()
    value, array = Value("i", 1), Array("b", [1] * 100)
    mine, again = first.call(targets.return_it, value, array)
    first.call(targets.double, mine)
    assert mine.value == value.value == 2
    again[5] = 3
    assert array[5] == 3
    for came in first.call(targets.return_it, value, array):
        second.call(targets.double, came)
    assert value.value == 4
    assert array[5] == 6


def test_memory_that_was_made_elsewhere(start: Callable[[], Elsewhere]) -> None:
    first, second = start(), start()
    value = first.call(targets.make_locked, 3)
    value.value += 1
    assert second.call(targets.read, value) == 4
    second.call(targets.double, value)
    assert first.call(targets.use_kept) == 9
    assert value.value == 9


# What fails


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: RawValue("i", 1), "a RawValue of c_int "),
        (lambda: RawArray(ctypes.c_double * 2, 3), "a RawArray of c_double "),
        (lambda: Value(targets.Cell).get_obj(), "a RawValue of Cell "),
    ],
)
def test_memory_without_a_lock(make: Any, what: str, elsewhere: Elsewhere) -> None:
    value = make()
    reason = (
        f"{what}cannot be used here, for its memory is in another container or on another "
        "machine: only a Value or an Array with a lock can"
    )
    with pytest.raises(FileNotFoundError, match=f"] {reason}$"):
        elsewhere.call(targets.read, value)
    elsewhere.call(targets.make_something)  # in a folder of the same name
    with pytest.raises(FileNotFoundError, match=reason):
        elsewhere.call(targets.read, value)


@pytest.mark.parametrize("lock", [None, "ours"])
def test_the_home_is_killed(lock: str | None, elsewhere: Elsewhere) -> None:
    """Also when the lock lives on."""
    ours = None if lock is None else fiber.RLock()
    used = fiber.Event()
    process = fiber.Process(target=targets.make_and_wait, args=(elsewhere.way, used, ours))
    process.start()
    assert used.wait(DEADLINE)
    process.kill()
    process.join()
    assert elsewhere.result() == "PeerDied soon"


def test_one_that_dies_with_the_lock(elsewhere: Elsewhere) -> None:
    value, within = Value("i", 1), fiber.Event()
    elsewhere.begin(targets.set_and_die, value, within)
    assert within.wait(DEADLINE)
    elsewhere.process.join()
    assert value.get_lock().acquire(timeout=DEADLINE)
    assert value.get_obj().value == 1  # it had not yet sent it
    value.release()


# What stays


def test_a_process_elsewhere_keeps_the_memory(
    elsewhere: Elsewhere, files: Callable[[], set[int]]
) -> None:
    array, value = Array("b", LARGE), Value("i", 1)
    elsewhere.call(targets.keep, array)
    elsewhere.call(targets.keep, value)
    del array, value
    gc.collect()
    assert len(files()) == 2
    assert elsewhere.call(targets.use_kept) == 2
    assert elsewhere.call(targets.use_kept) == 3
    assert elsewhere.call(targets.let_go) == 0
    until(lambda: files() == set(), "the end of the memory")


def test_memory_goes_with_its_last_user(
    elsewhere: Elsewhere, files: Callable[[], set[int]]
) -> None:
    array = Array("b", LARGE)
    elsewhere.call(targets.keep, array)
    del array
    elsewhere.process.kill()
    elsewhere.process.join()
    until(lambda: files() == set(), "the end of the memory")


def test_memory_that_is_there_no_more(
    elsewhere: Elsewhere, files: Callable[[], set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heap, "_LEASE", -2.0)
    monkeypatch.setattr(heap, "_SWEEP_SECONDS", -1.0)
    data = pickle.dumps((targets.read, (Array("b", LARGE),)))
    other = RawValue("i")
    assert len(files()) == 1
    elsewhere.way.put(data)
    with pytest.raises(FileNotFoundError, match="the shared memory of this object is gone"):
        elsewhere.result()
    assert other.value == 0


def test_pickles_leave_nothing(
    files: Callable[[], set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fiber.runtime import home

    monkeypatch.setattr(home, "_LEASE", 0.2)
    served = session.current().home.objects
    value = Value("i", 1)
    for _ in range(1000):
        assert pickle.loads(pickle.dumps(value)).value == 1
    assert len(served) == 2  # its lock and its arena
    assert len(files()) == 1
    values = [Value("i", number) for number in range(2000)]
    for again in pickle.loads(pickle.dumps(values)):
        again.value += 1
    assert [v.value for v in values] == list(range(1, 2001))
    assert len(served) - 2001 < 20
    assert len(files()) < 20
    del values, value, again
    gc.collect()
    until(lambda: not served, "the end of all that was served")
    assert files() == set()


def test_what_is_not_pickled_is_not_served() -> None:
    values = [Value("i", number) for number in range(10)]
    assert sum(value.value for value in values) == 45
    assert len(session.current().home.objects) == 10  # their locks


def test_thousands_of_values_elsewhere_leave_nothing(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fiber.runtime import home

    monkeypatch.setattr(home, "_LEASE", 0.2)
    served = session.current().home.objects
    before = len(served)
    counts = []
    for _ in range(4):
        values = [Value("i", number) for number in range(300)]
        elsewhere.call(targets.double, *values)
        assert [value.value for value in values] == list(range(0, 600, 2))
        del values
        gc.collect()
        counts.append(elsewhere.call(targets.count))
        until(lambda: len(served) == before, "the end of what was served")
    assert counts[-1] - counts[1] < 200, counts
