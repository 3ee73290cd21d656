"""The memory that a process lends to others, so that they need no copy of what it sends them.

    Arena.lend ─► Loan (in a message) ─► Views.view, in another process ─► a message ─► take_back

    folder of this arena ─ slab (a file) ─┬─ block: lent
                                          ├─ block: idle, its pages are there for the next loan
                                          └─ block: fresh, it has no memory

A block has one owner, the arena, and one reader at a time. It is used again and again: a copy into
pages that are in use is several times as fast as one into fresh pages. A slab holds blocks of one
size, so that a few files do for many of them; its memory comes and goes block by block.

There is a bound on the memory, whether lent or idle. Beyond it, and where shared memory is missing
or full, `lend` returns None, and buffers travel over the socket. `tick`, called now and then, gives
up what was not needed since the last time.

The folder has a name that others know, so that whoever notices the death of the process can remove
it. Readers that see a block then keep it, for their mapping lives on.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

from fiber.wire.framing import Buffer

__all__ = ["LEAST", "Arena", "Loan", "remove"]

LEAST = 1 << 16
"""Bytes: what is smaller goes over the socket as fast."""

TICK = 5.0
"""Seconds after which, about, `tick` should be called while `backed` is not 0."""

_SUFFIX = ".lent"
_PAGE = mmap.PAGESIZE
_SLAB_BYTES = 1 << 26
_SLAB_BLOCKS = 256
_SPARE = 16  # the share of the file system that is left to others: one in so many
_REST = 1.0  # seconds without another try after memory was refused


class Loan(NamedTuple):
    """What a message says of a buffer that is in a block.

    Attributes:
        id: by which the owner knows it.
        path: of the file.
        offset: where in it the buffer begins.
        size: of the buffer.
    """

    id: int
    path: str
    offset: int
    size: int


class Arena:
    """The blocks of this process; it may be used by several threads.

    Args:
        folder: returns the folder for shared memory, made at its first call.
        name: of this arena, in that folder.
        limit: returns the bytes that the blocks may have; None for half of what is free there, but
            no more than a quarter of this machine's memory. Asked at first use. If it is 0, there
            need be no folder.
    """

    def __init__(
        self,
        folder: Callable[[], str],
        name: str,
        limit: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.lent = 0
        """Bytes of the blocks that are with readers."""
        self.backed = 0
        """Bytes of all blocks that have memory."""
        self._folder = folder
        self._name = name
        self._asked_limit = limit
        self._limit = 0
        self._own = ""  # our folder
        self._slabs = 0  # how many were made
        self._ids = 0
        self._loans: dict[int, tuple[_Slab, int]] = {}
        self._kinds: dict[int, _Kind] = {}
        self._refused_at = -_REST
        self._lock = threading.Lock()

    def lend(self, pieces: Sequence[Buffer], size: int) -> Loan | None:
        """Copy `pieces`, of `size` bytes together, into a block; None if there is none to be had.

        The caller sees that it is taken back, even if the message gets nowhere.
        """
        with self._lock:
            taken = self._take(_capacity(size))
            if taken is None:
                return None
            slab, index = taken
            self._ids += 1
            start = at = index * slab.capacity
            try:
                for piece in pieces:
                    slab.memory[at : at + len(piece)] = piece
                    at += len(piece)
            except BaseException:
                self._kinds[slab.capacity].idle.append(taken)
                raise
            self._loans[self._ids] = taken
            slab.lent += 1
            self.lent += slab.capacity
            return Loan(self._ids, slab.path, start, size)

    def take_back(self, id: int, *, forked: bool = False) -> None:
        """A reader is done with what it was lent.

        Args:
            id: of the loan.
            forked: some process that its reader forked may see it still: it is not used again.
        """
        with self._lock:
            loan = self._loans.pop(id, None)
            if loan is None:  # closed meanwhile
                return
            slab, index = loan
            slab.lent -= 1
            self.lent -= slab.capacity
            kind = self._kinds[slab.capacity]
            if forked and not slab.closing:
                slab.closing = True
                kind.slabs.remove(slab)
                idle, kind.idle = kind.idle, [taken for taken in kind.idle if taken[0] is not slab]
                kind.least_idle = min(kind.least_idle, len(kind.idle))
                if slab.lent:
                    for its, place in idle:
                        if its is slab:
                            self._empty(slab, place)
            if not slab.closing:
                kind.idle.append((slab, index))
            elif not slab.lent:
                self._close(slab)
            elif not forked:
                self._empty(slab, index)

    def tick(self) -> bool:
        """Give up the blocks that were idle since the last call; return whether any are left."""
        with self._lock:
            for kind in self._kinds.values():
                # The last to come is the first to go: those at the bottom were not touched.
                self._give_up(kind, kind.least_idle)
                kind.least_idle = len(kind.idle)
            return self.backed > 0

    def close(self) -> None:
        """Remove all; readers keep what they see."""
        with self._lock:
            for kind in self._kinds.values():
                for slab in kind.slabs:
                    slab.memory.close()
            for slab, _ in self._loans.values():
                slab.memory.close()
            self._kinds.clear()
            self._loans.clear()
            self.lent = self.backed = 0
            if self._own:
                _remove(self._own)
                self._own = ""

    # Blocks ------------------------------------------------------------------------------------

    def _take(self, capacity: int) -> tuple[_Slab, int] | None:
        kind = self._kinds.get(capacity)
        if kind is None:
            kind = self._kinds[capacity] = _Kind()
        if kind.idle:
            taken = kind.idle.pop()
            kind.least_idle = min(kind.least_idle, len(kind.idle))
            return taken
        if monotonic() < self._refused_at + _REST:
            return None
        try:
            if not self._own:
                self._begin()
            if self.backed + capacity > self._limit:
                self._give_up_all()  # to make room for blocks of another size
            if self.backed + capacity > self._limit:
                return None
            try:
                return self._make(kind, capacity)
            except OSError:  # it is full, perhaps of our own
                if not self._give_up_all():
                    raise
                return self._make(kind, capacity)
        except OSError:
            self._refused_at = monotonic()
            return None

    def _begin(self) -> None:
        limit = self._asked_limit()
        if limit == 0:  # to ask for the folder would make it
            raise OSError("nothing may be lent")
        folder = self._folder()
        if limit is None:
            about = os.statvfs(folder)
            memory = os.sysconf("SC_PHYS_PAGES") * _PAGE
            limit = min(about.f_bavail * about.f_frsize // 2, memory // 4)
        own = _folder_of(folder, self._name)
        os.mkdir(own, 0o700)
        self._own, self._limit = own, limit

    def _make(self, kind: _Kind, capacity: int) -> tuple[_Slab, int]:
        """Have memory for one more block; raises OSError."""
        about = os.statvfs(self._own)
        if about.f_bavail - capacity // about.f_frsize < about.f_blocks // _SPARE:
            raise OSError("there is no room")
        slab = next((slab for slab in kind.slabs if slab.fresh), None)
        if slab is None:
            self._slabs += 1
            slab = _Slab(os.path.join(self._own, str(self._slabs)), capacity)
            kind.slabs.append(slab)
        index = slab.fresh[-1]
        if hasattr(os, "posix_fallocate"):  # or full memory would end us with SIGBUS
            fd = os.open(slab.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, index * capacity, capacity)
            finally:
                os.close(fd)
        slab.fresh.pop()
        self.backed += capacity
        return slab, index

    def _give_up_all(self) -> bool:
        """Give up all that is idle; return whether there was anything."""
        before = self.backed
        for kind in self._kinds.values():
            self._give_up(kind, len(kind.idle))
        return self.backed < before

    def _give_up(self, kind: _Kind, count: int) -> None:
        """Give the memory of the `count` oldest idle blocks back to the system."""
        blocks, kind.idle = kind.idle[:count], kind.idle[count:]
        kind.least_idle = min(kind.least_idle, len(kind.idle))
        for slab, index in blocks:
            self._empty(slab, index)
        for slab in {slab for slab, _ in blocks}:
            if len(slab.fresh) == slab.count:
                kind.slabs.remove(slab)
                self._close(slab)

    def _empty(self, slab: _Slab, index: int) -> None:
        """Give the memory of a block back that nobody sees."""
        with contextlib.suppress(OSError):  # it goes with the file then
            slab.memory.madvise(_REMOVE, index * slab.capacity, slab.capacity)
        slab.fresh.append(index)
        self.backed -= slab.capacity

    def _close(self, slab: _Slab) -> None:
        self.backed -= (slab.count - len(slab.fresh)) * slab.capacity
        slab.memory.close()
        with contextlib.suppress(OSError):
            os.unlink(slab.path)


class _Kind:
    """The blocks of one size.

    Attributes:
        slabs: those that blocks are taken from.
        idle: blocks that have memory, the last used at the end.
        least_idle: how many of them there were at the least since the last tick.
    """

    __slots__ = ("idle", "least_idle", "slabs")

    def __init__(self) -> None:
        self.slabs: list[_Slab] = []
        self.idle: list[tuple[_Slab, int]] = []
        self.least_idle = 0


class _Slab:
    """A file with blocks of one size.

    Attributes:
        fresh: blocks without memory.
        lent: how many blocks readers have.
        closing: it goes with the last of these; until then, what a fork may see stays as it is.
    """

    __slots__ = ("capacity", "closing", "count", "fresh", "lent", "memory", "path")

    def __init__(self, path: str, capacity: int) -> None:
        self.path = path
        self.capacity = capacity
        self.count = 1
        if _REMOVE:
            self.count = max(1, min(_SLAB_BLOCKS, _SLAB_BYTES // capacity))
        self.fresh = list(range(self.count - 1, -1, -1))
        self.lent = 0
        self.closing = False
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, self.count * capacity)  # which takes no memory yet
            self.memory = mmap.mmap(fd, self.count * capacity)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)


# Takes memory out of a file that stays, on Linux; elsewhere each block is a file.
_REMOVE: int = getattr(mmap, "MADV_REMOVE", 0)


def _capacity(size: int) -> int:
    """Return the size of a block for `size` bytes: at most an eighth more, and whole pages."""
    step = max(_PAGE, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def remove(folder: str, name: str) -> None:
    """Remove the arena of a dead process from the folder for shared memory."""
    _remove(_folder_of(folder, name))


def _folder_of(folder: str, name: str) -> str:
    return os.path.join(folder, name + _SUFFIX)


def _remove(folder: str) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)
