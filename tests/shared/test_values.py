"""Values and arrays: what one process writes, the others read, however they got them."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from multiprocessing import sharedctypes as mp_sharedctypes
from typing import Any

import numpy as np
import pytest
from tests.shared import targets
from tests.waiting import until

import fiber
from fiber import heap, sharedctypes
from fiber.runtime import folders, session
from fiber.sharedctypes import Array, RawArray, RawValue, Value

LARGE = targets.LARGE


@pytest.fixture
def pool() -> Iterator[fiber.Pool]:
    with fiber.Pool(2) as pool:
        yield pool


def run(target: Callable[..., Any], *args: Any) -> None:
    process = fiber.Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


# To other processes


@pytest.mark.parametrize("lock", [True, False])
def test_a_process_shares_its_arguments(lock: bool) -> None:
    number = Value("i", 21, lock=lock)
    real = Value(ctypes.c_double, 0.25, lock=lock)
    array = Array("d", range(5), lock=lock)
    text = Array("c", b"ab\0\0", lock=lock)
    run(targets.double, number, real, array, text)
    assert number.value == 42
    assert real.value == 0.5
    assert array[:] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert text.value == b"abab"


def test_structures_in_arrays_in_structures() -> None:
    grids = RawArray(targets.Grid, 3)
    run(targets.fill, grids)
    assert grids[1].name == b"second"
    assert grids[1].cells[3].weights[1][2] == 2.5
    assert [cell.count for cell in grids[1].cells] == [0, 0, 0, 1]


def test_arrays_of_arrays() -> None:
    matrix = RawArray(ctypes.c_double * 4, 3)
    run(targets.set_deep, matrix)
    assert list(matrix[2]) == [0.0, 0.0, 0.0, 4.0]


def test_an_array_of_a_named_type_keeps_its_type() -> None:
    matrix = RawValue(targets.Matrix, 1.0, 2.0)
    again = pickle.loads(pickle.dumps(matrix))
    assert type(again) is targets.Matrix
    again[1] = 3.0
    assert matrix[1] == 3.0


def test_a_locked_structure() -> None:
    cell = Value(targets.Cell)
    cell.count = 3
    again = pickle.loads(pickle.dumps(cell))
    again.count += 1
    assert cell.count == 4
    assert type(again).__name__ == "SynchronizedCell"


def test_numpy_sees_the_memory() -> None:
    array, raw = Array("d", 1000), RawArray("d", 1000)
    view = np.frombuffer(array.get_obj())
    view[:] = 1.0
    run(targets.add_one_to_all, array)
    run(targets.add_one_to_all, raw)
    assert (view == 2.0).all()
    assert (np.frombuffer(raw) == 1.0).all()


def test_a_view_outlives_its_array() -> None:
    view = np.frombuffer(RawArray("b", [1] * LARGE), dtype=np.int8)
    assert view.sum() == LARGE


def test_counting_together() -> None:
    counter = Value("i", 0)
    processes = [fiber.Process(target=targets.add, args=(counter, 50)) for _ in range(3)]
    for process in processes:
        process.start()
    targets.add(counter, 50)
    for process in processes:
        process.join()
    assert counter.value == 200


def test_tasks_share_their_arguments(pool: fiber.Pool) -> None:
    values = [RawValue("i", i) for i in range(20)]
    pool.map(targets.double, values)
    assert [value.value for value in values] == list(range(0, 40, 2))


def test_tasks_share_what_their_function_holds(pool: fiber.Pool) -> None:
    counter, squares = Value("i", 0), RawArray("i", 10)

    def square(i: int) -> None:
        squares[i] = i * i
        with counter.get_lock():
            counter.value += 1

    pool.map(square, range(10), chunksize=1)
    pool.map(lambda i: square(i) or 0, range(10), chunksize=1)
    assert squares[:] == [i * i for i in range(10)]
    assert counter.value == 20


def test_workers_share_what_their_initializer_got() -> None:
    counter = Value("i", 0)
    with fiber.Pool(1, initializer=targets.add, initargs=(counter, 5)) as pool:
        pool.map(abs, range(10))
        assert counter.value == 5


def test_globals_of_a_program_are_shared(run_script: Callable[..., Any]) -> None:
    done = run_script(
        """\
import fiber
total = fiber.Value("i", 0)
seen = fiber.RawArray("b", 10)

def work(i):
    seen[i] = 1
    with total.get_lock():
        total.value += i

if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        pool.map(work, range(10))
    print(total.value, sum(seen))
