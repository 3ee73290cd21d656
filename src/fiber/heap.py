"""Memory that the processes of one host share, handed out in blocks.

    RawValue, RawArray ─► BufferWrapper ─► Heap ─► Arena ─► a file of the session, mapped
                               │                                   ▲
                               └─ pickled ─► map_arena, elsewhere ─┘ or, out of its sight, Unmapped

An arena is a file: in the session's folder in memory, where there is room for it, else in the one
on disk. Values and arrays are blocks of it, and travel as the file's name and their place in it.

Who needs an arena has a name for it, and nobody counts: the file has one hard link for each process
that has it mapped, and one, a *ticket*, for each pickle of it under way, which whoever unpickles it
makes its own. With the last of them the kernel frees the file, once it is mapped nowhere. Names of
processes that died, and tickets of pickles that were lost, are removed now and then; what is left
goes with the session.

A block that was pickled may be in use elsewhere when it is freed here. So it is not handed out
again; its arena goes when none of its blocks is in use any more.

A process that does not see the file, because it is in another container or on another host, gets an
`Unmapped` instead. `sharedctypes` makes do with it where there is a lock: `Arena.ref` is for that.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import mmap
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing import heap as _mp_heap
from multiprocessing import util
from typing import Any

from fiber.runtime import folders, session
from fiber.runtime.refs import Ref, lookup
from fiber.served.memory import ServedMemory

__all__ = ["Arena", "BufferWrapper", "Heap", "Unmapped", "map_arena", "reserve"]

_LARGE = 1 << 20
"""Bytes; a block of that size has an arena of its own, which goes as soon as it is freed."""

_LEASE = 60.0  # seconds that a ticket is kept for whoever unpickles it
_SWEEP_SECONDS = 5.0  # between looks for names that nobody needs

_NAME = re.compile(r"[0-9a-f]{16}\.(held|ticket)-(\d+)-[0-9a-f]{8}")


class Place:
    """A folder with arenas, held while this process uses any, so that nobody sweeps it.

    Args:
        path: of the folder.
        hold: as `folders.hold` returns it.
    """

    def __init__(self, path: str, hold: int) -> None:
        self.path = path
        self._swept = -math.inf
        weakref.finalize(self, os.close, hold).atexit = False
        _places[path] = self

    def sweep(self) -> None:
        """Remove, now and then, names that killed processes have left, and old tickets."""
        now = time.monotonic()
        if now < self._swept + _SWEEP_SECONDS:
            return
        self._swept = now
        lives: dict[int, bool] = {}
        for name in os.listdir(self.path):
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            number = int(match[2])
            if match[1] == "ticket":
                needed = number > now
            else:
                if number not in lives:
                    lives[number] = folders.lives(number)
                needed = lives[number]
            if not needed:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.path, name))


_places: weakref.WeakValueDictionary[str, Place] = weakref.WeakValueDictionary()


def _place(path: str) -> Place:
    return _places.get(path) or Place(path, folders.hold(path))


def _places_for(folder: str) -> Iterator[Place]:
    """Yield where arenas of the session in `folder` may be: in memory, in that folder."""
    path = folders.memory_folder(folder)
    if path != folder:
        with contextlib.suppress(OSError):  # there cannot be one
            yield _places.get(path) or Place(path, folders.hold_memory(folder))
    yield _place(folder)


class Arena:
    """A file, mapped into this process; there is one `Arena` for each that is.

    Attributes:
        size: in bytes.
        buffer: the memory itself.
        lent: where blocks begin that were pickled.
        untouched: whether all of it is still zero, because no block of it was handed out yet.
    """

    def __init__(self, place: Place, key: str, name: str, fd: int, size: int) -> None:
        self.size = size
        self.lent: set[int] = set()
        self.untouched = False
        if sys.version_info >= (3, 13):
            self.buffer = mmap.mmap(fd, size, trackfd=False)
        else:
            self.buffer = mmap.mmap(fd, size)
        self._place = place
        self._key = key  # what all names of the file begin with
        self._name = name  # this process's
        self._ref: Ref | None = None
        path = os.path.join(place.path, name)
        self.let_go = weakref.finalize(self, _let_go, path, os.getpid())
        """Call it to give up this process's name for the file."""
        self.let_go.atexit = False  # see `_at_exit`
        _arenas[key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        ticket = _new_name(self._key, "ticket", int(time.monotonic() + _LEASE))
        try:
            self._place.sweep()
            _link(self._place.path, self._key, self._name, ticket)
        except FileNotFoundError:
            raise FileNotFoundError(
                errno.ENOENT,
                "this shared memory can no longer be passed on: its session has ended, or the "
                "process that this one is a fork of has let go of it",
            ) from None
        except OSError:  # too many links
            ticket = self._name
        return map_arena, (self._place.path, self._key, self._name, ticket, self.size)

    def ref(self) -> Ref:
        """Return a reference to it for those who cannot map it; this process will serve them."""
        if self._ref is None:
            part = session.current()
            find = functools.partial(_find, self._place.path, self._key, self._name, self.size)
            with contextlib.nullcontext() if part.loop.held else part.loop:
                served = ServedMemory(part.home, find)
                part.home.add(served)
                address = part.home.endpoint.address
            self._ref = lookup(Ref, address, served.id)
        return self._ref


class Unmapped:
    """An arena that this process cannot map; it can be pickled as well.

    Attributes:
        key: of the arena.
        ticket: the name that was for whoever unpickles it first.
        lent: as an arena's, of no use here.
    """

    def __init__(self, folder: str, key: str, name: str, ticket: str, size: int) -> None:
        self.key = key
        self.ticket = ticket
        self.lent: set[int] = set()
        self._facts = (folder, key, name, name, size)

    def __reduce__(self) -> tuple[Any, ...]:
        return map_arena, self._facts

    def error(self, what: str) -> FileNotFoundError:
        """Return what to raise if nothing but its mapping would do for `what`."""
        text = (
            f"{what} cannot be used here, for its memory is in another container or on another "
            "machine: only a Value or an Array with a lock can"
        )
        if os.path.isdir(self._facts[0]):  # which we may have made ourselves, elsewhere
            text = (
                "the shared memory of this object is gone: when it was unpickled no process had "
                f"kept it, or its session had ended; or else {text}"
            )
        return FileNotFoundError(errno.ENOENT, text)


_arenas: weakref.WeakValueDictionary[str, Arena] = weakref.WeakValueDictionary()
_mapping = threading.RLock()


def _new_name(key: str, kind: str, number: int) -> str:
    """Return a name for an arena: held by the process of that ID, or a ticket until that time."""
    return f"{key}.{kind}-{number}-{os.urandom(4).hex()}"


def _let_go(path: str, pid: int) -> None:
    if os.getpid() == pid:  # not in a fork of it
        with contextlib.suppress(OSError):
            os.unlink(path)


def _link(folder: str, key: str, name: str, new: str) -> None:
    """Give the file `name`, or if that is gone any of the arena `key`, the name `new` as well.

    Raises:
        FileNotFoundError: it has no name any more.
    """
    try:
        os.link(os.path.join(folder, name), os.path.join(folder, new))
        return
    except FileNotFoundError:
        pass
    for name in os.listdir(folder):
        if name.startswith(key):
            with contextlib.suppress(FileNotFoundError):
                os.link(os.path.join(folder, name), os.path.join(folder, new))
                return
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def map_arena(folder: str, key: str, name: str, ticket: str, size: int) -> Arena | Unmapped:
    """Return the arena that was pickled, mapped into this process; once for each process.

    Args:
        folder: where the file is.
        key: of the arena.
        name: that its sender has for it.
        ticket: the name that is for whoever unpickles it first.
        size: in bytes.

    Returns:
        `Unmapped` if this process does not see the file, or nobody has kept it.
    """
    with _mapping:
        arena = _arenas.get(key)
        if arena is not None:
            if ticket != name:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, ticket))
            return arena
        mine = _new_name(key, "held", os.getpid())
        path = os.path.join(folder, mine)
        try:
            place = _place(folder)
            try:
                if ticket == name:
                    raise FileNotFoundError
                os.rename(os.path.join(folder, ticket), path)
            except FileNotFoundError:  # another process has unpickled it before
                _link(folder, key, name, mine)
        except (FileNotFoundError, PermissionError):
            return Unmapped(folder, key, name, ticket, size)
        fd = os.open(path, os.O_RDWR)
        try:
            return Arena(place, key, mine, fd, size)
        finally:
            os.close(fd)


