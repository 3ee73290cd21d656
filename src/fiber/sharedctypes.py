"""ctypes objects in shared memory, with `multiprocessing.sharedctypes`' interface.

    Value ─► Synchronized ─┬─► a lock
                           └─► RawValue: a ctypes object ─► BufferWrapper ─► memory (fiber.heap)

They can be pickled at any time, by any pickler: what travels is where their memory is.

A process that cannot map that memory, for it is in another container or on another host, has a copy
of its bytes, which is right while it holds the lock (see `copies`). So there must be a lock, and it
must be acquired through the object that it guards: by its `acquire`, `with`, `get_lock()`, or by
reading and setting its value, which lock by themselves. Each time that nobody in the process has it
yet, all the bytes come: a loop shall acquire it once. If a lock guards several objects, each is
fetched when the lock is acquired through that one. A condition made with the lock waits for a value
inside of `with condition`, not of `with value`.
"""

from __future__ import annotations

import copyreg
import ctypes
import sys
import weakref
from multiprocessing import sharedctypes as _mp
from typing import TYPE_CHECKING, Any, TypeVar

from fiber.copies import copy_of, guard
from fiber.heap import BufferWrapper, Unmapped

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
            super().__init__(obj, lock if copy is None else guard(lock, copy), ctx)

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
    copy = copy_of(wrapper, arena, source, item)
    obj = _place(_array_type(type_, lengths), wrapper, copy.bytes)
    obj._copy = copy
    return synchronized(obj, lock)
