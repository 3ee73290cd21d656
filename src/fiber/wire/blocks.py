"""Blocks of shared memory, in which large buffers travel between processes of one host.

    Blocks.lend ─► Block (its path, in a message) ─► Reader.read ─► copies
       ▲                                                              │
       └── Blocks.take_back ◄─── a message: it was read ◄─────────────┘

A block is a file that both sides map. Its owner uses it again and again: a copy into pages that are
in use is many times as fast as one into fresh pages. There is a bound on what an owner has; beyond
it, and where shared memory is missing or full, buffers travel over the socket.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

from fiber.wire.framing import Buffer

__all__ = ["LEAST", "MOST", "Block", "Blocks", "Reader", "remove"]

LEAST = 1 << 15
"""Bytes: what is smaller is not worth a block."""

MOST = 1 << 24
"""Bytes: what is larger does not get one."""

_LIMIT = 1 << 26  # bytes that one process lends at the most
_BUSY = 8  # blocks on their way: a reader keeps up, or lags behind
_FLOWS = 0.02  # seconds since the last one came back within which the next can be expected
_MAPS = 32  # blocks of others that a process keeps mapped


class Block(NamedTuple):
    """What a message says of buffers that are in a block.

    Attributes:
        path: of the file.
        sizes: of the buffers, which follow each other.
        whole: the one buffer is a bytes object itself, and not a pickle.
    """

    path: str
    sizes: tuple[int, ...]
    whole: bool


class Blocks:
    """The blocks of this process.

    Args:
        folder: returns the folder for their files, made at its first call.
    """

    def __init__(self, folder: Callable[[], str]) -> None:
        self._folder = folder
        self._ids = itertools.count()
        self._maps: dict[str, mmap.mmap] = {}
        self._idle: dict[int, list[str]] = {}  # by capacity
        self._total = 0
        self._full = False  # no shared memory is to be had
        self._back_at = 0.0  # of `monotonic`, when the last one came back
        self.on_back: Callable[[], object] | None = None
        """Called when one comes back."""

    def is_worth_waiting(self, total: int) -> bool:
        """Whether a block for `total` bytes will come back soon: better than to take fresh memory.

        It is when several are on their way, and others have come back just now.
        """
        capacity = 1 << (total - 1).bit_length()
        idle = sum(map(len, self._idle.values()))
        busy = len(self._maps) - idle
        flows = monotonic() - self._back_at < _FLOWS
        return busy >= _BUSY and flows and not self._idle.get(capacity)

    def lend(self, buffers: Sequence[Buffer], *, whole: bool = False) -> Block | None:
        """Copy `buffers` into a block; None if there is none to be had.

        Args:
            buffers: what shall travel.
            whole: see `Block`.
        """
        sizes = tuple(map(len, buffers))
        total = sum(sizes)
        if not LEAST <= total <= MOST:
            return None
        path = self._take(1 << (total - 1).bit_length())
        if path is None:
            return None
        memory = self._maps[path]
        at = 0
        for buffer, size in zip(buffers, sizes, strict=True):
            memory[at : at + size] = buffer
            at += size
        return Block(path, sizes, whole)

    def _take(self, capacity: int) -> str | None:
        idle = self._idle.get(capacity)
        if idle:
            return idle.pop()
        if self._total + capacity > _LIMIT:
            self._drop_idle()
        if self._full or self._total + capacity > _LIMIT:
            return None
        try:
            return self._make(capacity)
        except OSError:
            self._full = True
            return None

    def _make(self, capacity: int) -> str:
        path = os.path.join(self._folder(), f"{os.getpid()}-{next(self._ids)}.block")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, capacity)  # or a full disk would end us with SIGBUS
            else:
                os.ftruncate(fd, capacity)
            self._maps[path] = mmap.mmap(fd, capacity)
        except BaseException:
            remove(path)
            raise
        finally:
            os.close(fd)
        self._total += capacity
        return path

    def take_back(self, path: str) -> None:
        """The block was read, and can be used again."""
        memory = self._maps.get(path)
        if memory is not None:
            self._idle.setdefault(len(memory), []).append(path)
            self._back_at = monotonic()
            if self.on_back is not None:
                self.on_back()

    def _drop_idle(self) -> None:
        """Give up what is idle, to make room for blocks of another size."""
        for paths in self._idle.values():
            for path in paths:
                memory = self._maps.pop(path)
                self._total -= len(memory)
                memory.close()
                remove(path)
        self._idle.clear()

    def close(self) -> None:
        """Remove what is idle; what is on its way is removed by who reads it."""
        self._drop_idle()
        for memory in self._maps.values():
            memory.close()
        self._maps.clear()


class Reader:
    """The blocks of others, as this process sees them."""

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}

    def read(self, block: Block) -> bytes | list[Buffer]:
        """Return copies of the buffers, or the one bytes object.

        Raises:
            OSError: the block is gone.
        """
        memory = self._maps.pop(block.path, None)
        if memory is None:
            with open(block.path, "r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
            while len(self._maps) >= _MAPS:
                self._maps.pop(next(iter(self._maps))).close()
        self._maps[block.path] = memory  # the latest is the last
        if block.whole:
            return memory[: block.sizes[0]]
        buffers: list[Buffer] = []
        at = 0
        with memoryview(memory) as view:
            for size in block.sizes:
                buffers.append(bytearray(view[at : at + size]))
                at += size
        return buffers

    def forget(self, path: str) -> None:
        """The block is gone for good."""
        memory = self._maps.pop(path, None)
        if memory is not None:
            memory.close()

    def close(self) -> None:
        """Let go of all."""
        for memory in self._maps.values():
            memory.close()
        self._maps.clear()


def remove(path: str) -> None:
    """Remove the file of a block, if it is there."""
    with contextlib.suppress(OSError):
        os.unlink(path)
