"""Constants of a call: what many of its tasks have in common travels once to each host.

    items ─► constants_of ─► Constants ─ snapshots, served ─► Loader (see `pool.loader`)
    batch ─► pack, with a number in the place of each ─► BATCH ─┘

It is found by identity: an object that several items are, or have among their elements. If its
pickle is large it is pickled once, into memory that the workers of a place share, and batches refer
to it. A function whose pickle is large, with what a closure or a partial holds, travels so too.

What is one object in an item is one for its task. So nothing is sent apart that has something in
common with what else is sent, which could be changed: of two constants, one stays with the items;
and if an item reaches into a constant, the call goes on without (`Entangled`).
"""

from __future__ import annotations

import enum
import pickle
import sys
import types
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from fiber.constants import share
from fiber.pool.calls import LOOKED_AT, Entangled, weight_of
from fiber.pool.loader import Source, load_function
from fiber.pool.protocol import STARMAP
from fiber.runtime import session
from fiber.runtime.snapshots import Snapshot
from fiber.wire import pickling
from fiber.wire.arena import LEAST
from fiber.wire.pickling import PLAIN, PROTOCOL, SIZED, Packed, dumps

__all__ = ["Constants", "constants_of", "share_function"]

_FEW = 16  # elements of a container that are
_DEPTH = 2  # containers within each other
_FIXED = PLAIN - SIZED
_CONTAINERS = frozenset({tuple, list, dict})
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_UNCHANGING = PLAIN | {tuple, frozenset, range, slice}


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
    """

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.told: set[int] = set()
        self._numbers: dict[int, int] = {}
        self._within: dict[int, Any] = {}  # what is in them and can be changed, by identity
        self._held: list[Any] = []  # references

    def add(self, obj: Any, packed: Packed, within: dict[int, Any], folder: Folder) -> bool:
        """Send `obj`, which is packed, by number from now on, if it is apart from the others.

        Args:
            obj: of which there is one in several items.
            packed: its pickle.
            within: what is in it and can be changed.
            folder: returns the folder for shared memory.
        """
        if not self._within.keys().isdisjoint(within):
            return False
        ref, source = _share(packed, folder, type(obj) in SIZED)
        self._numbers[id(obj)] = len(self.sources)
        self.sources.append(source)
        self._within.update(within)
        self._held += (obj, ref)
        return True

    def number(self, obj: Any) -> int | None:
        """Return the number of an object, None if it is no constant.

        Raises:
            Entangled: it is a part of one.
        """
        found = self._numbers.get(id(obj))
        if found is None and id(obj) in self._within:
            raise Entangled
        return found


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
    found = []
    for obj in _common(sample, _DEPTH + (how == STARMAP)):
        session.lend_to([])  # the items keep what has handles among them
        within: dict[int, Any] = {}
        mark = pickling.carrier.made
        try:
            packed = dumps(obj, known, within=within)
            if pickling.carrier.made != mark:  # descriptors go to one receiver each
                pickling.carrier.withdraw(mark)
                continue
        except (Exception, SystemExit):
            continue  # the items that have it will tell
        finally:
            session.lend_to(None)
        if weight_of(packed) >= LEAST:
            within = {identity: part for identity, part in within.items() if _can_change(part)}
            found.append((obj, packed, within))
    if not found:
        return None
    constants = Constants()
    for obj, packed, within in sorted(found, key=lambda one: len(one[2])):
        constants.add(obj, packed, within, folder)
    return constants


def _can_change(obj: Any) -> bool:
    """Whether an object may be changed: all may, but for a few kinds."""
    kind = type(obj)
    if kind in _UNCHANGING or issubclass(kind, (*_NAMED, enum.Enum)):
        return False
    numpy = sys.modules.get("numpy")
    return numpy is None or not issubclass(kind, numpy.dtype)


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
    if depth and id(obj) not in ends:
        for element in _elements(obj, kind):
            yield from _within(element, depth - 1, ends)


def _elements(obj: Any, kind: type) -> Sequence[Any]:
    """Return what is in a container, or the attributes of an object, if these are a few."""
    if kind not in _CONTAINERS:
        if any(kind is named for named in _NAMED):
            return ()
        try:
            obj = object.__getattribute__(obj, "__dict__")
        except Exception:  # none, or a property
            return ()
        kind = type(obj)
        if kind is not dict:
            return ()
    if len(obj) > _FEW:
        return ()
    return list(obj.values()) if kind is dict else obj


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
