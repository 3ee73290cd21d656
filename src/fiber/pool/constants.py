"""Constants of a call: what many of its tasks have in common travels once to each host.

    items ─► find ─► Constants ─ snapshots, served ───────────► Loader ─► a task's own copy
    batch ─► pack, with a number in the place of each ─► BATCH ──▲

It is found by identity: an object that several items are, or have among their elements. If its
pickle is large it is pickled once, into memory that the workers of a place share, and batches refer
to it. A function whose pickle is large, with what a closure or a partial holds, travels so too.

A task may change its arguments, and nobody else shall see that. So each gets a copy of its own: it
is unpickled anew, and large buffers are private views of the shared memory, whose pages are copied
by who writes to them.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from fiber.pool.protocol import STARMAP
from fiber.runtime.snapshots import LEAST
from fiber.wire.framing import Buffer
from fiber.wire.pickling import PLAIN, SIZED, Packed, dumps, loads

__all__ = ["Constants", "Loader", "Source", "constants_of", "load_function", "share_function"]

_LOOKED_AT = 256  # items of a call that are searched
_FEW = 16  # elements of a container that are
_DEPTH = 2  # containers within each other
_FIXED = PLAIN - SIZED
_CONTAINERS = (tuple, list, dict)
_VIEWED = 1 << 20  # bytes: what is smaller is copied faster than it is mapped


class Source(NamedTuple):
    """Where a worker gets a constant.

    Attributes:
        path: of the file, "" if there is none; for who is in the same place.
        size: of it all, in bytes.
        address, id: of the reference to it, for everybody else.
        fixed: whether it cannot change, so that tasks may have it in common.
    """

    path: str
    size: int
    address: str
    id: int
    fixed: bool


Folder = Callable[[], str]


def _share(packed: Packed, folder: Folder, fixed: bool) -> tuple[Any, Source]:
    """Serve what is packed; return the reference that keeps it, and how to get it."""
    from fiber.constants import share
    from fiber.runtime.snapshots import Snapshot

    snapshot = Snapshot(packed, folder)
    ref = share(snapshot)
    return ref, Source(snapshot.path, snapshot.size, ref.address, ref.id, fixed)


# At the master --------------------------------------------------------------------------------


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
    if len(items) < 2:
        return None
    sample = items if len(items) <= _LOOKED_AT else items[:: -(-len(items) // _LOOKED_AT)]
    kinds = set(map(type, sample))
    if kinds == {tuple}:
        kinds = set(map(type, chain.from_iterable(sample)))
    if kinds <= _FIXED:
        return None
    constants = None
    for obj in _common(sample, _DEPTH + (how == STARMAP)):
        try:
            packed = dumps(obj, known)
        except Exception:
            continue  # the items that have it will tell
        if _size(packed) >= LEAST:
            constants = constants or Constants()
            constants.add(obj, packed, folder)
    return constants


def _size(packed: Packed) -> int:
    return len(packed.data) + sum(map(len, packed.buffers))


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
    """Return a packed function as it shall travel, and what keeps it."""
    if _size(packed) < LEAST:
        return packed, None
    ref, source = _share(packed, folder, False)
    data = pickle.dumps(_Function(source), pickle.HIGHEST_PROTOCOL)
    return Packed(data, (), packed.by_name), ref


class _Function:
    """What is sent instead of a large function."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __reduce__(self) -> Any:
        return load_function, tuple(self._source)


# At a worker -----------------------------------------------------------------------------------


def load_function(*source: Any) -> Any:
    """Return the function, as one of this worker's own."""
    constant = _Constant(Source(*source))
    function = constant.load()
    with contextlib.suppress(TypeError):  # a callable that cannot be referred to weakly
        # In another place, what was fetched is there for the other workers as long as this one is.
        weakref.finalize(function, constant.close).atexit = False
    return function


class _Constant:
    """A constant, as a worker has it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._opened = False
        self._path = ""  # of the file that is mapped
        self._whole: memoryview | None = None
        self._keep: Any = None  # what keeps the file there
        self._value: Any = None
        self._views: Any = None
        self._viewed = False  # whether an earlier task's view is not over

    def load(self) -> Any:
        """Return it, as new."""
        from fiber.runtime.snapshots import parts

        if not self._opened:
            self._open()
        if self._value is not None:
            return self._value
        assert self._whole is not None
        data, *buffers = parts(self._whole)
        if buffers:
            data, *buffers = parts(self._private(self._whole))
        value = loads(data, buffers)
        if self._source.fixed:
            self._value = value
        return value

    def close(self) -> None:
        """Let go of it."""
        self._keep = self._whole = self._value = None

    def _open(self) -> None:
        from fiber.constants import ConstantRef
        from fiber.runtime.refs import lookup
        from fiber.runtime.snapshots import map_file

        source = self._source
        if source.path and os.path.exists(source.path):
            self._path, self._whole = source.path, map_file(source.path, source.size)
        else:
            ref = lookup(ConstantRef, source.address, source.id)
            self._whole, copy = ref.open()
            self._keep = ref, copy
            self._path = copy.path if copy is not None else ""
        self._opened = True

    def _private(self, whole: memoryview) -> memoryview:
        """Return a copy of its bytes, which may be one that is made when it is written to."""
        if not self._path or len(whole) < _VIEWED:
            return memoryview(bytearray(whole))
        if self._views is None:
            from fiber.wire.views import Views

            self._views = Views()
        if any(ended.token is self for ended in self._views.collect()):
            self._viewed = False
        if self._viewed:  # a task has kept it: the next one needs another mapping
            view: memoryview = self._views.view(self._path, 0, len(whole), None, alone=True)
            return view
        view = self._views.view(self._path, 0, len(whole), self)
        self._viewed = True
        return view


class Loader:
    """The constants of the calls that a worker has batches of."""

    def __init__(self) -> None:
        self._calls: dict[int, list[_Constant]] = {}

    def tell(self, call: int, sources: Sequence[Source]) -> None:
        """Batches of a call refer to these."""
        self._calls[call] = [_Constant(Source(*source)) for source in sources]

    def forget(self, call: int) -> None:
        """The call is over."""
        self._calls.pop(call, None)

    def loads_for(self, call: int) -> Callable[[Buffer, Sequence[Buffer]], Any]:
        """Return what unpickles the items of a call."""
        constants = self._calls.get(call)
        if constants is None:
            return loads

        def loads_with(data: Buffer, buffers: Sequence[Buffer]) -> Any:
            return _Unpickler(data, buffers, constants).load()

        return loads_with


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: Buffer, buffers: Sequence[Buffer], constants: list[_Constant]) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._constants = constants
        self._loaded: dict[int, Any] = {}  # items that travel together may share what they have

    def persistent_load(self, pid: int) -> Any:
        if pid not in self._loaded:
            self._loaded[pid] = self._constants[pid].load()
        return self._loaded[pid]
