"""Views of memory that others lend: large buffers are read where their sender put them.

    path, offset, size ─► Views.view ─► memoryview ─► arrays ─► the last of them goes
                                                                      │
    whoever lent it may use it again ◄─ tokens ◄─ Views.collect ◄─────┘

The memory is a file that its owner wrote. Here it is mapped privately: reading copies nothing, and
who writes gets a copy of those pages, which nobody else sees. So an array that came this way is as
one that was received: it can be changed, and does not change by itself.

A view is over when the last object goes that looks into its memory, be it in any thread and at any
time. That is noted by a weak reference whose callback is a method in C: a finalizer in Python could
meet a lock that its own thread holds, or swallow a KeyboardInterrupt. `collect` tells what ended.

A mapping stays for the next view of the same file, for its pages are then there already. What was
written into it must be dropped before; pages that were only read stay.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import functools
import mmap
import os
import resource
import struct
import sys
import weakref
from collections import deque
from typing import Any, NamedTuple

__all__ = ["Ended", "Views"]

PAGE = mmap.PAGESIZE

_IDLE_MAPS = 64  # mappings without a view that are kept for the next one
_MOST_MAPS = 1 << 13  # that have views: the system has a bound on a process's mappings
_DROPS = sys.platform == "linux"  # elsewhere MADV_DONTNEED is a hint, and what was written stays
_UNTRACKED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}

# The top byte of a page's entry in /proc/self/pagemap, where the page is not a copy of ours: it is
# neither present nor swapped out, or it is the file's.
_NOT_OURS = bytes(top for top in range(256) if not top & 0xC0 or top & 0x20)


class Ended(NamedTuple):
    """A view that is over.

    Attributes:
        token: what it was made with.
        forked: a process that was forked meanwhile may look into the memory still, so that it must
            not be written to again.
    """

    token: Any
    forked: bool


class _Mapping:
    __slots__ = ("memory", "path", "views")

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.memory = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY, **_UNTRACKED)
        finally:
            os.close(fd)
        self.path = path
        self.views = 0


class _Lease(weakref.ref[Any]):
    """A weak reference to what exports the memory of a view."""

    __slots__ = ("address", "faults", "forked", "mapping", "offset", "size", "token")

    address: int
    faults: int
    forked: bool
    mapping: _Mapping
    offset: int
    size: int
    token: Any


class Views:
    """What this process sees of the memory of others. One thread at a time."""

    def __init__(self) -> None:
        self._mappings: dict[str, _Mapping] = {}  # those without a view: the latest is the last
        self._maps: list[weakref.ref[mmap.mmap]] = []  # some are gone; what is alone is not here
        self._leases: dict[int, _Lease] = {}
        self._gone: deque[_Lease] = deque()
        _all.add(self)

    def __len__(self) -> int:
        """How many views there are that were not collected."""
        return len(self._leases)

    @property
    def ended(self) -> bool:
        """Whether there is something to collect."""
        return bool(self._gone)

    def view(
        self, path: str, offset: int, size: int, token: Any, *, alone: bool = False
    ) -> memoryview:
        """Return `size` bytes of a file from `offset` on: writable, and private to this process.

        Args:
            path: of the file.
            offset: where they begin: at the beginning of a page, no byte of which is in another
                view.
            size: at least 1.
            token: `collect` returns it when the view is over.
            alone: with a mapping of its own, so that the same bytes can be viewed several times
                without one seeing what was written into another. It costs a file descriptor
                before Python 3.13.

        Raises:
            OSError: there is no such file, it cannot be mapped, or too many files are.
            ValueError: the file is shorter, or the offset is not that of a page.
        """
        if offset % PAGE:
            raise ValueError(f"a view begins with a page, and {offset} is no multiple of {PAGE}")
        mapping = _Mapping(path) if alone else self._mapping(path)
        import ctypes  # here, for a process without large data does not need it

        # It is what exports the memory: exactly these bytes, and it can be referred to weakly.
        exporter = _array_type(size).from_buffer(mapping.memory, offset)
        lease = _Lease(exporter, self._gone.append)
        lease.address, lease.faults = ctypes.addressof(exporter), _faults()
        lease.forked = False
        lease.mapping, lease.offset, lease.size, lease.token = mapping, offset, size, token
        mapping.views += 1
        self._leases[id(lease)] = lease
        return memoryview(exporter).cast("B")

    def _mapping(self, path: str) -> _Mapping:
        mapping = self._mappings.pop(path, None)
        if mapping is None:
            mapping = self._new(path)
        if _DROPS:
            self._mappings[path] = mapping
        return mapping

    def _new(self, path: str) -> _Mapping:
        most = _most_maps()
        if len(self._maps) >= most:
            self._limit(0)
            self._maps = [ref for ref in self._maps if ref() is not None]
            if len(self._maps) >= most:
                raise OSError(errno.EMFILE, "too many files with views", path)
        mapping = _Mapping(path)
        self._maps.append(weakref.ref(mapping.memory))
        return mapping

    def collect(self) -> list[Ended]:
        """Return the views that are over and were not returned yet; drop what they changed."""
        ended: list[Ended] = []
        if not self._gone:
            return ended
        with contextlib.ExitStack() as stack:
            pages = -1
            if _DROPS:
                with contextlib.suppress(OSError):
                    pages = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
                    stack.callback(os.close, pages)
            while self._gone:
                lease = self._gone.popleft()
                if self._leases.pop(id(lease), None) is None:
                    continue  # it was forgotten
                mapping = lease.mapping
                mapping.views -= 1
                if self._mappings.get(mapping.path) is mapping:
                    if lease.forked and not mapping.views:
                        del self._mappings[mapping.path]
                    # To write to a page for the first time is a fault, but not all systems count.
                    elif not lease.faults or lease.faults != _faults():
                        self._drop(lease, pages)
                ended.append(Ended(lease.token, lease.forked))
        self._limit(_IDLE_MAPS)
        return ended

    def _drop(self, lease: _Lease, pages: int) -> None:
        """Drop what was written into a view that is over."""
        mapping = lease.mapping
        try:
            for start, size in _written(pages, lease.address, lease.size):
                mapping.memory.madvise(mmap.MADV_DONTNEED, lease.offset + start, size)
        except OSError:  # its pages are locked, by mlockall perhaps: nobody shall see them again
            del self._mappings[mapping.path]

    def _limit(self, most: int) -> None:
        """Let go of mappings without a view that were not used for the longest time."""
        if len(self._mappings) > most:
            idle = [path for path, mapping in self._mappings.items() if not mapping.views]
            for path in idle[: max(0, len(idle) - most)]:
                del self._mappings[path]

    def forget(self, path: str) -> None:
        """Nobody wants to hear any more of this file, or of those in this folder.

        No mapping is kept of it. Views stay.
        """

        def is_meant(its: str) -> bool:
            return its == path or os.path.dirname(its) == path

        self._mappings = {its: at for its, at in self._mappings.items() if not is_meant(its)}
        leases = list(self._leases.values())
        self._leases = {id(lease): lease for lease in leases if not is_meant(lease.mapping.path)}
        for _ in range(len(self._gone)):  # which may grow meanwhile
            lease = self._gone.popleft()
            if id(lease) in self._leases:
                self._gone.append(lease)

    def close(self) -> None:
        """Forget all files."""
        self._mappings.clear()
        self._leases.clear()
        self._gone.clear()

    def _fork_comes(self) -> None:
        for lease in list(self._leases.values()):
            lease.forked = True

    def _forked(self) -> None:
        """In the child: what it sees was lent to its parent, who will give it back."""
        self._leases.clear()
        self._gone.clear()
        self._mappings.clear()


def _most_maps() -> int:
    """Return how many mappings there may be: descriptors are needed for other things as well."""
    if _UNTRACKED:
        return _MOST_MAPS
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_MAPS if soft == resource.RLIM_INFINITY else min(_MOST_MAPS, soft // 4)


@functools.lru_cache(maxsize=64)
def _array_type(size: int) -> Any:
    import ctypes

    return ctypes.c_char * size


def _faults() -> int:
    """Return how often this process has touched a page that was not there as it wanted it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


