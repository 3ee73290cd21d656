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


def nothing(_: object) -> None:
    """The empty task."""


def sleep(seconds: float) -> None:
    """A task of a known length that needs no processor."""
    time.sleep(seconds)


def whoami(seconds: float) -> int:
    """The worker's process id, after a pause in which the other workers can take their share."""
    time.sleep(seconds)
    return os.getpid()


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