"""
    )
    assert done.stdout == "45 10\n", done.stderr


def test_a_result_is_shared_after_its_maker_ended() -> None:
    with fiber.Pool(1) as pool:
        array = pool.apply(targets.make, (LARGE,))
    assert array[0] == 7
    run(targets.double, array)
    assert array[LARGE - 1] == 14


def test_a_process_passes_on_what_it_got(pool: fiber.Pool) -> None:
    def pass_on(array: Any) -> None:
        run(targets.double, array)

    array = RawArray("i", [1, 2])
    run(pass_on, array)
    assert array[:] == [2, 4]


def test_a_process_maps_memory_once(pool: fiber.Pool) -> None:
    value = RawValue("i", 0)
    assert pool.starmap(targets.same_memory, [(value, value)] * 4, chunksize=1) == [True] * 4
    assert value.value == 4
    assert targets.same_memory(value, pickle.loads(pickle.dumps(value)))


def test_picklers_of_multiprocessing(run_script: Callable[..., Any]) -> None:
    done = run_script(
        """\
import multiprocessing, pickle
from multiprocessing.reduction import ForkingPickler
from fiber.sharedctypes import Array, RawValue

def double(value):
    value.value *= 2

if __name__ == "__main__":
    multiprocessing.RawValue("i")  # which has its own way to pickle such types
    value, array = RawValue("i", 1), Array("i", [1, 2])
    pickle.loads(ForkingPickler.dumps((array,)))[0][0] = 5
    process = multiprocessing.get_context("spawn").Process(target=double, args=(value,))
    process.start()
    process.join()
    print(array[0], value.value)
"""
    )
    assert done.stdout == "5 2\n", done.stderr


# What is not shared


def test_copies() -> None:
    array = RawArray("i", [1, 2, 3])
    private = [copy.copy(array), copy.deepcopy([array])[0]]
    shared = sharedctypes.copy(array)
    array[0] = 9
    assert [c[:] for c in (*private, shared)] == [[1, 2, 3]] * 3
    pickle.loads(pickle.dumps(shared))[1] = 8
    assert shared[:] == [1, 8, 3]
    number = RawValue("i", 1)
    private = copy.copy(number)
    pickle.loads(pickle.dumps(private)).value = 8
    private.value = 9
    assert number.value == 1


def test_other_ctypes_objects_travel_by_value() -> None:
    assert RawValue("i", 1).value == 1
    assert RawArray(targets.Cell, 2)[1].count == 0
    number, cell = ctypes.c_int(5), targets.Cell(count=6)
    copies = pickle.loads(pickle.dumps((number, cell)))
    number.value = cell.count = 0
    assert copies[0].value == 5
    assert copies[1].count == 6


# Interface


def test_locks() -> None:
    lock = fiber.Lock()
    assert Value("i", lock=lock).get_lock() is lock
    assert Array("i", 2, lock=None).get_lock() is not None
    assert not hasattr(Value("i", lock=False), "get_lock")
    with pytest.raises(AttributeError, match="acquire"):
        Value("i", lock="no lock")
    context = fiber.get_context("spawn")
    assert type(context.Value("i").get_lock()) is type(context.RLock())


def test_types_are_those_of_multiprocessing() -> None:
    assert isinstance(Value("i"), mp_sharedctypes.Synchronized)
    assert isinstance(Array("i", 1), mp_sharedctypes.SynchronizedArray)
    assert isinstance(Array("c", 1), mp_sharedctypes.SynchronizedString)
    assert type(RawValue("i")) is ctypes.c_int
    assert sharedctypes.typecode_to_type["d"] is ctypes.c_double


def test_fields_of_a_base_are_locked_as_well() -> None:
    class More(targets.Cell):
        _fields_ = (("more", ctypes.c_int),)

    value = Value(More)
    value.count, value.more = 1, 2
    value.count += value.more
    assert value.get_obj().count == 3


def test_memory_is_zero_at_first() -> None:
    for size in (8, 5000, LARGE):
        for _ in range(3):
            array = RawArray("b", size)
            assert not any(array)
            array[:] = b"\x01" * size
            del array


def test_nothing_is_an_array_too() -> None:
    assert len(RawArray("i", 0)) == len(pickle.loads(pickle.dumps(RawArray("i", [])))) == 0


# Where the memory is


def test_memory_is_in_dev_shm(files: Callable[[], set[int]]) -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("this system has no /dev/shm")
    value = RawValue("i")
    (inode,) = files()
    (name,) = [n for n in os.listdir(folders.memory_folder(session.folder())) if ".held-" in n]
    assert os.stat(os.path.join(folders.memory_folder(session.folder()), name)).st_ino == inode
    assert value.value == 0


def test_without_dev_shm_it_is_in_the_folder(
    monkeypatch: pytest.MonkeyPatch, files: Callable[[], set[int]]
) -> None:
    monkeypatch.setattr(folders, "_MEMORY", "/nowhere")
    value, array = RawValue("i", 4), RawArray("b", [1] * LARGE)
    assert len(files()) == 2
    run(targets.double, value, array)
    assert value.value == 8
    assert array[LARGE - 1] == 2


def test_no_room(files: Callable[[], set[int]]) -> None:
    with pytest.raises(OSError, match="cannot get 70,368,744,177,664 bytes .*: No space"):
        RawArray("b", 1 << 46)
    assert files() == set()
    assert RawValue("i", 3).value == 3


def test_no_room_after_all(run_script: Callable[..., Any]) -> None:
    done = run_script(
        """\
