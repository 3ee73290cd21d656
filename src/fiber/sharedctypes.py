"""ctypes objects in shared memory, with `multiprocessing.sharedctypes`' interface.

    Value ─► Synchronized ─┬─► a lock
                           └─► RawValue: a ctypes object ─► BufferWrapper ─► memory (fiber.heap)

They can be pickled at any time, by any pickler: what travels is where their memory is.

A process that cannot map that memory, for it is in another container or on another host, has a copy
of its bytes, which is right while it holds the lock:

    acquire ─► lock ─► fetch the bytes ─► use ─► send those that changed ─► release the lock
                              ▲                               │
                              └── ServedMemory (fiber.served) ◄┘  in a process that has it mapped

So there must be a lock, and it must be acquired through the object that it guards: by its
`acquire`, `with`, `get_lock()`, or by reading and setting its value, which lock by themselves. Each
time that nobody in the process has it yet, all the bytes come: a loop shall acquire it once. If a
lock guards several objects, each is fetched when the lock is acquired through that one. A condition
made with the lock waits for a value inside of `with condition`, not of `with value`.
"""

from __future__ import annotations

import contextlib
import copyreg
import ctypes
import functools
import operator
import os
import re
import sys
import weakref
from collections.abc import Iterator
from multiprocessing import sharedctypes as _mp
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar

from fiber.errors import PeerDied
from fiber.heap import BufferWrapper, Unmapped
from fiber.runtime.refs import Ref, lookup

__all__ = [
    "Array",
    "RawArray",
    "RawValue",
    "Synchronized",
    "SynchronizedArray",
    "SynchronizedBase",
    "SynchronizedString",
    "Value",
    "copy",
    "synchronized",
    "typecode_to_type",
]

typecode_to_type: dict[str, Any] = _mp.typecode_to_type  # type: ignore[attr-defined]
make_property: Any = _mp.make_property  # type: ignore[attr-defined]

_T = TypeVar("_T")


def RawValue(typecode_or_type: Any, *args: Any) -> Any:
    """Return a ctypes object in shared memory.

    Args:
        typecode_or_type: a ctypes type, or one of `array`'s letters for it.
        args: for its constructor.

    Raises:
        OSError: there is no room for it.
    """
    type_ = typecode_to_type.get(typecode_or_type, typecode_or_type)
    value = _new_value(type_)
    value.__init__(*args)
    return value


def RawArray(typecode_or_type: Any, size_or_initializer: Any) -> Any:
    """Return a ctypes array in shared memory.

    Args:
        typecode_or_type: of its elements, as for `RawValue`.
        size_or_initializer: how many, all zero; or a sequence with their values.

    Raises:
        OSError: there is no room for it.
    """
    type_ = typecode_to_type.get(typecode_or_type, typecode_or_type)
    if isinstance(size_or_initializer, int):
        return _new_value(type_ * size_or_initializer)
    array = _new_value(type_ * len(size_or_initializer))
    array.__init__(*size_or_initializer)
    return array


def Value(typecode_or_type: Any, *args: Any, lock: Any = True, ctx: Any = None) -> Any:
    """Return a ctypes object in shared memory, with a lock.

    Args:
        typecode_or_type, args: as for `RawValue`.
        lock: the lock to use; True or None for a new `RLock`, False for none: a `RawValue`.
        ctx: the context that the new lock is of.
    """
    return _with_lock(RawValue(typecode_or_type, *args), lock, ctx)


def Array(
    typecode_or_type: Any, size_or_initializer: Any, *, lock: Any = True, ctx: Any = None
) -> Any:
    """Return a ctypes array in shared memory, with a lock.

    Args:
        typecode_or_type, size_or_initializer: as for `RawArray`.
        lock, ctx: as for `Value`.
    """
    return _with_lock(RawArray(typecode_or_type, size_or_initializer), lock, ctx)


def _with_lock(raw: Any, lock: Any, ctx: Any) -> Any:
    if lock is False:
        return raw
    if lock in (True, None):
        lock = _new_lock(ctx)
    if not hasattr(lock, "acquire"):
        raise AttributeError(f"{lock!r} has no method 'acquire'")
    return synchronized(raw, lock, ctx)


def _new_lock(ctx: Any) -> Any:
    if ctx is not None:
        return ctx.RLock()
    from fiber.synchronize import RLock

    return RLock()


