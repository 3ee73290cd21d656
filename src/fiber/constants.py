"""Constants: objects that are sent once to each host, however many processes need them.

    put ─► ObjectRef ─► pickled ─► ObjectRef ─► get ─┬─ same place ──► the same memory, mapped
            │                                        └─ another one ─► a copy, one for the place
            └─ ServedConstant (fiber.served.constant)

The object is pickled once, by `put`; its buffers, such as those of arrays, lie in memory that all
processes of a place have mapped. What `get` returns is kept at hand while the constant exists, so
that the tasks of a pool, each with a handle of its own, need not make it anew.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from fiber.errors import PeerDied, SerializationError
from fiber.runtime import session
from fiber.runtime.refs import Here, Peer, Ref, lookup, serve
from fiber.runtime.snapshots import Copy, Snapshot, map_file, parts
from fiber.served.constant import ServedConstant
from fiber.wire.framing import Buffer
from fiber.wire.pickling import dumps, loads

__all__ = ["ConstantRef", "ObjectRef", "put", "share"]

_T = TypeVar("_T")

_AT_HAND = 16  # objects that are kept though no handle is here
_CHUNK = 1 << 24  # bytes that are read at a time


def put(obj: _T) -> ObjectRef[_T]:
    """Return a handle of `obj`, which any process can be given and that each host fetches once.

    `obj` is pickled now: later changes do not show. It lives in this process, and as long as there
    is a handle anywhere; when this process ends, so does it.

    Args:
        obj: anything that can be pickled. What is worth it is large: an array, a data set, a model.

    Raises:
        SerializationError: it cannot be pickled.
    """
    try:
        packed = dumps(obj, session.current().known_names())
    except SerializationError as error:
        raise SerializationError(
            f"a {type(obj).__name__} cannot be put, for it cannot be pickled: {error}"
        ) from error.__cause__
    session.keep_clean()
    return ObjectRef(share(Snapshot(packed, session.current().memory_folder)))


def share(snapshot: Snapshot) -> ConstantRef:
    """Have this process serve a snapshot."""
    return serve(ConstantRef, ServedConstant, snapshot)


class ObjectRef(Generic[_T]):
    """A handle of an object that was `put`; it can be pickled into any process of the session."""

    __slots__ = ("__weakref__", "_ref")

    def __init__(self, ref: ConstantRef) -> None:
        self._ref = ref

    def get(self) -> _T:
        """Return the object: in one process the same each time.

        The memory of arrays and other buffers in it is that of all processes of this host, and
        cannot be written; copy one to change it.

        Raises:
            PeerDied: the process that put it is gone, and the object was not here yet.
            the exception that its unpickling raises.
        """
        obj: _T = self._ref.get()
        return obj

    def __reduce__(self) -> tuple[Any, ...]:
        ref = self._ref
        return _restore, (ref.address, ref.id, ref.lend())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and other._ref is self._ref

    def __hash__(self) -> int:
        return hash((self._ref.address, self._ref.id))

    def __repr__(self) -> str:
        return f"<fiber.ObjectRef {self._ref.id:016x}>"


def _restore(address: str, target: int, ticket: int) -> ObjectRef[Any]:
    ref = lookup(ConstantRef, address, target)
    ref.arrived(ticket)
    return ObjectRef(ref)


class _Kept:
    """An object that is at hand.

    Args:
        obj: the object.
        copy: of this place, that its buffers lie in.

    Attributes:
        gone: whether the constant is, so that nobody will tell of its end.
        unwatch: tells its home that the end needs not be told.
    """

    def __init__(self, obj: Any, copy: Copy | None) -> None:
        self.obj = obj
        self.copy = copy
        self.gone = False
        self.unwatch: Callable[[], None] = _nothing


def _nothing() -> None:
    """There is nothing to be called off."""


_Key = tuple[str, int]
_kept: dict[_Key, _Kept] = {}  # the least recently used first


class ConstantRef(Ref):
    """A constant, as this process has it."""

    def __init__(self, address: str, target: int) -> None:
        super().__init__(address, target)
        self._mutex = threading.Lock()
        self._mine: _Kept | None = None

    def renew(self) -> None:
        self._mutex = threading.Lock()

    def finish(self) -> None:
        """Let go of the copy: the last process of the place to do so removes it."""
        if self._mine is not None and self._mine.copy is not None:
            self._mine.copy.let_go()

    def lend(self) -> int:
        """A handle is being pickled: return its ticket, 0 if it needs none."""
        if session.lend(self):
            return 0
        ticket = int.from_bytes(os.urandom(8), "big")
        if isinstance(self.way, Here):
            session.hand(self.id)
        self._tell("lend", ticket)
        return ticket

    def arrived(self, ticket: int) -> None:
        """A handle was unpickled here."""
        if ticket:
            self._tell("arrived", ticket)

    def _tell(self, what: str, ticket: int) -> None:
        way = self.way
        if isinstance(way, Peer) and not (way.connected and way.works):
            return  # a ticket that is not given back runs out
        with contextlib.suppress(PeerDied):
            if way.loop.held:
                way.cast(self.id, what, (ticket,), ())
            else:
                self.cast(what, ticket)

    def get(self) -> Any:
        """Return the object."""
        if self._mine is not None:
            return self._mine.obj
        with self._mutex:
            if self._mine is None:
                key = self.address, self.id
                kept = _kept.pop(key, None)
                if kept is None:
                    kept = self._fetch()
                self._mine = kept
                _kept[key] = kept
                if kept.gone:
                    _forget(key, kept)
                while len(_kept) > _AT_HAND:
                    self._drop_oldest()
            return self._mine.obj

    def _fetch(self) -> _Kept:
        whole, copy = self.open()
        data, *buffers = parts(whole)
        kept = _Kept(loads(data, buffers), copy)
        key = self.address, self.id
        try:
            kept.unwatch = self.begin(
                "watch", accept=lambda *_: _forget(key, kept), failed=lambda: _forget(key, kept)
            )
        except PeerDied:
            kept.gone = True
        return kept

    def open(self) -> tuple[memoryview, Copy | None]:
        """Return the snapshot, and if this place has a copy of it, that.

        Raises:
            PeerDied: its home is gone.
        """
        call = self.call_for("open", ())
        path, size = call.result
        if call.buffers:
            return memoryview(call.buffers[0]).toreadonly(), None
        if path and self.way.near:
            with contextlib.suppress(OSError):
                return map_file(path, size), None
        if os.path.dirname(self.address.removeprefix("unix:")) not in session.known_folders():
            with contextlib.suppress(OSError):
                copy = Copy(self.session.memory_folder(), f"{self.id:016x}", size, self._read)
                return copy.memory, copy
        memory = memoryview(bytearray(size))
        for at in range(0, size, _CHUNK):
            stop = min(at + _CHUNK, size)
            memory[at:stop] = self._read(at, stop)
        return memory.toreadonly(), None

    def _read(self, start: int, stop: int) -> Buffer:
        (piece,) = self.call_for("read", (start, stop)).buffers
        return piece  # type: ignore[no-any-return]

    def _drop_oldest(self) -> None:
        with contextlib.suppress(StopIteration, KeyError):
            kept = _kept.pop(next(iter(_kept)))
            kept.unwatch()
            kept.unwatch = _nothing


def _forget(key: _Key, kept: _Kept) -> None:
    """The constant is gone: keep it no longer, unless a handle here does."""
    kept.gone = True
    kept.unwatch = _nothing  # which refers to `kept`
    if _kept.get(key) is kept:
        _kept.pop(key, None)


def _forget_after_fork() -> None:
    _kept.clear()  # who tells when one is gone tells the parent


os.register_at_fork(after_in_child=_forget_after_fork)