def _find(folder: str, key: str, name: str, size: int, ticket: str) -> Arena:
    """As `map_arena`, for somebody else; `ticket` may be "".

    Raises:
        FileNotFoundError: nobody has kept it.
    """
    arena = map_arena(folder, key, name, ticket or name, size)
    if isinstance(arena, Unmapped):
        raise FileNotFoundError(
            errno.ENOENT,
            "the shared memory of this object is gone: no process had kept it, or its session had "
            "ended",
        )
    return arena


def _make_arena(folder: str, size: int) -> Arena:
    """Make an arena of the session in `folder`.

    Raises:
        OSError: there is no room for it.
    """
    session.keep_clean()
    key = os.urandom(8).hex()
    name = _new_name(key, "held", os.getpid())
    number, problems = errno.ENOENT, []
    for place in _places_for(folder):
        path = os.path.join(place.path, name)
        try:
            place.sweep()
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                reserve(fd, size)
                arena = Arena(place, key, name, fd, size)
            except OSError:
                os.unlink(path)
                raise
            finally:
                os.close(fd)
        except OSError as error:
            number = error.errno or number
            problems.append(f"{error.strerror} in {place.path}")
        else:
            arena.untouched = True
            return arena
    raise OSError(number, f"cannot get {size:,} bytes of shared memory: {'; '.join(problems)}")