def copy(obj: _T) -> _T:
    """Return a copy of a ctypes object, in shared memory of its own."""
    new: Any = _new_value(type(obj))
    ctypes.pointer(new)[0] = obj
    return new  # type: ignore[no-any-return]


def synchronized(obj: Any, lock: Any = None, ctx: Any = None) -> SynchronizedBase[Any]:
    """Return `obj`, a ctypes object, with a lock: the one given, or a new `RLock`."""
    assert not isinstance(obj, _mp.SynchronizedBase), "object already synchronized"
    if isinstance(obj, ctypes._SimpleCData):
        return Synchronized(obj, lock, ctx)
    if isinstance(obj, ctypes.Array):
        if obj._type_ is ctypes.c_char:
            return SynchronizedString(obj, lock, ctx)
        return SynchronizedArray(obj, lock, ctx)
    kind = type(obj)
    wrapper = _wrappers.get(kind)
    if wrapper is None:
        members = {name: make_property(name) for name, *_ in _fields(kind)}
        wrapper = _wrappers[kind] = type(
            f"Synchronized{kind.__name__}", (SynchronizedBase,), members
        )
    return wrapper(obj, lock, ctx)  # type: ignore[no-any-return]


_wrappers: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


def _fields(kind: type) -> list[Any]:
    """Return the fields of a Structure or Union, with those that it inherits."""
    return [field for base in kind.__mro__ for field in vars(base).get("_fields_", ())]


# Memory and pickling ---------------------------------------------------------------------------


def _new_value(type_: Any) -> Any:
    """Return an object of `type_` in new memory, all zero."""
    wrapper = BufferWrapper(ctypes.sizeof(type_))
    value = _rebuild(type_, (), wrapper)
    if not wrapper.zeroed:
        ctypes.memset(ctypes.addressof(value), 0, ctypes.sizeof(value))
    return value


def _rebuild(type_: Any, lengths: tuple[int, ...], wrapper: BufferWrapper) -> Any:
    """Return an object of `type_`, or an array of arrays of them, in the memory of `wrapper`.

    Raises:
        FileNotFoundError: this process cannot map that.
    """
    if isinstance(wrapper.arena, Unmapped):
        kind = "RawArray" if lengths else "RawValue"
        raise wrapper.arena.error(f"a {kind} of {type_.__name__}")
    return _place(_array_type(type_, lengths), wrapper, wrapper.create_memoryview())


def _array_type(type_: Any, lengths: tuple[int, ...]) -> Any:
    for length in lengths:
        type_ = type_ * length
    return type_


def _place(type_: Any, wrapper: BufferWrapper, buffer: Any) -> Any:
    """Return an object of `type_` in `buffer`, which goes by `wrapper` when it is pickled."""
    # The table that all picklers use. It is by type, and all objects of the type are looked up.
    copyreg.pickle(type_, reduce_ctype)
    value = type_.from_buffer(buffer)
    value._wrapper = wrapper
    return value


def reduce_ctype(obj: Any) -> Any:
    """Tell picklers how to rebuild a ctypes object: in shared memory, by where that is."""
    wrapper = getattr(obj, "_wrapper", None)
    if not isinstance(wrapper, BufferWrapper):
        return obj.__reduce_ex__(2)  # in this process's memory: by its value
    if _is_for_a_copy():
        return type(obj).from_buffer_copy, (bytes(obj),)
    return _rebuild, (*_elements(obj), wrapper)


def _is_for_a_copy() -> bool:
    """Whether it is the module `copy` that asks how to pickle something."""
    return sys._getframe(2).f_globals.get("__name__") == "copy"


def _elements(obj: Any) -> tuple[Any, tuple[int, ...]]:
    """Return the type of an object; of an array that of its elements, and the lengths."""
    type_: Any = type(obj)
    lengths: list[int] = []
    # Types of arrays have names by which nobody finds them.
    while issubclass(type_, ctypes.Array) and type_ is type_._type_ * type_._length_:
        lengths.append(type_._length_)
        type_ = type_._type_
    return type_, tuple(reversed(lengths))


def rebuild_ctype(type_: Any, wrapper: BufferWrapper, length: int | None) -> Any:
    """As multiprocessing's: an object of `type_`, or an array of `length` of them."""
    return _rebuild(type_, () if length is None else (length,), wrapper)