import os, resource
from fiber import shared_memory, sharedctypes
from fiber.runtime import session
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for make in (
    lambda: sharedctypes.RawArray("b", 1 << 22),
    lambda: shared_memory.SharedMemory("tests-" + str(os.getpid()), create=True, size=1 << 22),
):
    try:
        make()
    except OSError as error:
        print(error.strerror.partition(" in ")[0])
print(sharedctypes.RawValue("i", 7).value)
print([n for n in os.listdir(session.folder()) if "shm" in n or "held" in n])
print([n for n in os.listdir("/dev/shm") if n == f"tests-{os.getpid()}"])
"""
    )
    problem = "cannot get 4,194,304 bytes of shared memory: File too large"
    assert done.stdout.splitlines() == [problem, problem, "7", "[]", "[]"], done.stderr


def test_many_are_cheap(pool: fiber.Pool, files: Callable[[], set[int]]) -> None:
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    values = [RawValue("i", i) for i in range(10_000)]
    assert len(files()) < 20
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) - before < 25
    assert pool.apply(targets.add_values, (values,)) == sum(range(10_000))
    assert len(files()) < 20


# How long it is there


def test_memory_goes_when_it_is_dropped(files: Callable[[], set[int]]) -> None:
    small, large = RawValue("i"), RawArray("b", LARGE)
    assert len(files()) == 2
    del large
    assert len(files()) == 1
    del small
    assert files() == set()


def test_arguments_that_nobody_else_holds(files: Callable[[], set[int]]) -> None:
    totals = [RawValue("q") for _ in range(4)]
    processes = []
    for number, total in enumerate(totals):
        args = (RawArray("i", [number] * 1000), total)
        processes.append(fiber.Process(target=targets.sum_into, args=args))
        del args
        processes[-1].start()
    for process in processes:
        process.join()
    assert [total.value for total in totals] == [0, 1000, 2000, 3000]
    del totals, total
    until(lambda: files() == set(), "the end of what the processes had")


def test_what_others_may_have_is_not_handed_out_again(pool: fiber.Pool) -> None:
    keep = RawValue("i")

    def watch(value: Any) -> Callable[[], int]:
        return lambda: value.value

    (watched,) = pool.map(watch, [RawValue("i", 5)])
    others = [RawValue("i", 6) for _ in range(1000)]
    assert watched() == 5
    assert keep.value == 0
    assert all(other.value == 6 for other in others)


def test_memory_that_was_passed_on_goes_when_nobody_has_it(
    pool: fiber.Pool, files: Callable[[], set[int]]
) -> None:
    for _ in range(50):
        values = [RawValue("i", 1) for _ in range(100)]
        assert pool.apply(targets.add_values, (values,)) == 100
        del values
    until(lambda: len(files()) <= 2, "most of the memory gone")


def test_memory_that_nobody_kept(pool: fiber.Pool) -> None:
    array = RawArray("b", [7] * LARGE)
    data = pickle.dumps(array)
    assert pool.apply(targets.loads, (data,)) == "7"
    assert pool.apply(targets.loads, (data,)) == "7"  # we have it
    data = pickle.dumps(array)
    del array
    assert pool.apply(targets.loads, (data,)) == "7"  # the pickle has it
    assert "the shared memory of this object is gone" in pool.apply(targets.loads, (data,))


def test_memory_of_a_session_that_ended() -> None:
    value = RawValue("i", 3)
    session.shutdown()
    assert value.value == 3
    with pytest.raises(FileNotFoundError, match="its session has ended"):
        pickle.dumps(value)
    run(targets.double, again := RawValue("i", 4))
    assert again.value == 8
    assert value.value == 3


def test_pickles_that_were_lost_keep_memory_for_a_while_only(
    files: Callable[[], set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heap, "_SWEEP_SECONDS", -1.0)
    pickle.dumps(RawArray("b", LARGE))
    first = RawArray("b", LARGE)
    assert len(files()) == 2
    monkeypatch.setattr(heap, "_LEASE", -2.0)
    pickle.dumps(RawArray("b", LARGE))
    second = RawArray("b", LARGE)
    assert len(files()) == 3  # the last one's ticket has run out, that of the first has not
    assert len(first) == len(second)


def test_memory_of_a_killed_process_is_freed(
    files: Callable[[], set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heap, "_SWEEP_SECONDS", -1.0)
    process = fiber.Process(target=targets.make_and_die, args=(LARGE,))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert len(files()) == 1
    value = RawValue("i")
    assert len(files()) == 1
    assert value.value == 0
