"""What the tests of shared memory run in processes, by name."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
import signal
import threading
import time
from typing import Any

import numpy as np

from fiber import copies
from fiber.shared_memory import SharedMemory
from fiber.sharedctypes import RawArray, RawValue, Value

LARGE = 1 << 21  # bytes


class Cell(ctypes.Structure):
    _fields_ = (("weights", (ctypes.c_double * 3) * 2), ("count", ctypes.c_int))


class Grid(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 8), ("cells", Cell * 4))


class Matrix(ctypes.c_double * 4):
    """A type of arrays with a name of its own."""


def double(*values: Any) -> None:
    for value in values:
        if hasattr(value, "value"):
            value.value *= 2
        else:
            for i in range(len(value)):
                value[i] *= 2


def fill(grids: Any) -> None:
    grids[1].name = b"second"
    grids[1].cells[3].weights[1][2] = 2.5
    grids[1].cells[3].count += 1


def set_deep(matrix: Any) -> None:
    matrix[2][3] = 4.0


def add(counter: Any, times: int) -> None:
    for _ in range(times):
        with counter.get_lock():
            counter.value += 1


def add_one_to_all(array: Any) -> None:
    view = np.frombuffer(array.get_obj() if hasattr(array, "get_obj") else array)
    view += 1.0


def sum_into(array: Any, total: Any) -> None:
    total.value = sum(array)


def make(size: int) -> Any:
    return RawArray("b", [7] * size)


def make_and_die(size: int) -> None:
    keep = RawArray("b", size)
    assert len(keep) == size
    os.kill(os.getpid(), signal.SIGKILL)


def total(array: Any) -> int:
    return sum(array)


def add_values(values: Any) -> int:
    return sum(value.value for value in values)


def where(value: Any) -> int:
    return ctypes.addressof(value)


def same_memory(first: Any, second: Any) -> bool:
    first.value += 1
    return bool(first.value == second.value)


def loads(data: bytes) -> str:
    try:
        return repr(pickle.loads(data)[0])
    except OSError as error:
        return str(error)


def write_by_name(name: str, data: bytes) -> None:
    block = SharedMemory(name)
    block.buf[: len(data)] = data
    block.close()


def write(block: SharedMemory, data: bytes) -> None:
    block.buf[: len(data)] = data


def create(name: str) -> None:
    block = SharedMemory(name, create=True, size=64)
    block.buf[:3] = b"abc"


def unlink(name: str) -> None:
    SharedMemory(name).unlink()


def set_item(shared: Any, index: int, value: Any) -> list[Any]:
    shared[index] = value
    return list(shared)


# Where the memory cannot be seen

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


def hide_memory() -> None:
    """Have this thread see an empty /dev/shm, as in another container.

    Raises:
        OSError: that is not permitted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for done in (
        libc.unshare(_CLONE_NEWNS),
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None),
        libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=64m"),
    ):
        if done != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def work_elsewhere(way: Any, back: Any) -> None:
    """Do what comes, pickled, until it is None; answer with what is returned or raised."""
    hide_memory()
    while (data := way.get()) is not None:
        try:
            function, args = pickle.loads(data)
            back.put(function(*args))
        except Exception as error:
            back.put(error)
        finally:
            function = args = None


def read(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value[:]


def read_without_lock(value: Any) -> Any:
    return value.get_obj().value


def add_in_threads(counter: Any, times: int) -> None:
    threads = [threading.Thread(target=add, args=(counter, times)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def add_within(counter: Any, times: int) -> None:
    """As `add`, for locks that cannot be acquired twice."""
    for _ in range(times):
        with counter:
            counter.get_obj().value += 1


def fill_locked(grids: Any) -> None:
    with grids:
        fill(grids.get_obj())
    grids[0] = grids[1]


def add_to_part(array: Any, start: int, stop: int) -> int:
    """Add 1 to items from `start` to `stop`; return how many differ from the first then."""
    with array.get_lock():
        view = np.frombuffer(array.get_obj())
        view[start:stop] += 1.0
        return int((view != view[0]).sum())


def set_slowly(array: Any, index: int, within: Any, enough: Any) -> None:
    """Set one item, with the lock held from when `within` is set until `enough` is."""
    with array:
        array[index] = -1
        within.set()
        enough.wait()


def set_and_die(value: Any, within: Any) -> None:
    value.acquire()
    value.value = -1
    within.set()
    os.kill(os.getpid(), signal.SIGKILL)


def nest(first: Any, second: Any) -> list[int]:
    """Add to both, which are one value, within each other's locks."""
    seen = []
    with first:
        first.value += 1
        with second.get_lock():
            second.value += 1
            seen.append(first.value)
        again = copy.copy(first)
        again.value += 1
        seen.append(second.value)
    seen.append(second.value)
    return seen


def transfer(source: Any, sink: Any, times: int) -> None:
    """Move ones; both have the same lock."""
    for _ in range(times):
        with source, sink:
            source.value -= 1
            sink.value += 1


def wait_for_value(condition: Any, value: Any, least: int) -> int:
    with condition:
        assert condition.wait_for(lambda: value.value >= least, timeout=20)
        return int(value.value)


def wait_within(value: Any, least: int) -> int:
    """As `wait_for_value`, by a condition that is the value's lock."""
    return wait_for_value(value.get_lock(), value, least)


def try_lock(value: Any) -> list[Any]:
    taken = value.acquire(block=False)
    timed = value.get_lock().acquire(timeout=0.01)
    return [taken, timed, value.get_lock().locked()]


def return_it(*values: Any) -> Any:
    return values


def make_locked(start: int) -> Any:
    made.append(Value("i", start))
    return made[-1]


made: list[Any] = []


def make_something() -> None:
    made.append(RawValue("i"))


def keep(value: Any) -> None:
    made.append(value)


def use_kept() -> Any:
    made[-1].value += 1
    return made[-1].value


def let_go() -> int:
    """Drop what was made and kept; return how many copies are left."""
    made.clear()
    gc.collect()
    return len(copies._copies)


def make_and_wait(way: Any, used: Any, lock: Any) -> None:
    """Make a value, pass it on, and wait to be killed."""
    value = Value("i", 5, lock=lock)
    way.put(pickle.dumps((use_until_it_fails, (value, used))))
    time.sleep(60)


def use_until_it_fails(value: Any, used: Any) -> str:
    """Return which error came, and whether it came within 5 s of the last use that did not fail."""
    latest = time.monotonic()
    try:
        while True:
            value.value += 1
            latest = time.monotonic()
            used.set()
    except Exception as error:
        took = time.monotonic() - latest
        return f"{type(error).__name__} {'soon' if took < 5 else 'late'}"


def fork_and_add(value: Any) -> Any:
    """Add in a child of `os.fork` as well, made with the lock held."""
    with value:
        value.value += 1
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                value.value += 10
                code = 0
            finally:
                os._exit(code)
        value.value += 100
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return value.value


def take_and_double(way: Any) -> None:
    double(way.get())


def set_count(cell: Any, count: int) -> None:
    cell.count = count


def count() -> int:
    """Return how many objects the collector knows."""
    gc.collect()
    assert len(copies._copies) == 0
    return len(gc.get_objects())
