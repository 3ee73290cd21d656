"""What the tests of shared memory run in processes, by name."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

import numpy as np

from fiber.shared_memory import SharedMemory
from fiber.sharedctypes import RawArray

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
    import pickle

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
