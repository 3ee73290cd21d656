"""Snapshots: an object as it was when it was pickled, in memory that all of a place share.

    Packed ─► write ─► a file of the place: head │ pickle │ buffers ─► Mapping, in each process
                                ▲
    in another place ─► Copy ───┘  the first that needs it fetches it, the others wait for that

A file is in the session's folder in memory. That of the process whose snapshot it is has the ID of
that process in its name. A copy in another place is nobody's: each process that has it holds a
shared lock on it, and the last one to let go removes it. What killed processes have left shows by
that, and is swept up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from fiber.config import config
from fiber.runtime import folders
from fiber.wire.framing import Buffer
from fiber.wire.pickling import Packed

__all__ = ["LEAST", "Copy", "Snapshot", "parts", "sweep"]

LEAST = 1 << 16
"""Bytes: what is smaller is not worth a file."""

_HEAD = struct.Struct("!8sQ")  # a mark that it is whole, and how many parts it has
_WHOLE = b"snapshot"
_ALIGN = 64  # bytes; arrays are used where they lie
_CHUNK = 1 << 24  # bytes that are fetched at a time
_PATIENCE = 20.0  # seconds that another may take to fetch a chunk
_LOOK_AGAIN = 0.002  # seconds, at first, until we see whether it is done
_SWEEP_SECONDS = 1.0  # between looks for what is left
_NAME = re.compile(r"(?:(\d+)-)?[0-9a-f]{16}\.(snapshot|copy)")


def _layout(sizes: Sequence[int]) -> tuple[bytes, list[int], int]:
    """Return the head for parts of these sizes, where each begins, and the size of it all."""
    head = _HEAD.pack(_WHOLE, len(sizes)) + struct.pack(f"!{len(sizes)}Q", *sizes)
    at, starts = len(head), []
    for size in sizes:
        at += -at % _ALIGN
        starts.append(at)
        at += size
    return head, starts, at


def parts(whole: memoryview) -> list[memoryview]:
    """Return the pickle and its buffers, which are in `whole`."""
    _, count = _HEAD.unpack_from(whole)
    sizes = struct.unpack_from(f"!{count}Q", whole, _HEAD.size)
    _, starts, _ = _layout(sizes)
    return [whole[at : at + size] for at, size in zip(starts, sizes, strict=True)]


class Snapshot:
    """What this process has pickled.

    Args:
        packed: the object.
        folder: returns the folder for the file, made at its first call.

    Attributes:
        path: of the file; "" if it is small, or there is no room for one: then its bytes are here.
        size: in bytes.
    """

    def __init__(self, packed: Packed, folder: Callable[[], str]) -> None:
        pieces: list[Buffer] = [packed.data, *packed.buffers]
        head, starts, self.size = _layout([len(piece) for piece in pieces])
        pieces, starts = [head, *pieces], [0, *starts]
        self.path = ""
        self._memory: memoryview | None = None
        if self.size >= LEAST:
            with contextlib.suppress(OSError):
                _check_limit(self.size)
                self.path = _write(folder(), pieces, starts, self.size)
                _files[self.path] = self.size
                return
        memory = memoryview(bytearray(self.size))
        for at, piece in zip(starts, pieces, strict=True):
            memory[at : at + len(piece)] = piece
        self._memory = memory.toreadonly()

    @property
    def memory(self) -> memoryview:
        """All of it."""
        if self._memory is None:
            self._memory = map_file(self.path, self.size)
        return self._memory

    def free(self) -> None:
        """Remove the file; who has it mapped keeps that."""
        self._memory = None
        if self.path:
            _files.pop(self.path, None)
            with contextlib.suppress(OSError):
                os.unlink(self.path)


_files: dict[str, int] = {}  # of this process, and their sizes


def _check_limit(size: int) -> None:
    limit = config.shared_memory_mb
    if limit is not None and sum(_files.values()) + size > limit << 20:
        raise OSError(errno.ENOSPC, "so much memory may not be shared")


def _write(folder: str, pieces: Sequence[Buffer], starts: Sequence[int], size: int) -> str:
    sweep_now_and_then(folder)
    path = os.path.join(folder, f"{os.getpid()}-{os.urandom(8).hex()}.snapshot")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _check_room(fd, size)
        # By system calls, which say when there is no room: a mapping would end us by SIGBUS.
        for at, piece in zip(starts, pieces, strict=True):
            write_at(fd, piece, at)
        os.ftruncate(fd, size)  # if the last part is empty
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
    return path


def _check_room(fd: int, size: int) -> None:
    about = os.fstatvfs(fd)
    if about.f_blocks and about.f_bavail * about.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_at(fd: int, piece: Buffer, at: int) -> None:
    """Write all of `piece` into a file, from byte `at` on."""
    rest = memoryview(piece)
    while len(rest):
        written = os.pwrite(fd, rest, at)
        at += written
        rest = rest[written:]


def map_file(path: str, size: int) -> memoryview:
    """Return the bytes of a file, which cannot be written; raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return map_fd(fd, size)
    finally:
        os.close(fd)


