"""Which batch each worker is at, in memory that it shares with the pool's master.

    worker: mark, run an item, unmark, report        master, when the worker has died: was it at it?

A worker that is killed by something else than its item tells nobody how far it was; often it had
the item's result, or had not begun, and waited for a processor. The item is not to blame then. So,
from the first death on, workers that run items one by one mark when they do.
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["IDLE", "Marks", "map_mark"]

IDLE = 1 << 63
"""The mark of a worker that is at no batch; 0 is that of one which does not mark."""

_SIZE = 1 << 16  # bytes
_BYTES = 8  # of a mark


class Marks:
    """The master's side.

    Args:
        folder: of the session.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, folder: str) -> None:
        import mmap  # not needed to import Fiber

        self.path = os.path.join(folder, f"{os.getpid()}-{os.urandom(4).hex()}.marks")
        with open(self.path, "x+b") as file:
            file.truncate(_SIZE)
            self._marks = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("Q")
        self._free = list(range(len(self._marks)))

    def take(self) -> int | None:
        """Return the place of a mark that nobody uses, None if there is none."""
        return self._free.pop() if self._free else None

    def read(self, place: int) -> int:
        """Return the batch that is marked there, `IDLE`, or 0."""
        return self._marks[place]

    def give_back(self, place: int) -> None:
        """Whoever used it has ended."""
        self._marks[place] = 0
        self._free.append(place)

    def close(self) -> None:
        """Nobody needs them any more."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)


def map_mark(path: str, place: int) -> memoryview:
    """Return, in a worker, its mark as the only item of a sequence."""
    import mmap

    with open(path, "r+b") as file:
        mark = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("Q")[place : place + 1]
    mark[0] = IDLE
    return mark
