"""Shared memory by name, as `multiprocessing.shared_memory`'s and together with it.

A block has the name that it was given, so that programs of multiprocessing find it too. No resource
tracker knows of it: the session has an entry for it, until it is unlinked. What nobody has unlinked
when the session ends, however it ends, goes with it. The end of a process that only attached to a
block costs nobody anything.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import types
from multiprocessing import shared_memory as _mp
from typing import TYPE_CHECKING, Any

from fiber.heap import reserve
from fiber.runtime import folders, session

__all__ = ["ShareableList", "SharedMemory"]

_USE_POSIX = True
_posixshmem: Any = _mp._posixshmem  # type: ignore[attr-defined]
_SHM_NAME_PREFIX: str = _mp._SHM_NAME_PREFIX  # type: ignore[attr-defined]
_make_filename: Any = _mp._make_filename  # type: ignore[attr-defined]


class SharedMemory(_mp.SharedMemory):
    """As `multiprocessing.shared_memory.SharedMemory`.

    Args:
        name: of the block; None to make one of a new name.
        create: whether to make it.
        size: in bytes, of one that is made.
        track: whether it shall go with the session at the latest.

    Raises:
        FileExistsError: there is one of that name.
        FileNotFoundError: there is none of that name, here at least.
        OSError: there is no room for it.
    """

    _flags: int = os.O_RDWR
    _mode: int = 0o600
    _prepend_leading_slash: bool = True

    if TYPE_CHECKING:  # what its stub does not tell
        _name: str
        _fd: int
        _mmap: mmap.mmap | None
        _buf: memoryview | None
        _size: int

    def __init__(
        self, name: str | None = None, create: bool = False, size: int = 0, *, track: bool = True
    ) -> None:
        if not size >= 0:
            raise ValueError("'size' must be a positive integer")
        if create:
            self._flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
            if size == 0:
                raise ValueError("'size' must be a positive number different from zero")
        if name is None and not self._flags & os.O_EXCL:
            raise ValueError("'name' can only be None if create=True")
        self._track = track
        folder = session.folder() if create and track else None
        self._open(name)
        try:
            if create:
                if folder is not None:
                    session.keep_clean()
                    self._enter(folder)
                self._reserve(size)
            self._size = os.fstat(self._fd).st_size
            self._mmap = mmap.mmap(self._fd, self._size)
        except BaseException:
            if create:
                self.unlink()
            os.close(self._fd)
            self._fd = -1
            raise
        self._buf = memoryview(self._mmap)

    def _open(self, name: str | None) -> None:
        while name is None:
            new = _make_filename()
            try:
                self._fd = _posixshmem.shm_open(new, self._flags, mode=self._mode)
            except FileExistsError:
                continue
            self._name = new
            return
        path = "/" + name if self._prepend_leading_slash else name
        try:
            self._fd = _posixshmem.shm_open(path, self._flags, mode=self._mode)
        except FileNotFoundError:
            if not session.host():
                raise
            raise FileNotFoundError(
                errno.ENOENT,
                f"there is no shared memory {name!r} here: a block that was made in another "
                "container or on another machine cannot be used; send its bytes, or use an Array",
            ) from None
        self._name = path

    def _enter(self, folder: str) -> None:
        """Have the session in `folder` unlink the block at its end, if nobody has by then."""
        entry = os.path.join(folder, self._entry())
        with contextlib.suppress(FileNotFoundError):  # of one that somebody else has unlinked
            os.unlink(entry)
        os.symlink(str(os.fstat(self._fd).st_ino), entry)

    def _entry(self) -> str:
        return folders.ENTRY + self._name.removeprefix("/")

    def _reserve(self, size: int) -> None:
        try:
            reserve(self._fd, size)
        except OSError as error:
            raise OSError(
                error.errno or errno.ENOSPC,
                f"cannot get {size:,} bytes of shared memory: {error.strerror}",
            ) from None

    def __del__(self) -> None:
        try:
            self.close()
        except OSError:
            pass
        except BufferError:  # somebody still uses its memory, which then goes with that
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def unlink(self) -> None:
        """Remove the block; it is freed when no process has it mapped any more.

        Raises:
            FileNotFoundError: somebody has done that already.
        """
        _posixshmem.shm_unlink(self._name)
        for folder in session.known_folders():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, self._entry()))


if TYPE_CHECKING:
    _List = _mp.ShareableList[Any]
else:
    _List = _mp.ShareableList


class ShareableList(_List):
    """As `multiprocessing.shared_memory.ShareableList`, in a `SharedMemory` of Fiber's.

    Args:
        sequence: its items: int, float, bool, str, bytes or None; it keeps its length.
        name: of its memory; without a sequence, of the list to attach to.
    """

    def __init__(self, sequence: Any = None, *, name: str | None = None) -> None:
        _init_list(self, sequence, name=name)


_original: Any = _mp.ShareableList.__init__
# The same function, that finds our SharedMemory where it looks for multiprocessing's.
_init_list = types.FunctionType(
    _original.__code__, {**vars(_mp), "SharedMemory": SharedMemory}, _original.__name__
)
_init_list.__defaults__ = _original.__defaults__
_init_list.__kwdefaults__ = _original.__kwdefaults__