def reserve(fd: int, size: int) -> None:
    """Make a file `size` bytes long, all of them really there.

    A file with holes would do, but the first write that finds no room would end the process, by
    SIGBUS.

    Raises:
        OSError: there is no room for it.
    """
    about = os.fstatvfs(fd)
    if about.f_blocks and about.f_bavail * about.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if sys.platform == "darwin":
        os.ftruncate(fd, size)
    else:
        os.posix_fallocate(fd, 0, size)


def _at_exit() -> None:
    for arena in list(_arenas.values()):
        arena.let_go()


def _watch_exit() -> None:
    util.Finalize(None, _at_exit, exitpriority=-200)


def _after_fork() -> None:
    global _mapping
    _mapping = threading.RLock()
    _watch_exit()


_watch_exit()
# A process that an agent forks forgets what is to be done at exit, after it got its arguments.
util.register_after_fork(_watch_exit, lambda watch: watch())
os.register_at_fork(after_in_child=_after_fork)


# Blocks ----------------------------------------------------------------------------------------

_Block = tuple[Arena, int, int]  # the bytes from here to there
_Heap: Any = _mp_heap.Heap  # its stub tells little of it


class Heap(_Heap):  # type: ignore[misc]
    """multiprocessing's, with arenas of ours.

    Attributes:
        folder: of the session whose arenas it makes.
    """

    _DISCARD_FREE_SPACE_LARGER_THAN = 0

    folder = ""

    def _new_arena(self, size: int) -> _Block:
        length = size
        if size < _LARGE:
            length = self._roundup(max(self._size, size), mmap.PAGESIZE)
            if self._size < self._DOUBLE_ARENA_SIZE_UNTIL:
                self._size *= 2
        arena = _make_arena(self.folder, length)
        self._arenas.append(arena)
        return arena, 0, length

    def _malloc(self, size: int) -> Any:
        return super()._malloc(size) if size < _LARGE else self._new_arena(size)

    def _add_free_block(self, block: _Block) -> None:
        arena, start, _ = block
        if start not in arena.lent:
            super()._add_free_block(block)

    def _discard_arena(self, arena: Arena) -> None:
        if arena.lent:
            for block in [b for b in self._start_to_block.values() if b[0] is arena]:
                self._absorb(block)
            del self._allocated_blocks[arena]
            self._arenas.remove(arena)
        else:
            super()._discard_arena(arena)
        if not self._arenas:
            self._size = mmap.PAGESIZE


class BufferWrapper(_mp_heap.BufferWrapper):
    """A block of shared memory; it can be pickled at any time.

    Args:
        size: in bytes.

    Attributes:
        zeroed: whether its bytes are known to be zero.

    Raises:
        OSError: there is no room for it.
    """

    _heap = Heap()

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"Size {size:n} out of range")
        if sys.maxsize <= size:
            raise OverflowError(f"Size {size:n} too large")
        heap = _current_heap()
        block = heap.malloc(size)
        self._state = (block, size)
        util.Finalize(self, heap.free, args=(block,))
        arena: Arena = block[0]
        self.zeroed = arena.untouched
        arena.untouched = False

    @property
    def arena(self) -> Arena | Unmapped:
        """Where it is."""
        arena: Arena | Unmapped = self._state[0][0]
        return arena

    @property
    def place(self) -> tuple[int, int]:
        """Where it begins in its arena, and how many bytes it has."""
        (_, start, _), size = self._state
        return start, size

    def __reduce__(self) -> tuple[Any, ...]:
        (arena, start, stop), size = self._state
        arena.lent.add(start)
        return _rebuild_wrapper, (arena, start, stop, size)


def _rebuild_wrapper(arena: Arena | Unmapped, start: int, stop: int, size: int) -> BufferWrapper:
    wrapper = BufferWrapper.__new__(BufferWrapper)
    wrapper._state = ((arena, start, stop), size)
    wrapper.zeroed = False
    return wrapper


def _current_heap() -> Heap:
    """Return the heap of this process's session."""
    heap = BufferWrapper._heap
    folder = session.folder()
    if heap.folder != folder:
        if heap._arenas:  # in use, by what was made in another session or before a fork
            heap = BufferWrapper._heap = Heap()
        heap.folder = folder
    return heap
