"""`SharedMemoryManager`: a manager that unlinks shared memory when it is shut down."""

from __future__ import annotations

import contextlib
from multiprocessing import managers as _mp
from typing import Any

from fiber import shared_memory
from fiber.managers.base import BaseManager
from fiber.managers.server import Server

__all__ = ["SharedMemoryManager", "SharedMemoryServer"]


class SharedMemoryServer(Server):
    """As `multiprocessing.managers.SharedMemoryServer`."""

    public = [*Server.public, "track_segment", "release_segment", "list_segments"]  # noqa: RUF012

    def __init__(
        self, registry: dict[str, Any], address: Any, authkey: bytes, serializer: str
    ) -> None:
        super().__init__(registry, address, authkey, serializer)
        self._names: list[str] = []

    def track_segment(self, c: Any, segment_name: str) -> None:
        """Take charge of a block."""
        self._names.append(segment_name)

    def release_segment(self, c: Any, segment_name: str) -> None:
        """Unlink a block."""
        self._names.remove(segment_name)
        block = shared_memory.SharedMemory(segment_name)
        block.close()
        block.unlink()

    def list_segments(self, c: Any) -> list[str]:
        """Return the names of the blocks in its charge."""
        return self._names

    def shutdown(self, c: Any) -> None:
        """Unlink all blocks, and end."""
        for name in list(self._names):
            with contextlib.suppress(FileNotFoundError):  # its user has done that
                self.release_segment(c, name)
        super().shutdown(c)


class SharedMemoryManager(BaseManager, _mp.SharedMemoryManager):
    """As `multiprocessing.managers.SharedMemoryManager`.

    What it makes is unlinked when it is shut down; should its process be killed, when the session
    ends.
    """

    _Server = SharedMemoryServer

    def SharedMemory(self, size: int) -> shared_memory.SharedMemory:
        """Return a new block of shared memory.

        Args:
            size: in bytes.
        """
        block = shared_memory.SharedMemory(create=True, size=size)
        self._track(block)
        return block

    def ShareableList(self, sequence: Any) -> shared_memory.ShareableList:
        """Return a new list in shared memory.

        Args:
            sequence: its items: int, float, bool, str, bytes or None; it keeps its length.
        """
        made = shared_memory.ShareableList(sequence)
        self._track(made.shm)  # type: ignore[arg-type]
        return made

    def _track(self, block: shared_memory.SharedMemory) -> None:
        try:
            self._server().ask("track_segment", (block.name,))
        except BaseException:
            block.unlink()
            raise