# Where the memory cannot be mapped --------------------------------------------------------------

_CHUNK = 1 << 16  # bytes that are compared at a time


class _Copy:
    """The bytes of a block that this process cannot map; there is one for each block.

    Args:
        ref: to the arena, where it is mapped.
        wrapper: of the block.
        item: bytes that are sent together if any of them has changed.

    Attributes:
        bytes: as they are here.
        ref: see above.
        depth: how often its lock was acquired through it and not released; once is enough to
            fetch the bytes.
        owner: the thread that did so.
    """

    def __init__(self, ref: Ref, wrapper: BufferWrapper, item: int) -> None:
        self.ref = ref
        self.depth = 0
        self.owner = 0
        self._start, size = wrapper.place
        self.bytes = bytearray(size)
        self._item = item
        self._fetched: Any = b""

    def fetch(self) -> None:
        """Get the bytes as they are there.

        Raises:
            PeerDied: the process that serves them is gone.
        """
        stop = self._start + len(self.bytes)
        (data,) = self.ref.call_for("read", (self._start, stop)).buffers
        memoryview(self.bytes)[:] = data  # it must not be resized
        self._fetched = data

    def send(self) -> None:
        """Send what has changed here: there, others may have changed the rest meanwhile.

        Raises:
            PeerDied: the process that serves them is gone.
        """
        ranges, data = [], bytearray()
        for start, stop in self._changes():
            ranges.append((self._start + start, self._start + stop))
            data += self.bytes[start:stop]
        self._fetched = b""
        if ranges:
            self.ref.call("write", ranges, buffers=[data])

    def _changes(self) -> Iterator[tuple[int, int]]:
        if not self._fetched or self.bytes == self._fetched:
            return  # nothing was fetched, or nothing has changed
        item = self._item
        chunk = max(_CHUNK // item, 1) * item
        for at in range(0, len(self.bytes), chunk):
            here, there = self.bytes[at : at + chunk], self._fetched[at : at + chunk]
            if here != there:
                differences = (_number(here) ^ _number(there)).to_bytes(len(here), "little")
                # Not 0 where any byte of the item differs.
                parts = [_number(differences[i::item]) for i in range(item)]
                marks = functools.reduce(operator.or_, parts).to_bytes(len(here) // item, "little")
                for run in re.finditer(rb"[^\0]+", marks):
                    yield at + run.start() * item, at + run.end() * item


def _number(data: bytes | bytearray) -> int:
    return int.from_bytes(data, "little")


_copies: weakref.WeakValueDictionary[tuple[str, int], _Copy] = weakref.WeakValueDictionary()


def _after_fork() -> None:
    for copy in list(_copies.values()):
        copy.depth = 0  # it is the parent who has the lock


os.register_at_fork(after_in_child=_after_fork)


def _copy_of(wrapper: BufferWrapper, arena: Unmapped, source: tuple[str, int], item: int) -> _Copy:
    """Return this process's copy of a block.

    Args:
        wrapper: of the block.
        arena: where it is.
        source: of a reference to that: address and number.
        item: see `_Copy`.
    """
    ref = lookup(Ref, *source)
    key = arena.key, wrapper.place[0]
    copy = _copies.get(key)
    if copy is None:
        copy = _copies.setdefault(key, _Copy(ref, wrapper, item))
    elif not copy.ref.way.works:
        copy.ref = ref
    if not ref.loop.held:
        with contextlib.suppress(PeerDied):  # whoever uses it will be told
            ref.cast("hold", arena.ticket)
    return copy


class _CopyLock:
    """A lock of which the acquisition fetches a copy's bytes, and the release sends them back."""

    def __init__(self, lock: Any, copy: _Copy) -> None:
        from fiber.synchronize import Lock, Semaphore

        self._lock = lock
        self._copy = copy
        self._recursive = not isinstance(lock, (Lock, Semaphore))

    def acquire(self, *args: Any, **kwargs: Any) -> Any:
        """As the lock's.

        Raises:
            PeerDied: the process is gone that the lock lives in, or that serves the bytes.
        """
        acquired = self._lock.acquire(*args, **kwargs)
        if acquired:
            copy = self._copy
            if copy.depth == 0 or not self._recursive:
                copy.depth = 0
                try:
                    copy.fetch()
                except BaseException:
                    self._lock.release()
                    raise
            copy.depth += 1
            copy.owner = get_ident()
        return acquired

    def release(self) -> None:
        """As the lock's."""
        copy = self._copy
        try:
            # Another thread's recursive lock will not be released, but raise an error.
            if copy.depth and (copy.owner == get_ident() or not self._recursive):
                copy.depth -= 1
                if copy.depth == 0:
                    copy.send()
        finally:
            self._lock.release()

    def __enter__(self) -> Any:
        return self.acquire()

    def __exit__(self, *args: object) -> None:
        self.release()

    @property
    def _ref(self) -> _CopyLockRef:
        """What a condition of this lock waits with."""
        return _CopyLockRef(self._lock._ref, self._copy)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)

    def __repr__(self) -> str:
        return repr(self._lock)

    def __reduce__(self) -> Any:
        return _itself, (self._lock,)


def _itself(lock: Any) -> Any:
    """What such a lock is in another process."""
    return lock


class _CopyLockRef:
    """The reference to such a lock: while it waits, others have the lock, and change the bytes."""

    def __init__(self, ref: Any, copy: _Copy) -> None:
        self._ref = ref
        self._copy = copy

    def wait(self, condition: int, seconds: float | None) -> Any:
        """As the reference's."""
        copy = self._copy
        depth, copy.depth = copy.depth, 0
        if depth:
            copy.send()
        try:
            return self._ref.wait(condition, seconds)
        finally:
            if depth:
                copy.depth, copy.owner = depth, get_ident()
                copy.fetch()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ref, name)


