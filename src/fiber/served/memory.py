"""Shared memory, for processes that cannot map it.

    a copy of its bytes, elsewhere ── read, write ──► ServedMemory ─► the file, mapped here

Who is in another container, or on another host, fetches the bytes when it has acquired the lock
that guards them, and sends back what it has changed before it releases it: see `copies`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fiber.runtime.home import Client, Home, Request, Served

__all__ = ["ServedMemory"]


class ServedMemory(Served):
    """An arena of shared memory, kept mapped while another process uses it from here.

    Args:
        home: where it lives.
        find: returns the arena, mapped, or raises FileNotFoundError; called with the ticket of a
            pickle of it, or "".
    """

    def __init__(self, home: Home, find: Callable[[str], Any]) -> None:
        super().__init__(home)
        self._find = find
        self._arena: Any = None

    def do_hold(self, request: Request, ticket: str) -> None:
        """Keep the arena for the caller, who has unpickled it."""
        self._arena = self._find(ticket)
        request.answer()

    def do_read(self, request: Request, start: int, stop: int) -> None:
        """Answer with its bytes from `start` to `stop`, as a buffer."""
        request.answer(None, [self._memory()[start:stop]])

    def do_write(self, request: Request, ranges: Sequence[tuple[int, int]]) -> None:
        """Set the bytes in these ranges to those of the buffer, which follow each other there."""
        memory, data = self._memory(), memoryview(request.buffers[0])
        for start, stop in ranges:
            size = stop - start
            memory[start:stop] = data[:size]
            data = data[size:]
        request.answer()

    def _memory(self) -> memoryview:
        if self._arena is None:
            self._arena = self._find("")
        return memoryview(self._arena.buffer)

    def left(self, client: Client, died: bool) -> None:
        # Our own process has its reference as long as it has the arena: not the other way round.
        if self.users <= {self.home.me}:
            self._arena = None
