"""The items of a batch, as a worker has them.

    BATCH ─► load_items ─┬─ one pickle ──────► items
                         └─ one for a chunk ─► a Group for each item ─► take ─► the item

What came in one pickle is unpickled at once. What did not is unpickled when it is due: a task's
argument is gone when that of the next is made, which may lie in the same memory, and what is given
back never takes any.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fiber.pool.protocol import BatchHead, split
from fiber.wire.framing import Buffer

__all__ = ["Group", "Load", "load_items"]

Load = Callable[[Buffer, Sequence[Buffer]], Any]
"""What unpickles: takes a pickle and its buffers."""


class Group:
    """The items of a chunk; as often in the batch as there are of these."""

    __slots__ = ("_buffers", "_data", "_items", "_load", "_size")

    def __init__(self, data: bytes, buffers: Sequence[Buffer], size: int, load: Load) -> None:
        self._data = data
        self._buffers = buffers
        self._size = size
        self._load = load
        self._items: deque[Any] | None = None

    def take(self) -> Any:
        """Return its next item; raises what their unpickling raises."""
        if self._items is None:
            self._items = _load_all(self._data, self._buffers, self._size, self._load)
            self._data, self._buffers = b"", ()
        return self._items.popleft()


def load_items(head: BatchHead, data: Buffer, buffers: Sequence[Buffer], load: Load) -> deque[Any]:
    """Return what is in a batch: items, or groups of them; raises what their unpickling raises."""
    if head.groups == 1:
        return _load_all(data, buffers, head.items, load)
    items: deque[Any] = deque()
    groups = pickle.loads(data)
    for (group, _), its in zip(groups, split(buffers, [n for _, n in groups]), strict=True):
        size = min(head.chunk, head.items - len(items))
        items.extend([Group(group, its, size, load)] * size)
    return items


def _load_all(data: Buffer, buffers: Sequence[Buffer], size: int, load: Load) -> deque[Any]:
    items = deque(load(data, buffers))
    if len(items) != size:
        raise ValueError(f"{len(items)} items came instead of {size}")
    return items
