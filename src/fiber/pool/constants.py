"""Constants of a call: what many of its tasks have in common travels once to each host.

    items ─► constants_of ─► Constants ─ snapshots, served ─► Loader (see `pool.loader`)
    batch ─► pack, with a number in the place of each ─► BATCH ─┘

It is found by identity: an object that several items are, or have among their elements. If its
pickle is large it is pickled once, into memory that the workers of a place share, and batches refer
to it. A function whose pickle is large, with what a closure or a partial holds, travels so too.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from fiber.constants import share
from fiber.pool.calls import LOOKED_AT, weight_of
from fiber.pool.loader import Source, load_function
from fiber.pool.protocol import STARMAP
from fiber.runtime import session
from fiber.runtime.snapshots import Snapshot
from fiber.wire.arena import LEAST
from fiber.wire.pickling import PLAIN, PROTOCOL, SIZED, Packed, dumps

__all__ = ["Constants", "constants_of", "share_function"]

_FEW = 16  # elements of a container that are
_DEPTH = 2  # containers within each other
_FIXED = PLAIN - SIZED
_CONTAINERS = (tuple, list, dict)


Folder = Callable[[], str]


def _share(packed: Packed, folder: Folder, fixed: bool) -> tuple[Any, Source]:
    """Serve what is packed; return the reference that keeps it, and how to get it."""
    snapshot = Snapshot(packed, folder)
    ref = share(snapshot)
    return ref, Source(snapshot.path, snapshot.size, ref.address, ref.id, fixed)


class Constants:
    """The constants of a call.

    Attributes:
        sources: of each, by number.
        told: workers that have these.
        size: of the largest, in bytes.
    """

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.told: set[int] = set()
        self.size = 0
        self._numbers: dict[int, int] = {}
        self._held: list[Any] = []  # objects, whose identities must last, and references

    def add(self, obj: Any, packed: Packed, folder: Folder) -> None:
        """Send `obj`, which is packed, by number from now on."""
        ref, source = _share(packed, folder, type(obj) in SIZED)
        self._numbers[id(obj)] = len(self.sources)
        self.sources.append(source)
        self.size = max(self.size, source.size)
        self._held += (obj, ref)

    def number(self, obj: Any) -> int | None:
        """Return the number of an object, None if it is no constant."""
        return self._numbers.get(id(obj))


def constants_of(
    how: int, items: Sequence[Any], known: Container[str] | None, folder: Folder
) -> Constants | None:
    """Return what is large and the same in several of the items, None if nothing is.

    Args:
        how: the items are called with.
        items: of a call; only some are searched if they are many.
        known: as for `wire.pickling.dumps`.
        folder: returns the folder for shared memory.
    """
    sample = items[:: -(-len(items) // LOOKED_AT)]
    constants = None
    for obj in _common(sample, _DEPTH + (how == STARMAP)):
        try:
            with session.lending([]):  # the items keep what has handles among them
                packed = dumps(obj, known)
        except Exception:
            continue  # the items that have it will tell
        if weight_of(packed) >= LEAST:
            constants = constants or Constants()
            constants.add(obj, packed, folder)
    return constants


def _common(items: Sequence[Any], depth: int) -> list[Any]:
    """Return objects that are in several items, without what is only within others of these."""
    counts: dict[int, int] = {}
    for item in items:
        for identity in {id(obj) for obj in _within(item, depth, ())}:
            counts[identity] = counts.get(identity, 0) + 1
    shared = {identity for identity, count in counts.items() if count > 1}
    if not shared:
        return []
    found = {}
    for item in items:
        for obj in _within(item, depth, shared):
            if id(obj) in shared:
                found[id(obj)] = obj
    return list(found.values())


def _within(obj: Any, depth: int, ends: Container[int]) -> Iterator[Any]:
    """Yield `obj` and what is in it, if it may be large; nothing of what is within `ends`."""
    kind = type(obj)
    if kind in _FIXED or (kind in SIZED and len(obj) < LEAST):
        return
    yield obj
    if depth and kind in _CONTAINERS and len(obj) <= _FEW and id(obj) not in ends:
        for element in obj.values() if kind is dict else obj:
            yield from _within(element, depth - 1, ends)


def share_function(packed: Packed, folder: Folder) -> tuple[Packed, Any]:
    """Return a packed function as it shall travel instead, and what keeps it."""
    ref, source = _share(packed, folder, False)
    return Packed(pickle.dumps(_Function(source), PROTOCOL), (), packed.by_name), ref


class _Function:
    """What is sent instead of a large function."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __reduce__(self) -> Any:
        return load_function, tuple(self._source)