def _guard(lock: Any, copy: _Copy) -> Any:
    """Return `lock` as one that keeps a copy right; conditions are locks too."""
    from fiber.synchronize import Condition

    if isinstance(lock, Condition):
        guarded = Condition(_guard(lock._lock, copy))
        guarded._id = lock._id
        return guarded
    if isinstance(lock, _CopyLock) and lock._copy is copy:
        return lock
    return _CopyLock(lock, copy)


# With locks ------------------------------------------------------------------------------------

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import (
        Synchronized,
        SynchronizedArray,
        SynchronizedBase,
        SynchronizedString,
    )
else:

    class SynchronizedBase(_mp.SynchronizedBase):
        """A ctypes object in shared memory, with a lock.

        Where that memory cannot be mapped it has a copy, and the lock must be acquired through
        this object: see the module.
        """

        def __init__(self, obj, lock=None, ctx=None):
            lock = lock or _new_lock(ctx)
            copy = getattr(obj, "_copy", None)
            super().__init__(obj, lock if copy is None else _guard(lock, copy), ctx)

        def get_obj(self):
            """Return the ctypes object; where it is a copy, it is right while the lock is held."""
            return self._obj

        def __reduce__(self):
            wrapper = getattr(self._obj, "_wrapper", None)
            if not isinstance(wrapper, BufferWrapper) or _is_for_a_copy():
                return synchronized, (self._obj, self._lock)
            copy = getattr(self._obj, "_copy", None)
            ref = wrapper.arena.ref() if copy is None else copy.ref
            ref.lease()
            source = ref.address, ref.id
            return _rebuild_synchronized, (*_elements(self._obj), wrapper, self._lock, source)

    class Synchronized(SynchronizedBase, _mp.Synchronized):
        """A number or character; `value` is read and set under the lock."""

    class SynchronizedArray(SynchronizedBase, _mp.SynchronizedArray):
        """An array; items and slices are read and set under the lock."""

    class SynchronizedString(SynchronizedArray, _mp.SynchronizedString):
        """An array of `c_char`; `value` and `raw` are read and set under the lock."""


def _rebuild_synchronized(
    type_: Any,
    lengths: tuple[int, ...],
    wrapper: BufferWrapper,
    lock: Any,
    source: tuple[str, int],
) -> SynchronizedBase[Any]:
    """Return an object with its lock; `source` is of a reference to its arena, if need be."""
    arena = wrapper.arena
    if not isinstance(arena, Unmapped):
        return synchronized(_rebuild(type_, lengths, wrapper), lock)
    item = ctypes.sizeof(type_) if issubclass(type_, ctypes._SimpleCData) else 1
    copy = _copy_of(wrapper, arena, source, item)
    obj = _place(_array_type(type_, lengths), wrapper, copy.bytes)
    obj._copy = copy
    return synchronized(obj, lock)
