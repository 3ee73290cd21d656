"""The folders of sessions: how they are made, held, and removed, however their session ends.

    make ─► the session's folder: secret, sockets, entries for shared memory ─┐
    hold_memory ─► its folder for shared memory, in memory                   ─┴─► remove

The master holds a lock on its secret; when that can be had, the session has ended. Then its agent
removes the folders. A session that has shared memory and no agent has a *janitor* instead: this
file, run as a program, that waits for the lock. What is left when they were killed too, the next
session's agent sweeps up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys

__all__ = [
    "Janitor",
    "hold",
    "hold_memory",
    "is_abandoned",
    "lives",
    "make",
    "memory_folder",
    "remove",
    "sweep",
]

SECRET_FILE = "secret"
SESSION_LINK = "session"  # in a session's folder for shared memory: where its own folder is
ENTRY = "shm:"  # begins the names of a session's entries for shared memory outside its folders
LENT = ".lent"  # ends the names of folders with memory that a process lends; see `wire.arena`
_PREFIX = f"fiber-{os.getuid()}-"
_MEMORY = "/dev/shm"  # not on macOS, where files have to do
_IDENTITY = 4  # random bytes by which sessions, and places of one, are told from each other
_MAX_PATH = 104  # of a Unix socket: 108 on Linux, 104 on macOS, with the final zero


def memory_folder(folder: str) -> str:
    """Return where a session whose folder is `folder` has its shared memory."""
    if os.path.isdir(_MEMORY):
        return os.path.join(_MEMORY, os.path.basename(folder))
    return folder


def make(secret: bytes, session: str = "") -> tuple[str, int]:
    """Make a folder of a session; return it and a descriptor, locked while its maker lives.

    Args:
        secret: of the session.
        session: its identity, for a place of it on another host; empty for a new session.
    """
    import tempfile  # not needed to import Fiber, and slow

    base = tempfile.gettempdir()
    if len(os.path.join(base, f"{_PREFIX}4194304-0123456789abcdef", "4194304.sock")) > _MAX_PATH:
        base = "/tmp"
    # It gets its name when it is locked: until then `sweep` would take it for abandoned.
    new = tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=base)
    fd = os.open(os.path.join(new, SECRET_FILE), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.write(fd, secret)
    folder = os.path.join(base, f"{_PREFIX}{os.getpid()}-{session}{os.urandom(_IDENTITY).hex()}")
    os.rename(new, folder)
    return folder, fd


def session_of(folder: str) -> str:
    """Return the identity of the session that a folder belongs to; all its places have the same."""
    return os.path.basename(folder).rpartition("-")[2][: 2 * _IDENTITY]


def is_place(folder: str) -> bool:
    """Whether it is called as folders of sessions are, on whatever host."""
    return os.path.basename(folder).startswith("fiber-")


def master(folder: str) -> int:
    """Return the process ID of the master, who made the session's folder."""
    return int(os.path.basename(folder).removeprefix(_PREFIX).partition("-")[0])


def hold(path: str) -> int:
    """Return a descriptor of a folder for shared memory: while it is open, nobody sweeps that.

    Raises:
        FileNotFoundError: there is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        about = os.fstat(fd)
        if about.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "the folder belongs to somebody else", path)
        if not os.path.samestat(about, os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def hold_memory(folder: str) -> int:
    """Make the folder for shared memory of the session in `folder`, if need be, and hold it.

    Raises:
        OSError: there is none, and there cannot be one.
    """
    path = memory_folder(folder)
    if path == folder:
        return hold(folder)
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        try:
            fd = hold(path)
        except FileNotFoundError:
            continue  # it was swept in that moment
        with contextlib.suppress(FileExistsError):
            os.symlink(folder, os.path.join(path, SESSION_LINK))
        if os.path.isdir(folder):
            return fd
        os.close(fd)
        remove(path)  # who ended the session just now will not look here again
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)


def remove(folder: str) -> None:
    """Remove a session's folder and its shared memory."""
    for place in dict.fromkeys((folder, memory_folder(folder))):
        for _ in range(10):  # processes that are just being killed may still add to it
            try:
                for name in os.listdir(place):
                    _remove_file(place, name)
                os.rmdir(place)
            except FileNotFoundError:
                break
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise


def _remove_file(folder: str, name: str) -> None:
    path = os.path.join(folder, name)
    if name.startswith(ENTRY):
        with contextlib.suppress(OSError):
            _remove_shared_memory(name.removeprefix(ENTRY), int(os.readlink(path)))
    with contextlib.suppress(FileNotFoundError):
        if name.endswith(LENT):
            for inner in os.listdir(path):
                _remove_file(path, inner)
            os.rmdir(path)
        else:
            os.unlink(path)


def _remove_shared_memory(name: str, inode: int) -> None:
    """Unlink POSIX shared memory, unless somebody has made another of that name since."""
    import _posixshmem  # type: ignore[import-not-found]

    fd = _posixshmem.shm_open(f"/{name}", os.O_RDONLY, mode=0)
    try:
        same = os.fstat(fd).st_ino == inode
    finally:
        os.close(fd)
    if same:
        _posixshmem.shm_unlink(f"/{name}")


def sweep() -> None:
    """Remove what sessions of this user left behind when master and agent were killed."""
    import tempfile

    for base in {tempfile.gettempdir(), "/tmp", _MEMORY}:
        names: list[str] = []
        with contextlib.suppress(OSError):  # it may be for writing only
            names = os.listdir(base)
        for name in names:
            if name.startswith(_PREFIX):
                folder = os.path.join(base, name)
                with contextlib.suppress(OSError):
                    if base == _MEMORY and not os.path.exists(os.path.join(folder, SECRET_FILE)):
                        _sweep_memory(folder)
                    elif is_abandoned(folder):
                        remove(folder)


def _sweep_memory(path: str) -> None:
    """Remove a folder for shared memory, unless it is held or its session is still there.

    Programs that share their memory, such as those of two containers, need not see each other's
    files: that there is no session to be seen would not do.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = ""  # who made it was killed in that moment, or is about to find it gone
        with contextlib.suppress(FileNotFoundError):
            folder = os.readlink(os.path.join(path, SESSION_LINK))
        if not os.path.isdir(folder) or is_abandoned(folder):
            remove(path)
    finally:
        os.close(fd)


def is_abandoned(folder: str) -> bool:
    """Whether no master holds the lock of the session in `folder`."""
    try:
        about = os.lstat(folder)
    except FileNotFoundError:
        return False
    # In a folder that all may write to, somebody else could have put a link of that name.
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        return False
    try:
        fd = os.open(os.path.join(folder, SECRET_FILE), os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def lives(pid: int) -> bool:
    """Whether there is a process with this ID."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Janitor:
    """A process that removes the folders of a session whose master was killed.

    Args:
        folder: of the session, which this process is the master of.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, folder: str) -> None:
        import subprocess

        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), folder]
        null = subprocess.DEVNULL
        # In a session of its own, that of Unix: a signal to the program's group is not for it.
        self._process = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True
        )

    def dismiss(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """After `os.fork`, in the child: it is the parent's."""
        self._process.returncode = 0  # or there would be a warning that it still runs


def _main(folder: str) -> None:
    import signal

    # Slurm sends it to all that is in a job: then this is the one who has something to do.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        fd = os.open(os.path.join(folder, SECRET_FILE), os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:  # the session ended meanwhile
        return
    fcntl.flock(fd, fcntl.LOCK_EX)
    remove(folder)


if __name__ == "__main__":
    _main(*sys.argv[1:])