def map_fd(fd: int, size: int) -> memoryview:
    """As `map_file`."""
    if sys.version_info >= (3, 13):
        return memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_READ, trackfd=False))
    return memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_READ))


class Copy:
    """A snapshot of a process in another place, as the processes of this place share it.

    Args:
        folder: for files of this place.
        key: of the snapshot, nowhere twice.
        size: in bytes.
        read: returns the bytes from here to there; raises what the caller shall get.

    Raises:
        OSError: there is no room, or who was to fetch it makes no progress.
    """

    def __init__(
        self, folder: str, key: str, size: int, read: Callable[[int, int], Buffer]
    ) -> None:
        self._fd = -1
        _check_limit(size)
        sweep_now_and_then(folder)
        self.path = os.path.join(folder, f"{key}.copy")
        self._pid = os.getpid()
        self._fd = self._lock(size, read)
        try:
            self.memory = map_fd(self._fd, size)
        except BaseException:
            self.let_go()
            raise

    def _lock(self, size: int, read: Callable[[int, int], Buffer]) -> int:
        """Return the file, whole, with a shared lock."""
        pauses = self._pauses()
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if _try_lock(fd, fcntl.LOCK_SH) and _is_at(fd, self.path):
                    if _is_whole(fd):
                        return fd
                    if _try_lock(fd, fcntl.LOCK_EX) and _is_at(fd, self.path):
                        self._fill(fd, size, read)
                        fcntl.flock(fd, fcntl.LOCK_SH)
                        if _is_at(fd, self.path):  # in between it is nobody's
                            return fd
                os.close(fd)
            except BaseException:
                os.close(fd)
                raise
            time.sleep(next(pauses))

    def _pauses(self) -> Iterator[float]:
        """Yield seconds to wait for who fetches it, as long as that goes on."""
        seen, until, pause = -1.0, time.monotonic() + _PATIENCE, _LOOK_AGAIN
        while True:
            with contextlib.suppress(OSError):
                changed = os.stat(self.path).st_mtime
                if changed != seen:
                    seen, until = changed, time.monotonic() + _PATIENCE
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, "who fetches the object makes no progress")
            yield pause
            pause = min(2 * pause, 0.05)

    def _fill(self, fd: int, size: int, read: Callable[[int, int], Buffer]) -> None:
        try:
            _check_room(fd, size)
            first = b""
            for at in range(0, size, _CHUNK):
                piece = read(at, min(at + _CHUNK, size))
                if at == 0:  # its mark comes last
                    first = bytes(piece[: len(_WHOLE)])
                    piece = memoryview(piece)[len(_WHOLE) :]
                    at = len(_WHOLE)
                write_at(fd, piece, at)
            write_at(fd, first, 0)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            raise

    def let_go(self) -> None:
        """This process needs it no more; the last one removes it."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if os.getpid() == self._pid:  # a fork shares the lock
            with contextlib.suppress(OSError):
                if _try_lock(fd, fcntl.LOCK_EX) and _is_at(fd, self.path):
                    os.unlink(self.path)
        os.close(fd)

    def __del__(self) -> None:
        self.let_go()


def _try_lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: str) -> bool:
    """Whether the file has not been removed."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _is_whole(fd: int) -> bool:
    return os.pread(fd, len(_WHOLE), 0) == _WHOLE


_swept: dict[str, float] = {}


def sweep_now_and_then(folder: str) -> None:
    """As `sweep`, if that was not done just now."""
    now = time.monotonic()
    if now > _swept.get(folder, 0.0) + _SWEEP_SECONDS:
        _swept[folder] = now
        sweep(folder)


def sweep(folder: str) -> None:
    """Remove what killed processes have left in the folder of a place."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            match = _NAME.fullmatch(name)
            if match is not None:
                with contextlib.suppress(OSError):
                    _sweep(os.path.join(folder, name), match[1])


def _sweep(path: str, owner: str | None) -> None:
    if owner is not None:
        if not folders.lives(int(owner)):
            os.unlink(path)
        return
    fd = os.open(path, os.O_RDWR)
    try:
        if _try_lock(fd, fcntl.LOCK_EX) and _is_at(fd, path):
            os.unlink(path)
    finally:
        os.close(fd)


def _forget_after_fork() -> None:
    _files.clear()  # they are the parent's


os.register_at_fork(after_in_child=_forget_after_fork)