_SCAN = 0xC0606610  # PAGEMAP_SCAN, an ioctl since Linux 6.7: takes a third of the time
_SCAN_ARGS = struct.Struct("=12Q")
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4  # what it says of pages
_RANGES = 256  # that it returns at the most


def _written(pages: int, address: int, size: int) -> list[tuple[int, int]]:
    """Return which parts of the memory are copies of our own by now, by their start and size.

    When in doubt, all of it is.

    Args:
        pages: a descriptor of /proc/self/pagemap, -1 if that cannot be read.
        address: where it begins.
        size: of it.
    """
    whole = -(-size // PAGE) * PAGE
    if pages < 0:
        return [(0, whole)]
    try:
        found = _scan(pages, address, whole)
    except OSError:
        return [(0, whole)] if _was_written(pages, address, size) else []
    return [(0, whole)] if len(found) == _RANGES else found


def _scan(pages: int, address: int, size: int) -> list[tuple[int, int]]:
    """As `_written`, for whole pages, and at most `_RANGES`; OSError if the system cannot."""
    ranges = array.array("Q", bytes(24 * _RANGES))
    # Pages that are in memory or swapped out, and not the file's.
    wanted = (_FILE, _FILE, _PRESENT | _SWAPPED, _FILE | _PRESENT | _SWAPPED)
    out = ranges.buffer_info()[0]
    head = (_SCAN_ARGS.size, 0, address, address + size, 0, out, _RANGES, 0)
    fcntl.ioctl(pages, _SCAN, _SCAN_ARGS.pack(*head, *wanted))
    found = []
    for at in range(0, 3 * _RANGES, 3):
        start, stop = ranges[at], ranges[at + 1]
        if not stop:
            break
        found.append((start - address, stop - start))
    return found


def _was_written(pages: int, address: int, size: int) -> bool:
    """Whether some of the memory is a copy of our own by now; when in doubt, it is."""
    count = -(-size // PAGE)
    try:
        entries = os.pread(pages, 8 * count, address // PAGE * 8)
    except OSError:
        return True
    tops = entries[7::8] if sys.byteorder == "little" else entries[::8]
    return len(tops) != count or bool(tops.translate(None, _NOT_OURS))


_all: weakref.WeakSet[Views] = weakref.WeakSet()


def _before_fork() -> None:
    for views in list(_all):
        views._fork_comes()


def _after_fork() -> None:
    for views in list(_all):
        views._forked()


# Twice in the parent: a thread may make a view in between.
os.register_at_fork(before=_before_fork, after_in_parent=_before_fork, after_in_child=_after_fork)
