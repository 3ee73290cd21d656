"""What the workers run: a module of its own, so that every peer can pickle it by name.

The children of `objects` are given a connection to the main process. From it they take orders,
counts of operations; there they answer how many they have done; and they end at None.
"""

from __future__ import annotations

import os
import time
from itertools import cycle, islice

TYPE_CHECKING = False  # see peers
if TYPE_CHECKING:
    from typing import Any

BLOB = bytes(range(256)) * 3906 + bytes(64)  # 1 MB
STRIDE = 4097  # one byte of each page, and not always the same one
KEY = "key"
LARGE = 1_000_000  # numbers of 8 bytes
PAGE = 512  # of them
PIECE = 16_384  # of them, which fit a processor's cache

_made: Any = None
_kept: object = None


def nothing(_: object) -> None:
    """The empty task."""


def sleep(seconds: float) -> None:
    """A task of a known length that needs no processor."""
    time.sleep(seconds)


def whoami(seconds: float) -> int:
    """The worker's process id, after a pause in which the other workers can take their share."""
    time.sleep(seconds)
    return os.getpid()


def meet(paths: tuple[str, str]) -> int:
    """Tell the first fifo that we are here, and wait for a byte of the second; our process id."""
    for path, way, act in zip(paths, (os.O_WRONLY, os.O_RDONLY), (_tell, _wait), strict=True):
        fd = os.open(path, way)
        act(fd)
        os.close(fd)
    return os.getpid()


def _tell(fd: int) -> None:
    os.write(fd, b".")


def _wait(fd: int) -> None:
    os.read(fd, 1)


def reduce(array: Any) -> float:
    """The sum of one number of each page of an array of float64: all of it has come."""
    return float(array[::PAGE].sum())


def made(number: int) -> Any:
    """An array of 8 MB with `number` in each page; the memory is the worker's and used again."""
    global _made
    if _made is None:
        import numpy as np

        _made = np.zeros(LARGE)
    _made[::PAGE] = number
    return _made


def use(item: tuple[Any, int]) -> float:
    """Read each page of a large array, which comes as itself or as what it can be had from."""
    source, number = item
    return reduce(_array(source)) + number


def evaluate(item: tuple[Any, int]) -> float:
    """Work through all of such an array: how far its numbers are from those of a model."""
    source, number = item
    array, slope, error = _array(source), 1 + number, 0.0
    for start in range(0, len(array), PIECE):
        piece = array[start : start + PIECE]
        error += float((((piece - start) * slope - piece) ** 2).sum())
    return error


def _array(source: Any) -> Any:
    return source.get() if hasattr(source, "get") else source


def keep(value: object) -> None:
    """The initializer that makes `Kept` give `value`."""
    global _kept
    _kept = value


class Kept:
    """Stands for what the initializer has kept in this process."""

    def get(self) -> Any:
        return _kept


class RayHandle:
    """Stands for what is in ray's store."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def get(self) -> Any:
        import ray

        return ray.get(self.reference)


def put(queue: Any, messages: tuple[Any, ...], count: int, readers: int) -> None:
    """Put the messages in turn, `count` in all, and then a None for each reader."""
    put = queue.put
    for message in islice(cycle(messages), count):
        put(message)
    for _ in range(readers):
        put(None)


def take(queue: Any, writers: int, large: bool) -> int:
    """Count messages until there was a None from each writer."""
    get = queue.get
    count = 0
    while writers:
        message = get()
        if message is None:
            writers -= 1
        else:
            count += look(message) if large else 1
    return count


def look(message: Any) -> int:
    """Check one byte of each page of a message of 1 MB, and return 1: it is one message."""
    if memoryview(message).cast("B")[::STRIDE].tobytes() != BLOB[::STRIDE]:
        raise RuntimeError("a message is not what was sent")
    return 1


def produce(line: Any, queue: Any, messages: tuple[Any, ...], large: bool) -> None:
    for count in iter(line.recv, None):
        put(queue, messages, count, 1)


def consume(line: Any, queue: Any, messages: tuple[Any, ...], large: bool) -> None:
    for _ in iter(line.recv, None):
        line.send(take(queue, 1, large))


def echo(line: Any) -> None:
    while (message := line.recv()) is not None:
        line.send(message)


def have_memory_at_hand() -> None:
    """Free a large block: after it the C library keeps freed memory, and gives it out again.

    Until a program has done so, glibc returns the memory of a message of 1 MB to the system and
    takes it anew for the next one, which costs more than a copy does.
    """
    bytearray(20 << 20)


def send(line: Any, at_hand: bool) -> None:
    if at_hand:
        have_memory_at_hand()
    for count in iter(line.recv, None):
        for _ in range(count):
            line.send(BLOB)


def receive(line: Any, at_hand: bool) -> None:
    if at_hand:
        have_memory_at_hand()
    for count in iter(line.recv, None):
        line.send(sum(look(line.recv()) for _ in range(count)))


def lock(line: Any, lock: Any) -> None:
    acquire, release = lock.acquire, lock.release
    for count in iter(line.recv, None):
        for _ in range(count):
            acquire()
            release()
        line.send(count)


def write(line: Any, shared: Any) -> None:
    for count in iter(line.recv, None):
        for number in range(count):
            shared[KEY] = number
        line.send(count)


def read(line: Any, shared: Any) -> None:
    for count in iter(line.recv, None):
        for _ in range(count):
            shared[KEY]
        line.send(count)


def increment(line: Any, counter: Any) -> None:
    for count in iter(line.recv, None):
        for _ in range(count):
            with counter.get_lock():
                counter.value += 1
        line.send(count)
